"""What the GPU gate runs with gradproj: `gpu_measure.py STEP BACKEND`, each step in a process of its own."""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gradproj
import parameter_lists as lists
import peers
import pinned
from gpu_stages import SITE, tell
from harness import (
    Case,
    Row,
    expected_weights,
    fused,
    is_right,
    make_rows,
    measure,
    measure_captured,
    on_backend,
    project_op,
)
from pinned import PinCase

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16, torch.float16, torch.float64)
# What the arithmetic over the machine code promises of the CUDA kernels on an H100: (field of the row, from, to). A share is
# of the minimal bytes at the bandwidth of a copy in device memory; what L2 holds goes beyond it.
PREDICTED: dict[str, tuple[str, float, float]] = {
    "124M fp32": ("share_of_limit", 0.93, 0.98),
    "124M bf16": ("share_of_limit", 0.92, 0.97),
    "10M fp32": ("share_of_limit", 1.30, 1.50),
    "10M bf16": ("share_of_limit", 1.20, 1.80),
    "300 x 64": ("seconds", 75e-6, 230e-6),
    "600 x 64": ("seconds", 75e-6, 230e-6),
    "300 x 64, captured": ("seconds", 7.5e-6, 12e-6),
    "600 x 64, captured": ("seconds", 7.5e-6, 12e-6),
    "K = 8 fp32": ("share_of_limit", 0.85, 0.92),
    "K = 8 bf16": ("share_of_limit", 0.75, 0.85),
    "K = 32 fp32, Gram known": ("share_of_limit", 0.85, 0.90),
    "K = 32 fp32": ("share_of_limit", 0.19, 0.21),
    "parts fp32": ("share_of_limit", 0.75, 0.85),
    "1B fp32": ("share_of_limit", 0.95, 0.98),
    "1B bf16": ("share_of_limit", 0.94, 0.97),
}
# Of the Triton kernel, on which L2 is the bound: W is read twice, and U twice for every program's rows. NOTES.md has the sum.
PREDICTED_PIN: dict[str, tuple[str, float, float]] = {
    "pin 1B bf16, r = 64": ("share_of_limit", 0.55, 0.75),
    "pin 1B fp32, r = 64": ("share_of_limit", 0.50, 0.70),
    "pin 1B bf16, r = 128": ("share_of_limit", 0.38, 0.55),
    "pin 1B fp32, r = 128": ("share_of_limit", 0.33, 0.48),
}


def cases(quick: bool) -> list[Case]:
    """The most important first. ``quick``: the same ones on small lists."""
    gpt2, large, ten = lists.gpt2_124m(), lists.decoder_1b(), lists.ten_million()
    few, many = lists.uniform(300, 64), lists.uniform(600, 64)
    if quick:
        gpt2 = large = ten = lists.uniform(24, 1000)
        few = many = lists.uniform(30, 64)
    parts = tuple(i // 12 for i in range(len(gpt2)))  # of GPT-2, a block each or nearly
    found = [
        Case("124M fp32", gpt2, rounds=15),
        Case("124M bf16", gpt2, BF16, rounds=15),
        Case("10M fp32", ten, rounds=21),
        Case("10M bf16", ten, BF16, rounds=21),
        Case("300 x 64", few, rounds=21),
        Case("600 x 64", many, rounds=21),
        Case("K = 8 fp32", gpt2, directions=8, rounds=9),
        Case("K = 8 bf16", gpt2, BF16, directions=8, rounds=9),
        Case("K = 32 fp32, Gram known", gpt2, directions=32, rounds=5, gram_dd=True),
        Case("K = 32 fp32", gpt2, directions=32, rounds=3),
        Case("parts fp32", gpt2, rounds=9, parts=parts),
        Case("1B fp32", large, rounds=7),
        Case("1B bf16", large, BF16, rounds=7),
    ]
    return [case._replace(rounds=1) for case in found] if quick else found


def pin_cases(quick: bool) -> list[PinCase]:
    shapes = [(80, 48), (33, 64)] if quick else lists.decoder_1b_linear()
    types = {"bf16": BF16, "fp32": torch.float32}
    return [
        PinCase(f"pin 1B {name}, r = {rank}", shapes, rank, dtype, 1 if quick else 5)
        for rank, (name, dtype) in itertools.product((64, 128), types.items())
    ]


def judged(row: Row, error: str = "") -> dict[str, Any]:
    """The row with what was predicted of it and whether that came true."""
    of_backend = {"cuda": PREDICTED, "triton": PREDICTED_PIN}.get(row.backend, {})
    quantity, *bounds = of_backend.get(row.case) or PREDICTED.get(row.case, ("share_of_limit",))
    measured = row._asdict()[quantity]
    predicted = bounds if row.case in of_backend else None
    inside = predicted and measured is not None and predicted[0] <= measured <= predicted[1]
    judgement = {"quantity": quantity, "predicted": predicted, "measured": measured, "inside": inside}
    return {**row._asdict(), **judgement, "error": error}


Job = tuple[Case | PinCase, Callable[[], Row]]


def jobs(backend: str, device: str, quick: bool) -> list[Job]:
    """Every row but torch.compile's. Triton's are without the compositions, which stand beside the CUDA kernels, but with
    ``pin_``, of which there is no CUDA kernel."""

    def eager(case: Case) -> Job:
        composed = backend != "triton" and case.directions <= 8 and not case.parts
        return case, lambda: measure(case, peers.EAGER if composed else {}, device, backend)

    def captured(case: Case) -> Job:
        case = case._replace(name=f"{case.name}, captured")
        return case, lambda: measure_captured(case, backend)

    def pin(case: PinCase) -> Job:
        return case, lambda: pinned.measure(case, device, backend)

    found = cases(quick)
    pins = [pin(case) for case in pin_cases(quick) if backend != "cuda"]
    small = [case for case in found if " x 64" in case.name]
    return [*pins, *map(eager, found), *(captured(case) for case in small if device == "cuda")]


def compiled_jobs(backend: str, device: str, quick: bool) -> list[Job]:
    """Beside what torch.compile makes of plain torch. Without a GPU that is traced only, to spare half a minute of g++."""
    compiled = torch.compile(peers.device_coefficient, backend="inductor" if device == "cuda" else "eager")

    def beside(case: Case) -> Job:
        case = case._replace(name=f"{case.name}, torch.compile")
        return case, lambda: measure(case, {"torch.compile": lambda g, d: compiled(g, d)}, device, backend)

    return [beside(case) for case in cases(quick) if case.name.startswith("124M")]


def tell_rows(todo: list[Job], backend: str) -> int:
    """Tells every row as soon as it is there. One that fails is told too, and the next is tried."""
    failed = 0
    for case, job in todo:
        try:
            row, error = job(), ""
        except Exception as caught:  # noqa: BLE001  whatever it is, the next row may do better
            traceback.print_exc(limit=-3)
            row, error = Row(case.name, backend, 0, []), f"{type(caught).__name__}: {caught}".split("\n", 1)[0]
        tell(row=judged(row, error))
        failed += bool(error or row.wrong)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


def load(backend: str) -> int:
    """Whether the backend is there, and is the one that was built."""
    package = Path(gradproj.__file__).resolve()
    print(f"gradproj: {package}")
    if not package.is_relative_to(SITE):
        print(f"not the one that was built, which is in {SITE}")
        return 1
    found = gradproj.backends()[backend]
    print(f"backend {backend}: {found.reason or 'available'}")
    return 0 if found.available else 1


def smoke(backend: str, device: str) -> int:
    """Right results for every dtype and for one, a few and many directions."""
    wrong = []
    for dtype, k in itertools.product(DTYPES, (1, 3, 8, 12)):
        case = Case(f"{dtype}, K = {k}", [(300, 40), (17,), (), (5000,)], dtype, k)
        grads, directions, *_ = make_rows(case, device)
        if not is_right(on_backend(backend, fused), case, grads, directions, expected_weights(case, grads, directions)):
            wrong.append(case.name)
    print(f"wrong: {wrong}" if wrong else "16 small projections are right")
    return 1 if wrong else 0


def sanitize(backend: str, device: str) -> int:
    """Short, for compute-sanitizer: every kernel on rows of every layout."""

    def project(row, k, dtype=torch.float32, method="orthogonal", gram_dd=False, parts=()):
        g, *ds = [row(dtype, device, r) for r in range(k + 1)]
        if gram_dd or parts:
            project_op(backend, g, ds, method, gradproj.gram(*ds) if gram_dd else None, parts)
        else:
            gradproj.project_(g, *ds, method=method)
        assert all(bool(t.cpu().isfinite().all()) for t in g), (row.__name__, k, dtype, method, gram_dd, parts)

    with gradproj.use_backend(backend):
        for row, k in itertools.product((dense, awkward), (1, 8, 12)):
            for dtype in DTYPES:
                project(row, k, dtype)
            for method in ("conflict", "pcgrad", ("mix", 0.5)):
                project(row, k, method=method)
            project(row, k, gram_dd=True)
            project(row, k, parts=(0, 1, 1, 3))
    print("54 projections went through")
    return 0


def dense(dtype: torch.dtype, device: str, row: int) -> list[torch.Tensor]:
    return [torch.randn(n).to(device, dtype) for n in (4100, 3, 64, 1)]


def awkward(dtype: torch.dtype, device: str, row: int) -> list[torch.Tensor]:
    """Off the 16-byte boundaries, transposed in every second row, of another dtype, with gaps."""

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    matrix = values(8, 9).t() if row % 2 else values(9, 8)
    return [values(700)[1:], matrix, values(2050).to(BF16), values(6, 10)[:, ::2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["load", "smoke", "rows", "compiled-rows", "sanitize"])
    parser.add_argument("backend", choices=["cpu", "cuda", "triton"])
    parser.add_argument("--quick", action="store_true", help="small lists")
    options = parser.parse_args()
    backend, quick = options.backend, options.quick
    device = "cpu" if backend == "cpu" else "cuda"
    torch.manual_seed(0)
    if options.step == "load":
        return load(backend)
    if options.step == "rows":
        return tell_rows(jobs(backend, device, quick), backend)
    if options.step == "compiled-rows":
        return tell_rows(compiled_jobs(backend, device, quick), backend)
    return {"smoke": smoke, "sanitize": sanitize}[options.step](backend, device)


if __name__ == "__main__":
    sys.exit(main())
