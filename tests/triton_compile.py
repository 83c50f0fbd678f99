"""Writes PTX without a GPU: triton_compile.py FOLDER kernel,rows,dtype,flag,flag.. ... Run by test_triton_ptx.py.

Flags: ``base``, ``parts``, ``strided``, ``row_only``, ``known``, a method's name, ``fp8`` (directions are float8), ``sm80``.
"""

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradproj.triton_kernels.combine import combine_kernel
from gradproj.triton_kernels.gram import FINISH, gram_finish_kernel, gram_kernel
from gradproj.triton_kernels.table import BLOCK
from gradproj.triton_kernels.weights import many_directions_kernel, one_direction_kernel

KERNELS = {
    "gram": gram_kernel,
    "finish": gram_finish_kernel,
    "combine": combine_kernel,
    "weights_one": one_direction_kernel,
    "weights_many": many_directions_kernel,
}
ARGUMENTS = {
    "table": "*i64", "spans": "*i64", "partial": "*fp64", "gram": "*fp64", "known": "*fp64", "weights": "*fp64",
    "segments": "i32", "blocks": "i32", "slot": "i32", "launches": "i32", "num_rows": "i32", "lead": "i32",
    "first": "i32", "gamma": "fp64", "eps": "fp64",
}  # fmt: skip


def ptx(kernel: str, rows: int, dtype: str, flags: list[str]) -> str:
    function = KERNELS[kernel]
    names = function.arg_names
    row_only = "row_only" in flags
    float8 = tl.uint8 if "sm80" in flags else tl.float8e4nv
    own = {"fp32": tl.float32, "bf16": tl.bfloat16}[dtype]
    dtypes = [own, *[float8 if "fp8" in flags else own] * (rows - 1), *[own] * ("base" in flags)]
    ndim = 3 if "strided" in flags else 0
    method = next((f for f in flags if f in ("orthogonal", "conflict", "mix")), None)
    pairs = triton.next_power_of_2(rows if row_only else rows * (rows + 1) // 2)
    scales = len(dtypes) if "fp8" in flags else 0
    constants = {
        "rows": rows,
        "row_only": row_only,
        "ids": tuple(range(rows)),
        "dtypes": tuple(dtypes),
        "base": "base" in flags,
        "parts": "parts" in flags,
        "ndim": ndim,
        "width": len(dtypes) + 3 + ("parts" in flags) + scales + ndim * (1 + len(dtypes)),
        "compute": tl.float32,
        "pairs": pairs,
        "chunk": FINISH // pairs,
        "block": triton.next_power_of_2(rows - 1) if kernel == "weights_many" else BLOCK,
        "method": method,
    }
    constants |= {} if "known" in flags else {"known": None}
    constants |= {} if method or kernel != "finish" else {"weights": None}
    signature = {n: "constexpr" if n in constants else ARGUMENTS[n] for n in names}
    constexprs = {(names.index(n),): constants[n] for n in names if n in constants}
    # What the launcher finds out at run time: allocations start on 16-byte boundaries.
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", 80 if "sm80" in flags else 90, 32)
    options = {"num_warps": 4 if kernel in ("finish", "weights") else 8}
    return triton.compile(source, target=target, options=options).asm["ptx"]


for case in sys.argv[2:]:
    kernel, rows, dtype, *flags = case.split(",")
    (Path(sys.argv[1]) / f"{case}.ptx").write_text(ptx(kernel, int(rows), dtype, flags))
