"""Compiles what an op launches, without a GPU: triton_compile.py FOLDER op,rows,dtype,flag,flag.. ...

The op runs on CPU tensors up to its launches, whose PTX and use of registers and stack are written to FOLDER instead. Flags:
``mixed`` (directions are bfloat16), ``strided``, ``gram_dd``, a method's name, ``sm80`` (instead of 90).
"""

import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from gradproj.triton_kernels.combine import combine_
from gradproj.triton_kernels.gram import gram
from gradproj.triton_kernels.project import project_
from gradproj.triton_kernels.weights import METHODS, weights

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
N = 4096


class Device:
    """What the launcher asks before it compiles; a device of its own for every capability, because it keeps kernels by device."""

    capability = 90

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def rows(count: int, dtype: torch.dtype, flags: list[str]) -> list[list[torch.Tensor]]:
    found = []
    for r in range(count):
        t = torch.zeros(16, 16, N // 256, dtype=torch.bfloat16 if r and "mixed" in flags else dtype)
        found.append([t.permute(2, 0, 1) if r and "strided" in flags else t])
    return found


def call(op: str, count: int, dtype: torch.dtype, flags: list[str]) -> None:
    g, *directions = rows(count, dtype, flags)
    flat = [t for d in directions for t in d]
    gram_dd = torch.zeros(count - 1, count - 1, dtype=torch.float64) if "gram_dd" in flags else None
    method = next((f for f in flags if f in METHODS), "orthogonal")
    if op == "gram":
        gram([*g, *flat], count, gram_dd)
    elif op == "combine_":
        combine_(g, flat, torch.zeros(count, dtype=torch.float64))
    elif op == "project_":
        project_(g, flat, method, 0.5, 0.0, gram_dd)
    else:
        weights(torch.zeros(count, count, dtype=torch.float64), method, 0.5, 0.0)


def write(kernel, path: Path) -> None:
    path.with_suffix(".ptx").write_text(kernel.asm["ptx"])
    path.with_suffix(".cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([CUOBJDUMP, "-res-usage", path.with_suffix(".cubin")], text=True)
    path.with_suffix(".usage").write_text(usage)


driver.set_active(Device())
launch = JITFunction.run
for case in sys.argv[2:]:
    op, count, dtype, *flags = case.split(",")
    Device.capability = 80 if "sm80" in flags else 90

    def compile_only(self, *args, warmup, case=case, **kwargs):
        write(launch(self, *args, warmup=True, **kwargs), Path(sys.argv[1]) / f"{case},{self.__name__}")

    JITFunction.run = compile_only
    call(op, int(count), DTYPES[dtype], flags)
