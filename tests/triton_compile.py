"""Writes PTX for sm_90: triton_compile.py FOLDER kernel,rows,dtype,row_only ... Run by test_triton_ptx.py."""

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradproj.triton_kernels.combine import combine_kernel
from gradproj.triton_kernels.gram import gram_kernel
from gradproj.triton_kernels.table import BLOCK


def ptx(kernel: str, rows: int, dtype: str, row_only: bool) -> str:
    dtypes = ({"fp32": tl.float32, "bf16": tl.bfloat16}[dtype],) * rows
    signature = {"table": "*i64", "segments": "i32", "blocks": "i32"}
    constants = {"dtypes": dtypes, "compute": tl.float32, "block": BLOCK}
    if kernel == "gram":
        function = gram_kernel
        signature["partial"] = "*fp64"
        count = rows if row_only else rows * (rows + 1) // 2
        constants |= {"rows": rows, "row_only": row_only, "pairs": triton.next_power_of_2(count)}
    else:
        function = combine_kernel
        signature["weights"] = "*fp64"
        constants["ids"] = tuple(range(rows))
    signature |= dict.fromkeys(constants, "constexpr")
    # What the launcher finds out at run time: allocations start on 16-byte boundaries.
    names = function.arg_names
    pointers = [n for n, t in signature.items() if t.startswith("*")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(
        fn=function,
        signature={n: signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


for case in sys.argv[2:]:
    kernel, rows, dtype, row_only = case.split(",")
    (Path(sys.argv[1]) / f"{case}.ptx").write_text(ptx(kernel, int(rows), dtype, row_only == "True"))
