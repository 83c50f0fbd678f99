"""`make compat`: the package on the oldest and the newest torch, and on difficult ones in between, each in an
environment of its own under build/compat/.

Every torch is installed, both libraries are built for it as docs/quickstart.md says, loaded, and asked for the kernel
of every op, and the fast tests run on the CPU. Then every supported Triton compiles every kernel
(tests/triton_versions.py), and the wheel built on the oldest torch is installed beside the newest. An environment that
is there is used again; the libraries are built afresh. Takes up to half an hour, half of it for the environments.

The newest is what the package index has, declared or not: a release that breaks the package fails here first.

A torch that cannot be had on this machine is reported and left out, unless --require names it.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / "build" / "compat"
VERSIONS = ("2.10.0", "2.11.0")  # and the newest release
FAST = ("gram", "combine", "project", "parts", "ops", "methods", "optim", "attach", "nullspace")
FAST_TESTS = [*(f"tests/test_{name}.py" for name in FAST), "-m", "not gpu", "-k", "not triton"]
START = time.monotonic()

# Loads the libraries with every symbol bound at once and prints what the dispatcher has. backends.py would not load the
# CUDA library on a machine without a GPU.
CHECK = """
import json, pathlib, torch, gradproj
from gradproj.kernels.ops import SCHEMAS
folder = pathlib.Path(gradproj.__file__).parent
names = [name for s in SCHEMAS if (name := s.split("(")[0]) != "pin_"]  # pin_ is left to a BLAS
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "folder": str(folder), "ops": len(names)}
for name, key in (("cpu", "CPU"), ("cuda", "CUDA")):
    if (folder / f"_{name}.so").exists():
        torch.ops.load_library(folder / f"_{name}.so")
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        found[name] = [op for op in names if has("gradproj::" + op, key)]
print("found " + json.dumps(found))
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--require", action="append", default=[], metavar="VERSION", help="fail if this torch did not run"
    )
    parser.add_argument("--minutes", type=float, default=30, help="stop after this time (30)")
    return parser.parse_args()


OPTIONS = parse_options()


class Failed(Exception):
    """A step that did not succeed; what it printed has been shown."""

    verdict = "FAILED"


class OutOfTime(Failed):
    verdict = "FAILED: out of time"


class Unavailable(Failed):
    verdict = "not to be had here"


@dataclasses.dataclass
class Row:
    """What came of one torch, as the summary shows it."""

    torch: str
    cpu: str = "-"
    cuda: str = "-"
    loaded: str = "-"
    kernels: str = "-"
    tests: str = "-"
    verdict: str = "passed"


class Installed(NamedTuple):
    """One torch's environment, with the package built in it."""

    version: str
    python: Path
    package: Path


def say(version: str, text: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - START), 60)
    print(f"[{minutes:2}:{seconds:02}] {version:9} {text}", flush=True)


def run(version: str, step: str, command: list[str], shown: str = "", **variables: str) -> str:
    """Run one step: its output, of which the lines that match ``shown`` are printed as they come.

    Raises:
        Failed: it did not succeed within what is left of the time. The end of its output and the command have been
            printed.
    """
    say(version, step)
    # A constraint of the machine's would put another torch in the place of the one that is tried, even as the package
    # is installed.
    variables = {"PIP_CONSTRAINT": os.devnull, **variables}
    # PYTHONPATH would bring another gradproj in; a build's progress would stay in Python's buffer.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1", **variables}
    left = 60 * OPTIONS.minutes - (time.monotonic() - START)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    clock = threading.Timer(max(left, 0), os.killpg, (process.pid, signal.SIGTERM))
    clock.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if shown and re.search(shown, line):
                say(version, "    " + line.strip()[:110])
        failed = process.wait() != 0
    finally:
        clock.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    if failed:
        error = OutOfTime if process.returncode == -signal.SIGTERM else Failed
        say(version, f"{step}: {error.verdict}; the end of its output:")
        print("\n".join("    | " + line for line in lines[-40:]))
        settings = " ".join(f"{k}={shlex.quote(v)}" for k, v in variables.items())
        say(version, f"again with: cd {shlex.quote(str(ROOT))} && env -u PYTHONPATH {settings} {shlex.join(command)}")
        raise error(step)
    return "\n".join(lines)


def newest_torch(row: Row) -> str:
    """The newest release that pip sees from here."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--disable-pip-version-check"]
    row.torch = newest_in(run(row.torch, "releases of torch", command))
    return row.torch


def newest_in(listing: str) -> str:
    """Of what `pip index versions` prints."""
    available = re.search(r"Available versions: (.*)", listing)
    releases = re.findall(r"\b\d+\.\d+\.\d+", available[1] if available else "")
    if not releases:
        say("newest", "FAILED: pip lists no release of torch")
        raise Failed
    return max(releases, key=numbers)


def numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


def pip_install(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check"]


def environment(version: str) -> Path:
    """The Python of an environment with this torch and what the tests need."""
    home = COMPAT / version
    python = home / "bin" / "python"
    downloads = r"^\s*(Downloading|Processing|Using cached) .*\.(whl|gz)( |$)|^Installing"
    torch = [*pip_install(python), f"torch=={version}", "setuptools>=77,<82"]
    tools = [*pip_install(python), "numpy", "pytest", "hypothesis", "scipy", "safetensors"]
    if not python.exists():
        run(version, f"environment {home.relative_to(ROOT)}", [sys.executable, "-m", "venv", str(home)])
    run(version, "torch, 3 to 6 GB where it is not there yet", torch, downloads)
    run(version, "test tools", tools, downloads)
    return python


def checkout(version: str) -> Path:
    """A folder that looks like a fresh clone, so that nothing built in the working tree takes part."""
    folder = COMPAT / version / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "python", "triton_kernels"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def build(version: str, python: Path, source: Path, library: str, **variables: str) -> str:
    """Install the package; how many seconds it took, and how many seconds of one core."""
    start, cores = time.monotonic(), core_seconds()
    command = [*pip_install(python), "-v", "--no-build-isolation", str(source)]
    # Ubuntu's linker has --as-needed on; elsewhere it has to be asked for.
    shown = r"\(\d+ of \d+\) |\.\.\.  csrc|files? to compile|  built "
    run(version, f"build of the {library} library", command, shown, LDFLAGS="-Wl,--as-needed", **variables)
    return f"{time.monotonic() - start:.0f} s ({core_seconds() - cores:.0f})"


def core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(row: Row, version: str, python: Path, libraries: list[str]) -> dict:
    """Load ``libraries`` and find every kernel in them; what CHECK printed."""
    command = [str(python), "-c", CHECK]
    output = run(version, f"load {' and '.join(libraries)}, ask for the kernels", command, LD_BIND_NOW="1")
    found = json.loads(output.split("found ", 1)[1].splitlines()[0])
    counts = {name: len(found.get(name, [])) for name in libraries}
    row.loaded = " ".join(name for name in libraries if name in found)
    row.kernels = " ".join(f"{count}/{found['ops']}" for count in counts.values())
    problems = [f"no kernel of library {n} for {found['ops'] - c} ops" for n, c in counts.items() if c < found["ops"]]
    if found["torch"].split("+")[0] != version:
        problems.append(f"torch {found['torch']} has taken the place of {version}")
    if not Path(found["folder"]).is_relative_to(COMPAT / version):
        problems.append(f"the gradproj of {found['folder']} was loaded in the place of the one to be tried")
    if problems:
        say(version, "FAILED: " + "; ".join(problems))
        raise Failed
    return found


def fast_tests(row: Row, version: str, python: Path) -> None:
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *FAST_TESTS]
    output = run(version, "fast tests on the CPU", command, r"\[ *\d+%\]", TRITON_INTERPRET="0")
    row.tests = re.findall(r"\d+ passed", output)[-1]
    say(version, row.tests)


def try_torch(row: Row, version: str) -> Installed:
    try:
        python = environment(version)
    except OutOfTime:
        raise
    except Failed as error:
        raise Unavailable from error
    source = checkout(version)
    row.cpu = build(version, python, source, "CPU")
    found = check(row, version, python, ["cpu"])
    if shutil.which("nvcc") is None:
        row.cuda = "no nvcc"
    elif not found["cuda"]:
        row.cuda = "no CUDA in torch"
    else:
        row.cuda = build(version, python, source, "CUDA", GRADPROJ_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
        check(row, version, python, ["cpu", "cuda"])
    fast_tests(row, version, python)
    return Installed(version, python, Path(found["folder"]))


def try_tritons(row: Row, one: Installed) -> None:
    """Every supported Triton compiles every kernel, beside one of the torches."""
    run(one.version, row.torch, [str(one.python), "tests/triton_versions.py"], r"^triton |^FAILED")


def try_wheel(row: Row, oldest: Installed, newest: Installed) -> None:
    """The wheel that is built on one torch, installed beside a later one."""
    folder = COMPAT / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    libraries = ["cpu", "cuda"] if (oldest.package / "_cuda.so").exists() else ["cpu"]
    source = COMPAT / oldest.version / "source"
    command = ["make", "wheel", f"RUN={oldest.python}", f"SOURCE={source}", f"DIST={folder}"]
    cuda = {"GRADPROJ_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"} if len(libraries) > 1 else {}
    run(oldest.version, "wheel", command, r"\.whl", LDFLAGS="-Wl,--as-needed", **cuda)
    (wheel,) = folder.glob("gradproj-*-py3-none-manylinux_*.whl")
    run(newest.version, wheel.name, [*pip_install(newest.python), "--force-reinstall", "--no-deps", str(wheel)])
    run(newest.version, "doctor", [str(newest.python), "-m", "gradproj"], "  (cpu|cuda) ")
    check(row, newest.version, newest.python, libraries)
    fast_tests(row, newest.version, newest.python)


def attempt(row: Row, steps: Callable, *arguments):
    """What ``steps`` return, or None; its row says how it went."""
    try:
        return steps(row, *arguments)
    except Failed as error:
        row.verdict = error.verdict
    return None


def show(rows: list[Row]) -> None:
    titles = Row("torch", "CPU build (core-s)", "CUDA build (core-s)", "loaded", "kernels", "fast tests", "")
    table = [dataclasses.astuple(row) for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    rows, installed = [], []
    newest = Row("newest")
    versions = dict.fromkeys([*VERSIONS, attempt(newest, newest_torch)])
    for version in sorted(versions, key=lambda v: v not in OPTIONS.require):  # time or disk may run out
        rows.append(Row(version) if version else newest)
        one = version and attempt(rows[-1], try_torch, version)
        if one:
            installed.append(one)
    ordered = sorted(installed, key=lambda one: numbers(one.version))
    if ordered:
        rows.append(Row("every Triton"))
        attempt(rows[-1], try_tritons, ordered[-1])
    if len(ordered) > 1:
        first, last = ordered[0], ordered[-1]
        rows.append(Row(f"{last.version}, wheel of {first.version}"))
        attempt(rows[-1], try_wheel, first, last)
    print()
    show(rows)
    missing = [version for version in OPTIONS.require if version not in (one.version for one in installed)]
    if missing:
        print(f"compat: torch {', '.join(missing)} is required and did not run")
    return 1 if missing or any(row.verdict.startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
