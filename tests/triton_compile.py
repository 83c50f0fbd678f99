"""Writes PTX for sm_90: triton_compile.py FOLDER kernel,rows,dtype,row_only ... Run by test_triton_ptx.py."""

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradproj.triton_kernels.combine import combine_kernel, combine_strided_kernel
from gradproj.triton_kernels.gram import gram_finish_kernel, gram_kernel, gram_strided_kernel
from gradproj.triton_kernels.table import BLOCK
from gradproj.triton_kernels.weights import many_directions_kernel, one_direction_kernel

KERNELS = {
    "gram": gram_kernel,
    "gram_strided": gram_strided_kernel,
    "gram_finish": gram_finish_kernel,
    "combine": combine_kernel,
    "combine_strided": combine_strided_kernel,
    "weights_one": one_direction_kernel,
    "weights_many": many_directions_kernel,
}
ARGUMENTS = {
    "table": "*i64", "line": "*i64", "partial": "*fp64", "gram": "*fp64", "weights": "*fp64",
    "segments": "i32", "blocks": "i32", "programs": "i32", "num_rows": "i32",
}  # fmt: skip


def ptx(kernel: str, rows: int, dtype: str, row_only: bool) -> str:
    function = KERNELS[kernel]
    names = function.arg_names
    count = rows if row_only else rows * (rows + 1) // 2
    available = {
        "rows": rows,
        "ids": tuple(range(rows)),
        "dtypes": ({"fp32": tl.float32, "bf16": tl.bfloat16}[dtype],) * rows,
        "row_only": row_only,
        "compute": tl.float32,
        "pairs": triton.next_power_of_2(count),
        "block": triton.next_power_of_2(rows - 1) if kernel == "weights_many" else BLOCK,
        "ndim": 3,
        "method": "conflict",
        "eps": 1e-9,
    }
    signature = {n: ARGUMENTS.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): available[n] for n in names if signature[n] == "constexpr"}
    # What the launcher finds out at run time: allocations start on 16-byte boundaries.
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


for case in sys.argv[2:]:
    kernel, rows, dtype, row_only = case.split(",")
    (Path(sys.argv[1]) / f"{case}.ptx").write_text(ptx(kernel, int(rows), dtype, row_only == "True"))
