"""Compiles the Triton kernels that the GPU gate launches, without a GPU: gpu_compile.py ARCH, into $TRITON_CACHE_DIR.

Triton finds them again where the kernels' source, Triton's own files, ptxas and the architecture are the same. Its
compiled part differs from one minor version of Python to the next, so that has to be the same too. `gpu_build.py` runs
this.
"""

import sys
import traceback
from collections.abc import Callable
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import gpu_measure
import harness
from gradproj.triton_kernels.gram import gram
from gradproj.triton_kernels.pin import pin_
from gradproj.triton_kernels.project import project_
from pinned import PinCase


class Device:
    """What the launcher asks before it compiles."""

    def __init__(self, arch: str):
        major, minor = arch.split(".")
        self.target = GPUTarget("cuda", 10 * int(major) + int(minor), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def project(case: harness.Case) -> None:
    """The launches of a row. Nothing is read or written, so that no page of its lists is ever there."""
    with mock.patch.object(Tensor, "normal_", lambda t, **_: t):
        rows = harness.make_rows(case, "cpu")
    flat = [t for d in rows.directions for t in d]
    gram_dd = gram(flat, case.directions) if case.gram_dd else None
    parts = max(case.parts) + 1 if case.parts else 0
    project_(rows.grads, flat, "orthogonal", 0.0, 0.0, gram_dd, case.parts, parts)


def pin_large(case: PinCase) -> None:
    shapes = [(outputs, inputs, min(case.rank, inputs)) for outputs, inputs in sorted(set(case.shapes))]
    weights = [torch.empty(o, i, dtype=case.dtype) for o, i, _ in shapes]
    pair = (2,) if case.dtype == torch.bfloat16 else ()
    kind = torch.bfloat16 if pair else torch.float32
    bases = [torch.empty(*pair, r, i, dtype=kind).mT for _, i, r in shapes]
    pin_(weights, bases, [torch.empty(o, r) for o, _, r in shapes], [], [])


def pin_small() -> None:
    weights, bases, targets, biases = map(list, list(zip(*gpu_measure.small_pins("cpu"), strict=True))[1:])
    biased = [i for i, b in enumerate(biases) if b is not None]
    pin_(weights, bases, targets, [biases[i] for i in biased], biased)


def everything() -> dict[str, Callable[[], None]]:
    pins = {case.name: lambda case=case: pin_large(case) for case in gpu_measure.pin_cases(quick=False)}
    rows = {case.name: lambda case=case: project(case) for case in gpu_measure.cases(quick=False)}
    return {"small pins": pin_small, **pins, **rows}


def compile_only(launch: Callable) -> Callable:
    """Returns nothing, as Triton's interpreter does: the kernel would be loaded."""

    def compiled(self, *args, warmup: bool, **kwargs) -> None:
        launch(self, *args, warmup=True, **kwargs)

    return compiled


def main(arch: str, names: list[str]) -> int:
    driver.set_active(Device(arch))
    failed = []
    found = gpu_measure.count_kernels()
    with mock.patch.object(JITFunction, "run", compile_only(JITFunction.run)):
        for name, launch in everything().items():
            if names and name not in names:
                continue
            try:
                launch()
            except Exception:  # noqa: BLE001  the others may compile
                traceback.print_exc(limit=-2)
                failed.append(name)
    print(f"Triton {triton.__version__} for {arch}, Python {sys.version_info.major}.{sys.version_info.minor}: {found}")
    print(f"in {knobs.cache.dir}")
    if failed:
        print(f"not compiled: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
