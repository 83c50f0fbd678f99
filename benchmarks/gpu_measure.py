"""What the GPU gate runs with gradproj: `gpu_measure.py STEP BACKEND`, each step in a process of its own."""

import argparse
import copy
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradproj
import harness
import parameter_lists as lists
import peers
import pin_model
import pinned
from gpu_predicted import GPUS, OF_PROJECTIONS, PREDICTED, Gpu
from gpu_stages import SITE, tell
from gradproj import reference
from gradproj.kernels.backends import select
from gradproj.nullspace.basis import spaced
from gradproj.rows.functional import split_basis
from harness import Case, Row
from machine import device_name
from pinned import PinCase

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16, torch.float16, torch.float64)


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
    """The default share means 205 ranks of 4,096 inputs."""
    models = {"LLaMA-7B": lists.llama_7b_linear(), "Qwen3-30B-A3B": lists.qwen3_30b_linear()}
    types = {"bf16": BF16, "fp32": torch.float32}
    found = []
    for (of, dtype), (name, shapes), r in itertools.product(types.items(), models.items(), (256, 64, 205, 128, 512)):
        small = [(80, 48), (33, 64)] if quick else shapes
        found.append(PinCase(f"pin {name} {of}, r = {r}", small, r, dtype, 1 if quick else 5))
    return found


def judged(row: Row, error: str = "", gpu: Gpu | None = None, case: Case | PinCase | None = None) -> dict[str, Any]:
    """The row with what was predicted of it on this GPU, and whether that came true."""
    found = PREDICTED.get(row.backend, {}).get(row.case)
    like = found or OF_PROJECTIONS.get(row.case)
    quantity = like.quantity if like else "share_of_limit"
    measured = row._asdict()[quantity]
    predicted = found.on(gpu) if found and gpu else None
    if isinstance(case, PinCase) and gpu and row.backend == "triton":
        predicted = pin_model.share(case.shapes, case.rank, case.dtype, gpu)
    inside = predicted and measured is not None and predicted[0] <= measured <= predicted[1]
    judgement = {"quantity": quantity, "predicted": predicted, "measured": measured, "inside": inside}
    return {**row._asdict(), **judgement, "error": error}


Job = tuple[Case | PinCase, Callable[[], Row]]


def jobs(backend: str, device: str, quick: bool) -> list[Job]:
    """Every row of a projection but torch.compile's. Triton's are without the compositions, which stand beside the CUDA
    kernels."""
    found: list[Job] = []
    for case in cases(quick):
        composed = backend != "triton" and case.directions <= 8 and not case.parts
        found.append((case, partial(harness.measure, case, peers.EAGER if composed else {}, device, backend)))
    for case in cases(quick):
        if " x 64" in case.name and device == "cuda":
            captured = case._replace(name=f"{case.name}, captured")
            found.append((captured, partial(harness.measure_captured, captured, backend)))
    return found


def pin_jobs(backend: str, device: str, quick: bool) -> list[Job]:
    return [(case, partial(pinned.measure, case, device, backend)) for case in pin_cases(quick)]


def compiled_jobs(backend: str, device: str, quick: bool) -> list[Job]:
    """Beside what torch.compile makes of plain torch. Without a GPU that is traced only, to spare half a minute of
    g++."""
    compiled = torch.compile(peers.device_coefficient, backend="inductor" if device == "cuda" else "eager")
    peer = {"torch.compile": lambda g, d: compiled(g, d)}
    named = [c._replace(name=f"{c.name}, torch.compile") for c in cases(quick) if c.name.startswith("124M")]
    found: list[Job] = [(case, partial(harness.measure, case, peer, device, backend)) for case in named]
    pins = [c._replace(name=f"{c.name}, torch.compile") for c in pin_cases(quick) if "LLaMA" in c.name and c.rank == 64]
    on = "triton" if device == "cuda" else backend
    return found + [(case, partial(pinned.measure, case, device, on, compiled=True)) for case in pins]


def tell_rows(todo: list[Job], backend: str) -> int:
    """Tells every row as soon as it is there. One that fails is told too, and the next is tried."""
    failed = 0
    gpu = GPUS.get(device_name("cuda"))
    for case, job in todo:
        try:
            row, error = job(), ""
        except Exception as caught:  # noqa: BLE001  whatever it is, the next row may do better
            traceback.print_exc(limit=-3)
            row, error = Row(case.name, backend, 0, []), f"{type(caught).__name__}: {caught}".split("\n", 1)[0]
        tell(row=judged(row, error, gpu, case))
        failed += bool(error or row.wrong)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


class Kernels:
    """Triton's listener: how many kernels it has compiled, and how many it found compiled."""

    compiled = found = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.compiled, self.found = self.compiled + (not cache_hit), self.found + cache_hit

    def __str__(self) -> str:
        return f"{self.compiled} kernels compiled, {self.found} found compiled"


def count_kernels() -> Kernels:
    """From now on."""
    from triton import knobs

    knobs.compilation.listener = counted = Kernels()
    return counted


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
        grads, directions, *_ = harness.make_rows(case, device)
        run, weights = harness.on_backend(backend, harness.fused), harness.expected_weights(case, grads, directions)
        if not harness.is_right(run, case, grads, directions, weights):
            wrong.append(case.name)
    print(f"wrong: {wrong}" if wrong else "16 small projections are right")
    pins = wrong_pins(device)
    print(f"wrong: {pins}" if pins else f"{len(small_pins(device))} small pins are right", f"({pin_backend(device)})")
    return 1 if wrong or pins else 0


def pin_backend(device: str) -> str:
    return select(device, "pin_").name


class Pin(NamedTuple):
    name: str
    weight: torch.Tensor
    basis: torch.Tensor
    target: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def small_pins(device: str) -> list[Pin]:
    """One of every form that the kernel is compiled for, with less than a program's rows and columns at the ends."""
    rng = torch.Generator().manual_seed(0)

    def pin(name: str, weight: torch.Tensor, rank: int, target: bool = True, bias: bool = False, pair: bool = True):
        outputs, inputs = weight.shape
        basis = torch.linalg.qr(torch.randn(inputs + bias, rank, generator=rng, dtype=torch.float64)).Q.float()
        basis = spaced(basis).to(device)  # as a null space holds it
        basis = split_basis(basis) if weight.dtype == BF16 and pair else basis
        b = torch.randn(outputs, rank, generator=rng).to(device) if target else None
        c = torch.randn(outputs, generator=rng).to(device, weight.dtype) if bias else None
        return Pin(f"{name}, {str(weight.dtype).removeprefix('torch.')}", weight, basis, b, c)

    def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    return [
        *(pin(f"r = {r}", values(dtype, 130, 208), r) for dtype in (BF16, torch.float32) for r in (64, 100, 200)),
        pin("float32 basis", values(BF16, 130, 208), 64, pair=False),
        pin("tails", values(BF16, 70, 37), 9),
        pin("bias", values(BF16, 70, 64), 20, bias=True),
        pin("bias, of a gradient", values(torch.float32, 33, 64), 20, target=False, bias=True),
        pin("transposed", values(BF16, 208, 144).T, 64),
        pin("transposed", values(torch.float32, 208, 144).T, 64),
        pin("strided", values(torch.float32, 70, 90)[:, ::2], 32),
    ]


def run_pins(device: str) -> tuple[list[Pin], list[Pin]]:
    """Before and after one call for all."""
    before = small_pins(device)
    after = copy.deepcopy(before)  # with the same strides, which ``clone`` would make dense
    gradproj.pin_(*(list(column) for column in list(zip(*after, strict=True))[1:]))
    return before, after


def wrong_pins(device: str) -> list[str]:
    """Against float64, element by element: a tail that was forgotten is little of the whole."""
    wrong = []
    for p, result in zip(*run_pins(device), strict=True):
        basis = p.basis.sum(0, dtype=torch.float32) if p.basis.dim() == 3 else p.basis
        weight, bias, _ = reference.oracle_pin(p.weight, basis, p.target, p.bias)
        pairs = [(result.weight, weight), *([(result.bias, bias)] if p.bias is not None else [])]
        for found, exact in pairs:
            exact = torch.from_numpy(exact)
            if not (found.double().cpu() - exact).abs().max() <= harness.TOLERANCE[found.dtype] * exact.abs().max():
                wrong.append(p.name)
    return wrong


def sanitize(backend: str, device: str) -> int:
    """Short, for compute-sanitizer: every kernel on rows of every layout."""

    def project(row, k, dtype=torch.float32, method="orthogonal", gram_dd=False, parts=()):
        g, *ds = [row(dtype, device, r) for r in range(k + 1)]
        if gram_dd or parts:
            harness.project_op(backend, g, ds, method, gradproj.gram(*ds) if gram_dd else None, parts)
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
    _, after = run_pins(device)
    assert all(bool(p.weight.cpu().isfinite().all()) for p in after)
    print(f"{len(after)} pins went through ({pin_backend(device)})")
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
    parser.add_argument("step", choices=["load", "smoke", "pins", "rows", "compiled-rows", "sanitize"])
    parser.add_argument("backend", choices=["cpu", "cuda", "triton"])
    parser.add_argument("--quick", action="store_true", help="small lists")
    options = parser.parse_args()
    backend, quick = options.backend, options.quick
    device = "cpu" if backend == "cpu" else "cuda"
    torch.manual_seed(0)
    kernels = count_kernels() if device == "cuda" and importlib.util.find_spec("triton") else None
    steps: dict[str, Callable[[], int]] = {
        "load": partial(load, backend),
        "smoke": partial(smoke, backend, device),
        "pins": lambda: tell_rows(pin_jobs(backend, device, quick), backend),
        "rows": lambda: tell_rows(jobs(backend, device, quick), backend),
        "compiled-rows": lambda: tell_rows(compiled_jobs(backend, device, quick), backend),
        "sanitize": partial(sanitize, backend, device),
    }
    code = steps[options.step]()
    if kernels and str(kernels) != str(Kernels()):
        print(f"Triton: {kernels}")
    return code


if __name__ == "__main__":
    sys.exit(main())
