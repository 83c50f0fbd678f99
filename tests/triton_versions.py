"""Compiles every form of every Triton kernel with every Triton that is supported, without a GPU.

    python tests/triton_versions.py [VERSION ..]

Each Triton is installed into a folder of its own, build/compat/triton/VERSION, and used again when it is there; nothing
else is changed. Needs torch and numpy. Prints what spills registers; ends with a table, and an error that names the
cases that failed.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ROOT / "build" / "compat" / "triton"
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
PROCESSES = min(2, os.cpu_count() or 1)


def pin_cases() -> list[str]:
    """Ranks, dtypes of weight and basis, layout, bias, architecture: all of ``pin_table.Form``."""
    layouts = list(product(("", ",transposed", ",strided"), ("", ",bias")))
    return [
        f"pin_,{ranks},{kind}{layout}{bias}{architecture}"
        for architecture, kind in product(("", ",sm80", ",sm100"), ("bf16,pair", "fp32", "bf16", "fp16"))
        for layout, bias in layouts
        for ranks in (64, 128, 256)
        if ranks == 64 or layout != ",strided" and (kind == "bf16,pair" or ranks == 128 and architecture != ",sm80")
    ]


def row_cases() -> list[str]:
    """What walks rows. 5 and 6 rows differ in threads, 9 and 10 in passes; ``combine_`` takes 8 at a time."""
    cases = [f"gram,{n},fp32" for n in (1, 2, 5, 6, 9, 10, 12)]
    cases += [f"gram,{n},fp32,gram_dd" for n in (2, 5, 6, 9, 10, 12)]
    cases += [f"gram,{n},fp32,{flag}" for n in (3, 10) for flag in ("absent", "mixed", "strided", "parts")]
    cases += [f"gram,{n},fp32,{flag},gram_dd" for n in (3, 10) for flag in ("absent", "mixed", "parts")]
    cases += [f"gram,{n},{dtype}" for n in (1, 2, 9) for dtype in ("bf16", "fp16", "fp64")]
    methods = ("", ",conflict", ",mix")
    cases += [f"project_,{n},fp32{method}" for n in (2, 3, 5, 9) for method in methods]
    cases += [
        f"project_,{n},bf16,{flag}{method}" for n in (2, 9) for flag in ("gram_dd", "mixed") for method in methods
    ]
    cases += ["project_,2,fp32,mixed,gram_dd,mix", "project_,9,fp32,mixed,gram_dd,conflict", "project_,3,bf16,strided"]
    cases += [f"combine_,{n},{dtype}" for n in (2, 8, 9, 33) for dtype in ("fp32", "bf16", "fp16", "fp64")]
    cases += [f"combine_,{n},fp32,{flag}" for n in (3, 9) for flag in ("absent", "mixed", "strided", "parts")]
    cases += [f"weights,{n},fp64{method}" for n in (2, 3, 5, 9, 17, 33, 65) for method in methods]
    elsewhere = (
        "gram,2,fp32",
        "gram,9,bf16",
        "project_,2,bf16,conflict",
        "combine_,33,bf16",
        "weights,65,fp64,conflict",
    )
    return cases + [f"{case},{architecture}" for case in elsewhere for architecture in ("sm80", "sm100")]


CASES = [*row_cases(), *pin_cases()]


class Result(NamedTuple):
    """What came of one Triton: cases that compiled, those that failed, and the stack of what spills, in bytes."""

    version: str
    compiled: int
    failed: list[str]
    spills: dict[str, int]


def install(version: str) -> Path:
    folder = FOLDERS / version
    if (folder / "triton").exists():
        print(f"triton {version}: {folder.relative_to(ROOT)} is there", flush=True)
        return folder
    print(f"triton {version}: installing into {folder.relative_to(ROOT)} (700 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), f"triton=={version}"], check=True)
    return folder


def compile_cases(folder: Path, cases: list[str], out: Path) -> subprocess.Popen:
    """A process that compiles ``cases`` with the Triton in ``folder``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(out / "cache")}
    command = [sys.executable, str(ROOT / "tests" / "triton_compile.py"), str(out), *cases]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def spilled(out: Path) -> dict[str, int]:
    """Bytes of stack of every kernel that uses some."""
    found = {}
    for path in sorted(out.glob("*.usage")):
        stack = max(map(int, re.findall(r"STACK:(\d+)", path.read_text())))
        if stack:
            found[path.stem] = stack
    return found


def try_version(version: str, cases: list[str]) -> Result:
    folder = install(version)
    start, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        waiting = [cases[k::PROCESSES] for k in range(PROCESSES)]
        while any(waiting):
            running = [compile_cases(folder, some, out) for some in waiting]
            outputs = [process.communicate()[0] for process in running]
            for k, (process, output) in enumerate(zip(running, outputs, strict=True)):
                if process.returncode == 0:
                    waiting[k] = []
                    continue
                reached = re.findall(r"^compiling (.*)$", output, re.MULTILINE)
                if not reached:  # not even imported: no case would compile
                    reached = waiting[k]
                failed.append(reached[-1])
                print(f"triton {version}: {reached[-1]} does not compile:")
                print("\n".join("    | " + line for line in output.splitlines()[-12:]), flush=True)
                waiting[k] = waiting[k][waiting[k].index(reached[-1]) + 1 :]
        spills = spilled(out)
    print(
        f"triton {version}: {len(cases) - len(failed)} of {len(cases)} cases compile, {len(spills)} kernels spill "
        f"({time.monotonic() - start:.0f} s)",
        flush=True,
    )
    for name, stack in spills.items():
        print(f"    spills {stack:4} bytes: {name}", flush=True)
    return Result(version, len(cases) - len(failed), failed, spills)


def main(versions: list[str]) -> int:
    results = [try_version(version, CASES) for version in versions or VERSIONS]
    print(
        "\n| triton | cases compiled | failed | kernels that spill | most bytes |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for result in results:
        most = max(result.spills.values(), default=0)
        counts = f"{result.compiled} | {len(result.failed)} | {len(result.spills)} | {most}"
        print(f"| {result.version} | {counts} |")
    for result in results:
        for case in result.failed:
            print(f"FAILED: {case} with triton {result.version}")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
