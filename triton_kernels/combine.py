"""Row 0 <- sum_r weights[r] row r."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.gram import (
    compute_type,
    find_segment,
    load_row,
    load_strided,
    programs_for,
    row_pointer,
    strided_offsets,
)
from gradproj.triton_kernels.table import BLOCK, launches


@triton.jit
def is_unchanged(weights, ids: tl.constexpr):
    """Whether the weights of the rows of this launch are (1, 0, .., 0)."""
    unchanged = tl.load(weights) == 1.0
    for r in tl.static_range(1, len(ids)):
        unchanged = unchanged & (tl.load(weights + ids[r]) == 0.0)
    return unchanged


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round once, to nearest even; NaN stays NaN. By hand for bfloat16, because triton's interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        result = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def combine_block(
    line, offsets, numel, weights, ids: tl.constexpr, dtypes: tl.constexpr, full: tl.constexpr, compute: tl.constexpr
):
    """All rows of a block are loaded before it is stored: a direction may be the gradient's own memory."""
    total = tl.zeros(offsets.shape, dtype=compute)
    for r in tl.static_range(len(ids)):
        w = tl.load(weights + ids[r])
        if w != 0.0:
            total += w.to(compute) * load_row(line, r, dtypes[r], offsets, numel, full, compute)
    pointer = row_pointer(tl.load(line), dtypes[0], full)
    if full:
        tl.store(pointer + offsets, narrow(total, dtypes[0]))
    else:
        tl.store(pointer + offsets, narrow(total, dtypes[0]), mask=offsets < numel)


@triton.jit(do_not_specialize=["segments", "blocks"])
def combine_kernel(
    table,
    segments,
    blocks,
    weights,
    ids: tl.constexpr,
    dtypes: tl.constexpr,
    compute: tl.constexpr,
    block: tl.constexpr,
):
    """Reads the rows whose weight is not 0 once and writes row 0, 16 bytes at a time in aligned full blocks; weights
    (1, 0, .., 0) read and write nothing. Walks backwards: what a Gram pass read last is still in L2."""
    rows: tl.constexpr = len(ids)
    width: tl.constexpr = rows + 3
    if is_unchanged(weights, ids):
        return
    programs = tl.num_programs(0).to(tl.int64)
    program = programs - 1 - tl.program_id(0)
    first, last = program * blocks // programs, (program + 1) * blocks // programs
    segment = find_segment(table, segments, width, last - 1)
    for k in range(last - first):
        b = last - 1 - k
        numel = tl.load(table + segment * width + rows)
        begin = tl.load(table + segment * width + rows + 1) - (numel + block - 1) // block
        while begin > b:
            segment -= 1
            numel = tl.load(table + segment * width + rows)
            begin = tl.load(table + segment * width + rows + 1) - (numel + block - 1) // block
        line = table + segment * width
        start = tl.multiple_of((b - begin) * block, block)
        offsets = start + tl.arange(0, block)
        if (start + block <= numel) & (tl.load(line + rows + 2) != 0):
            combine_block(line, offsets, numel, weights, ids, dtypes, True, compute)
        else:
            combine_block(line, offsets, numel, weights, ids, dtypes, False, compute)


@triton.jit
def combine_strided_kernel(
    line,
    weights,
    ids: tl.constexpr,
    dtypes: tl.constexpr,
    ndim: tl.constexpr,
    compute: tl.constexpr,
    block: tl.constexpr,
):
    """The same for one strided column; a program a block."""
    if is_unchanged(weights, ids):
        return
    numel = tl.load(line)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block).to(tl.int64)
    total = tl.zeros([block], dtype=compute)
    for r in tl.static_range(len(ids)):
        w = tl.load(weights + ids[r])
        if w != 0.0:
            total += w.to(compute) * load_strided(line, r, dtypes[r], ndim, index, numel, compute)
    pointer = row_pointer(tl.load(line + 1 + ndim), dtypes[0], False)
    tl.store(pointer + strided_offsets(line, 0, ndim, index), narrow(total, dtypes[0]), mask=index < numel)


def combine_(grads: list[Tensor], directions: list[Tensor | None], weights: Tensor, block: int = BLOCK) -> None:
    """Any number of rows in one pass."""
    rows = [*grads, *directions]
    num_rows = len(rows) // len(grads)
    compute = compute_type(rows)
    with torch.cuda.device_of(grads[0]):
        for launch in launches(rows, num_rows, tuple(range(num_rows)), block):
            if launch.ndim:
                combine_strided_kernel[(launch.blocks,)](
                    launch.table, weights, launch.rows, launch.dtypes, launch.ndim, compute, block
                )
            else:
                combine_kernel[(programs_for(launch.blocks, grads[0].device),)](
                    launch.table, launch.segments, launch.blocks, weights, launch.rows, launch.dtypes, compute, block,
                    num_warps=8,
                )  # fmt: skip
