"""Everything that needs a GPU, in one call of less than 8 minutes: `python benchmarks/gpu_gate.py`.

Builds the CUDA kernels, runs the tests marked gpu, runs compute-sanitizer on a short case, measures, and writes
benchmarks/results/gpu_NAME.json and a table. A stage that fails is recorded and the next one runs; the exit code is 0 if all
passed, 1 if one did not, 2 if there is no CUDA device. Needs torch, numpy, pytest, hypothesis and nvcc; no network.
`--device cpu --quick` goes through the same measurements on small sizes without a GPU.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Stage(NamedTuple):
    """One step of the gate. ``output`` is the end of what it printed."""

    name: str
    passed: bool
    seconds: float
    output: str


def run_stage(name: str, command: list[str], limit: float, environment: dict[str, str]) -> Stage:
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env=environment,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        passed, output = done.returncode == 0, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        passed, output = False, (error.stdout or b"").decode(errors="replace") + f"\nstopped after {limit:.0f} s"
    except FileNotFoundError as error:
        passed, output = False, str(error)
    stage = Stage(name, passed, time.perf_counter() - start, output[-6000:])
    print(f"   {'passed' if passed else 'FAILED'} in {stage.seconds:.0f} s", flush=True)
    if not passed:
        print(output[-3000:], flush=True)
    return stage


# --- measurements, in a process of their own -------------------------------------------------------------------------


def cases(quick: bool) -> list:
    import parameter_lists as lists
    from harness import Case

    if quick:
        small = lists.uniform(20, 5000)
        return [Case("124M fp32", small), Case("124M bf16", small, torch.bfloat16), Case("K = 8", small, directions=8)]
    gpt2, large = lists.gpt2_124m(), lists.decoder_1b()
    return [
        Case("124M fp32", gpt2, rounds=15),
        Case("124M bf16", gpt2, torch.bfloat16, rounds=15),
        Case("1B fp32", large, rounds=9),
        Case("1B bf16", large, torch.bfloat16, rounds=9),
        Case("10M fp32", lists.ten_million(), rounds=21),
        Case("10M bf16", lists.ten_million(), torch.bfloat16, rounds=21),
        Case("K = 8", gpt2, directions=8, rounds=9),
        Case("300 x 64", lists.uniform(300, 64), rounds=21),
    ]


def captured_seconds(backend: str) -> float:
    """300 tensors of 64 elements, replayed from a CUDA graph."""
    import gradproj
    import parameter_lists as lists

    grads = [torch.randn(s, device="cuda") for s in lists.uniform(300, 64)]
    direction = [torch.randn_like(g) for g in grads]
    with gradproj.use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            gradproj.project_(grads, direction)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradproj.project_(grads, direction)
    times = []
    for _ in range(21):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(100):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / 100)
    return statistics.median(times)


def measure(device: str, quick: bool) -> dict[str, Any]:
    """All rows on every backend of the device, and the targets."""
    import gradproj
    import peers
    from harness import machine
    from harness import measure as measure_row

    backends = gradproj.backends()
    names = [n for n in (("cuda", "triton") if device == "cuda" else ("cpu",)) if backends[n].available]
    rows: dict[str, dict[str, Any]] = {}
    captured: dict[str, float] = {}
    compiled = torch.compile(peers.device_coefficient)
    for case in cases(quick):
        for name in names:
            contenders = dict(peers.EAGER)
            if case.directions == 1 and case.name in ("124M fp32", "124M bf16"):
                contenders["torch.compile"] = lambda g, d: compiled(g, d)
            row = measure_row(case, contenders, device, name)
            rows.setdefault(case.name, {})[name] = row._asdict()
            print(json.dumps(row._asdict()), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    if device == "cuda":
        captured = {name: captured_seconds(name) for name in names}
    return {"machine": machine(device), "rows": rows, "captured": captured, "targets": targets(rows, captured)}


def targets(rows: dict[str, dict[str, Any]], captured: dict[str, float]) -> list[dict[str, Any]]:
    """What is aimed at on an H100-class GPU, and whether it was met. A target without its measurement is not met."""
    found = []

    def aim(name: str, value, goal: float, at_least: bool):
        met = value is not None and (value >= goal if at_least else value <= goal)
        found.append({"target": name, "value": value, "goal": f"{'>=' if at_least else '<='} {goal:g}", "met": met})

    def get(case: str, field: str, backend: str = "cuda"):
        return rows.get(case, {}).get(backend, {}).get(field)

    for case in ("124M fp32", "124M bf16", "1B fp32", "1B bf16"):
        aim(f"{case}: share of the copy bandwidth", get(case, "share_of_limit"), 0.9, True)
        aim(f"{case}: times naive", get(case, "times_naive"), 4, True)
        aim(f"{case}: times the best of plain torch", get(case, "times_best_torch"), 1.5, True)
        cuda, triton = get(case, "seconds"), get(case, "seconds", "triton")
        aim(f"{case}: Triton's time over CUDA's", triton / cuda if cuda and triton else None, 1.1, False)
    for case in ("10M fp32", "10M bf16"):
        aim(f"{case}: share of 5 N over DRAM bandwidth (L2)", get(case, "share_of_limit"), 1.0, True)
    aim("K = 8: share of the copy bandwidth", get("K = 8", "share_of_limit"), 0.85, True)
    aim("300 x 64: eager seconds", get("300 x 64", "seconds"), 80e-6, False)
    aim("300 x 64: captured seconds", captured.get("cuda"), 10e-6, False)
    extra = [r["extra_bytes"] for b in rows.values() for r in b.values() if r["extra_bytes"] is not None]
    aim("extra device memory, bytes, worst case", max(extra) if extra else None, 1 << 20, False)
    return found


def sanitize_case(device: str) -> None:
    """Short, and touches every kernel: dense, strided, mixed, misaligned, K = 1, 8 and 12, every method, every form of a row."""
    import gradproj

    def rows(count, dtype=torch.float32):
        return [
            [
                torch.randn(700, device=device).to(dtype)[1:],
                torch.randn(8, 9, device=device).to(dtype).t(),
                torch.randn(2050, device=device).to(torch.bfloat16),
                torch.randn(3, device=device).to(dtype),
            ]
            for _ in range(count)
        ]

    for name in ("cuda",) if device == "cuda" else ("cpu",):
        with gradproj.use_backend(name):
            for dtype in (torch.float32, torch.float64, torch.float16):
                for k in (1, 8, 12):
                    for method in ("orthogonal", "conflict", "pcgrad", ("mix", 0.5)):
                        g, *ds = rows(k + 1, dtype)
                        ds[0][1] = ds[0][1].contiguous()
                        info = gradproj.project_(g, *ds, method=method)
                        assert bool(info.finite)
                    base, g, *ds = rows(k + 2, dtype)
                    ds[-1] = gradproj.float8.quantize(ds[-1])
                    info = gradproj.project_(g, *ds, base=base, parts=[0, 1, 1, 2])
                    assert bool(info.finite)


# --- the gate -----------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> str:
    from harness import Row, table

    lines = []
    for name in sorted({n for by_backend in result["rows"].values() for n in by_backend}):
        picked = [Row(**by_backend[name]) for by_backend in result["rows"].values() if name in by_backend]
        lines += [f"backend {name}", "", table(picked, result["machine"]), ""]
    lines += ["| target | measured | goal | met |", "| --- | ---: | ---: | --- |"]
    for t in result["targets"]:
        value = "not measured" if t["value"] is None else f"{t['value']:.4g}"
        lines.append(f"| {t['target']} | {value} | {t['goal']} | {'yes' if t['met'] else 'no'} |")
    return "\n".join(lines)


def gate(device: str, quick: bool, results: Path) -> int:
    site = Path(tempfile.mkdtemp(prefix="gradproj_gate_"))
    python = sys.executable
    environment = {**os.environ, "PYTHONPATH": str(site), "GRADPROJ_CUDA": "1" if device == "cuda" else "0"}
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
        ".",
    ]
    stages = [run_stage("build", install, 240, environment)]
    measured = site / "measured.json"
    script = [python, str(HERE / "gpu_gate.py"), "--device", device, *(["--quick"] if quick else [])]
    if stages[0].passed:
        if device == "cuda":
            tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
            stages.append(run_stage("tests", tests, 150, environment))
            for tool in ("memcheck", "racecheck"):
                checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *script, "--sanitize-case"]
                uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                stages.append(run_stage(tool, checked, 90, uncached))
        else:
            stages.append(run_stage("sanitize case", [*script, "--sanitize-case"], 90, environment))
        stages.append(run_stage("measure", [*script, "--measure", str(measured)], 240, environment))
    result: dict[str, Any] = {"machine": {}, "rows": {}, "captured": {}, "targets": []}
    if measured.exists():
        result = json.loads(measured.read_text())
    result["stages"] = [s._asdict() for s in stages]
    shutil.rmtree(site)
    results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", result["machine"].get("machine", device)).strip("_").lower()
    target = results / f"{'gpu' if device == 'cuda' else 'dry'}_{name}.json"
    target.write_text(json.dumps(result, indent=1))
    if result["rows"]:
        print(f"\n{show(result)}")
    for s in stages:
        print(f"{'passed' if s.passed else 'FAILED'}  {s.name}  {s.seconds:.0f} s")
    print(f"written: {target}")
    return 0 if all(s.passed for s in stages) and result["rows"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--measure", type=Path, help="only measure, into this file")
    parser.add_argument("--sanitize-case", action="store_true", help="only run the short case for compute-sanitizer")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_gate: torch sees no CUDA device; run it on a machine with one, or try --device cpu --quick")
        return 2
    if options.sanitize_case:
        sanitize_case(options.device)
    elif options.measure:
        options.measure.write_text(json.dumps(measure(options.device, options.quick)))
    else:
        return gate(options.device, options.quick, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
