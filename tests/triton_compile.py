"""Compiles what an op launches, without a GPU: triton_compile.py FOLDER op,rows,dtype,flag,flag.. ...

The op runs on CPU tensors up to its launches, whose PTX and use of registers and stack are written to FOLDER instead.
For ``pin_`` rows are the rank. Flags:

    sm80, sm100   for this architecture instead of sm_90
    strided       directions, or the weight of ``pin_``, have no dense dimension
    pair          U is a pair
    mixed         directions are bfloat16
    absent        a second column lacks the first direction
    gram_dd       the Gram of the directions is known
    parts         two columns, of a part each
    transposed    a weight whose columns are dense
    bias          one more row of U
    orthogonal, conflict, mix     the method

Takes this checkout's kernels, with torch, numpy and triton importable, whether gradproj is installed or not.
"""

import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

import gradproj

gradproj.__path__.append(str(ROOT))  # its triton_kernels lie there

from gradproj.rows.functional import split_basis
from gradproj.triton_kernels.combine import combine_
from gradproj.triton_kernels.gram import gram
from gradproj.triton_kernels.pin import pin_
from gradproj.triton_kernels.project import project_
from gradproj.triton_kernels.weights import METHODS, weights

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
N = 4096


class Device:
    """What the launcher asks before it compiles; a device of its own for every capability, because it keeps kernels by
    device."""

    capability = 90

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def rows(count: int, dtype: torch.dtype, flags: list[str]) -> list[list[torch.Tensor | None]]:
    """One column; two of those with ``absent`` and with ``parts``."""
    found = []
    for r in range(count):
        t = torch.zeros(16, 16, N // 256, dtype=torch.bfloat16 if r and "mixed" in flags else dtype)
        t = t.permute(2, 0, 1) if r and "strided" in flags else t
        found.append([t])
        if "absent" in flags or "parts" in flags:
            found[-1].append(None if r == 1 and "absent" in flags else t.clone())
    return found


def pin(rank: int, dtype: torch.dtype, flags: list[str]) -> None:
    outputs, inputs = 256, 512
    if "transposed" in flags:
        weight = torch.zeros(inputs, outputs, dtype=dtype).T
    elif "strided" in flags:
        weight = torch.zeros(outputs, inputs, 2, dtype=dtype)[:, :, 0]
    else:
        weight = torch.zeros(outputs, inputs, dtype=dtype)
    biases = [torch.zeros(outputs, dtype=dtype)] if "bias" in flags else []
    basis = torch.zeros(rank, inputs + 4)[:, : inputs + len(biases)].T  # as null spaces hold them
    basis = split_basis(basis) if "pair" in flags else basis
    pin_([weight], [basis], [torch.zeros(outputs, rank)], biases, [0][: len(biases)])


def call(op: str, count: int, dtype: torch.dtype, flags: list[str]) -> None:
    if op == "pin_":
        return pin(count, dtype, flags)
    g, *directions = rows(count, dtype, flags)
    flat = [t for d in directions for t in d]
    parts = ([0, 1], 2) if "parts" in flags else ((), 0)
    gram_dd = torch.zeros(*parts[1:][: bool(parts[0])], count - 1, count - 1, dtype=torch.float64)
    known = gram_dd if "gram_dd" in flags else None
    method = next((f for f in flags if f in METHODS), "orthogonal")
    if op == "gram":
        gram([*g, *flat], count, known, *parts)
    elif op == "combine_":
        combine_(g, flat, torch.zeros(*gram_dd.shape[:-2], count, dtype=torch.float64), *parts)
    elif op == "project_":
        project_(g, flat, method, 0.5, 0.0, known, *parts)
    else:
        weights(torch.zeros(count, count, dtype=torch.float64), method, 0.5, 0.0)


def write(kernel, path: Path) -> None:
    """Raises if the compiler, which then says nothing, made a kernel that only traps: Triton 3.6 where the sums of its
    products exceed the tensor memory of sm_100."""
    if "ld.global" not in kernel.asm["ptx"]:
        raise RuntimeError(f"{path.stem} was compiled to a trap")
    path.with_suffix(".ptx").write_text(kernel.asm["ptx"])
    path.with_suffix(".cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([CUOBJDUMP, "-res-usage", path.with_suffix(".cubin")], text=True)
    path.with_suffix(".usage").write_text(f"{usage}BYTES:{kernel.metadata.shared}\n")  # of shared memory


driver.set_active(Device())
compile_kernel = JITFunction.run
for case in sys.argv[2:]:
    op, count, dtype, *flags = case.split(",")
    Device.capability = next((int(f[2:]) for f in flags if f in ("sm80", "sm100")), 90)

    def compile_only(self, *args, warmup, case=case, **kwargs):
        path = Path(sys.argv[1]) / f"{case},{self.__name__}"
        kernel = compile_kernel(self, *args, warmup=True, **kwargs)
        number = 1
        while path.with_suffix(".hash").exists() and path.with_suffix(".hash").read_text() != kernel.hash:
            number += 1  # another form in the same call
            path = path.with_name(f"{case},{self.__name__} {number}")
        if not path.with_suffix(".hash").exists():
            path.with_suffix(".hash").write_text(kernel.hash)
            write(kernel, path)

    JITFunction.run = compile_only
    print(f"compiling {case}", flush=True)
    call(op, int(count), DTYPES[dtype], flags)
