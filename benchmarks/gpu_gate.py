"""Everything that needs a GPU, in two calls of under 9 minutes each that lose nothing: `python benchmarks/gpu_gate.py`,
then the same with `--second`.

Stages, each a process of its own. First machine, package, measure-pin, build, load, smoke and what else is measured:
measure-cuda, measure-triton, measure-compiled. Second, after a build that is there: tests, memcheck, racecheck. A
stage that fails keeps only those from running that are nothing without it. One deadline holds for a call; a stage
that is late is ended with everything that it started. Results go to gpu_gate_DEVICE_TIME.json, and all output to the
.log beside it, in $OUT, else in benchmarks/results: after every row and every stage, so that even a kill costs only
what was running.

Exit code: 0 everything passed; 1 something failed or was skipped; 2 nothing was run: wrong usage, or no CUDA device.

Needs torch, numpy, setuptools, nvcc and a C++20 compiler; for the tests pytest and hypothesis. No network, pip or git.
The checkout is only read, but for build/gpu_gate. `--device cpu --quick` goes the same way without a GPU, on small
lists.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # the checkout is only read

from gpu_build import TRITON
from gpu_stages import SITE, WORK, Gate, Record, Stage, open_record, say

HERE = Path(__file__).resolve().parent


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / name), *arguments]


def first_stage(device: str) -> Stage:
    return Stage("machine", 60, script("machine.py", device))


def stages(options: argparse.Namespace, machine: dict[str, str]) -> list[Stage]:
    """Those of this call, or of both for --only. The worst case of all up to measure-cuda fits the default deadline."""
    library = [word for path in options.library or () for word in ("--library", str(path.absolute()))]
    arch = machine.get("capability", "")
    build = script("gpu_build.py", "--device", options.device, "--arch", arch, "--no-triton", *library)
    load = script("gpu_measure.py", "load", options.device)
    limit = 150 if options.device == "cuda" else 300  # a machine with a GPU has more than two cores
    quick = ["--quick"] if options.quick else []
    found = [Stage("build", limit, build), Stage("load", 30, load, needs="build")]
    if options.device == "cuda" and (options.only or not options.second):  # Triton's pins wait for no compiler
        package = Stage("package", 10, script("gpu_build.py", "--package"))
        pins = Stage("measure-pin", 80, script("gpu_measure.py", "pins", "triton", *quick), needs="package")
        found = [package, pins, *found]
    if options.only or not options.second:
        found += measurements(options.device, quick)
    if options.only or options.second:
        found += checks(options.device, machine)
    return found


def measurements(device: str, quick: list[str]) -> list[Stage]:
    """The first call's, by value."""
    on_gpu = device == "cuda"
    rows = script("gpu_measure.py", "rows", device, *quick)
    pins = Stage("measure-pin", 100, script("gpu_measure.py", "pins", device, *quick))
    triton = Stage("measure-triton", 120, script("gpu_measure.py", "rows", "triton", *quick))
    return [
        Stage("smoke", 70, script("gpu_measure.py", "smoke", device), needs="load"),
        *([] if on_gpu else [pins]),
        Stage(f"measure-{device}", 120, rows, needs="load"),
        *([triton] if on_gpu else []),
        Stage("measure-compiled", 120, script("gpu_measure.py", "compiled-rows", device, *quick), "load"),
    ]


def checks(device: str, machine: dict[str, str]) -> list[Stage]:
    """The second call's."""
    one_thread = (("OMP_NUM_THREADS", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1"))  # in each of many processes
    plugin = ("PYTHONPATH", with_path(SITE, HERE))
    sanitize = script("gpu_measure.py", "sanitize", device)
    sanitizers = [Stage("sanitize", 60, sanitize, needs="load")]
    if device == "cuda":
        uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # the allocator's cache hides what lies beyond a tensor
        sanitizers = [Stage(t, 100, [*sanitizer(t), *sanitize], "load", uncached) for t in ("memcheck", "racecheck")]
    return [Stage("tests", 150, tests(device, machine), environment=(plugin, *one_thread)), *sanitizers]


def sanitizer(tool: str) -> list[str]:
    """Errors of kernels only: torch asks the driver for what an older one does not have, and lives with a no."""
    return ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99"]


def tests(device: str, machine: dict[str, str]) -> list[str]:
    """The tests that need a GPU; without one, a few that show that they are found and run."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "pytest_gate"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # they write into the checkout
    command += ["--continue-on-collection-errors"]  # a module that misses a package costs itself only
    workers = min(14, (os.cpu_count() or 1) - 2)
    if machine.get("pytest-xdist", "missing") != "missing" and workers > 1:
        command += ["-n", str(workers)]
    if device == "cuda":
        return [*command, "-m", "gpu", "tests"]
    return [*command, "-m", "not gpu", "-k", "every_number_of_rows and cpu", "tests/test_gram.py"]


def with_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def make_environment(commit: str) -> dict[str, str]:
    """Of all stages: the site in front of what is there already, and every cache inside build/gpu_gate."""
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin",
        "PYTHONPATH": with_path(SITE),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(WORK / "hypothesis"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "TRITON_CACHE_DIR": str(TRITON),
    }
    environment.pop("TRITON_INTERPRET", None)
    if commit:
        environment["GRADPROJ_COMMIT"] = commit
    return environment


def quantity(name: str, value: float) -> str:
    if name != "seconds":
        return f"{value:.0%}"
    return f"{value * 1e3:.2f} ms" if value > 2e-3 else f"{value * 1e6:.1f} us"


def verdict(row: dict[str, Any]) -> list[str]:
    """[predicted, measured, whether the one is inside the other]"""
    name, value, predicted = row["quantity"], row["measured"], row["predicted"]
    measured = "" if value is None else quantity(name, value)
    if predicted is None:
        return ["", measured, ""]
    bounds = " to ".join(quantity(name, bound) for bound in predicted)
    return [bounds, measured, "inside" if row["inside"] else "not measured" if value is None else "OUTSIDE"]


def show(told: dict[str, Any]) -> str:
    """What a stage told, for the terminal."""
    if "row" not in told:
        return "\n".join(f"   {name}: {value}" for name, value in told.get("machine", told).items())
    row = told["row"]
    start = f"   {row['case']}, {row['backend']}: "
    if row["error"]:
        return start + row["error"]
    predicted, measured, inside = verdict(row)
    wrong = [f"wrong: {', '.join(row['wrong'])}"] if row["wrong"] else []
    return start + "; ".join([measured, *([f"predicted {predicted}: {inside}"] if predicted else []), *wrong])


def table(rows: list[dict[str, Any]]) -> str:
    """Share: of the minimal bytes at the bandwidth of a copy. Host: time to enqueue one call."""
    heads = ["case", "backend", "predicted", "measured", "", "time", "host", "x naive", "x best torch", "extra MiB"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        if row["error"]:
            lines.append([row["case"], row["backend"], "", row["error"][:60], *[""] * 6])
            continue
        seconds = [quantity("seconds", row[n]) if row[n] is not None else "" for n in ("seconds", "host_seconds")]
        figures = row["times_naive"], row["times_best_torch"], row["extra_bytes"] and row["extra_bytes"] / 2**20
        others = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        lines.append([row["case"], row["backend"], *verdict(row), *seconds, *others])
        if row["wrong"]:
            lines.append(["", "", "", f"wrong: {', '.join(row['wrong'])}", *[""] * 6])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(record: Record) -> str:
    content = record.content
    machine = content["machine"]
    lines = [f"{machine['machine']}; torch {machine['torch']}; {machine['date']}; commit {machine['commit']}"]
    lines += ["Small lists stand in for the named ones."] if content["quick"] else []
    lines += ["", table(content["rows"])] if content["rows"] else []
    results = [f"{s['name']:16} {s['result']}, {s['seconds']:.0f} s" for s in content["stages"]]
    return "\n".join([*lines, "", *results, f"written: {record.path}"])


def stop(number: int, frame) -> None:
    raise SystemExit(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small lists")
    parser.add_argument("--deadline", type=float, default=530, help="seconds for everything")
    parser.add_argument("--second", action="store_true", help="the second call: tests and sanitizers")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these, of either call, after machine and build")
    parser.add_argument("--results", type=Path, help="folder; default: $OUT, else benchmarks/results")
    parser.add_argument("--commit", default="", help="for a copy without git")
    parser.add_argument("--library", type=Path, action="append", help="take this one instead of building")
    options = parser.parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)

    names = [stage.name for stage in stages(options, {})]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: no stage {', '.join(unknown)}; there are {', '.join(names)}")

    chosen = options.results or Path(os.environ.get("OUT") or HERE / "results")
    facts = {"device": options.device, "quick": options.quick, "deadline": options.deadline}
    record = open_record([chosen, WORK, Path(tempfile.gettempdir())], facts)
    gate = Gate(record, options.deadline, make_environment(options.commit), show)
    gate.run(first_stage(options.device))
    machine = record.content["machine"]
    if not machine:
        return 2
    try:
        for stage in stages(options, machine):
            if not options.only or stage.name in ("package", "build", *options.only):
                gate.run(stage)
    finally:
        say(summary(record))
    return 0 if all(result == "passed" for result in gate.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
