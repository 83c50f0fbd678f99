"""Row 0 <- sum_r weights[r] row r, or base - sum_r weights[r] row r where row 0 stands for base - row 0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.table import Rows, programs_for, small
from gradproj.triton_kernels.walk import find_segment, load_row, places_of, row_pointer

GROUP = tl.constexpr(8)  # rows whose loads are in flight together


@triton.jit
def is_unchanged(weights, ids: tl.constexpr):
    """Whether the weights of the rows of this launch are (1, 0, .., 0)."""
    unchanged = tl.load(weights) == 1.0
    for r in tl.static_range(1, len(ids)):
        unchanged = unchanged & (tl.load(weights + ids[r]) == 0.0)
    return unchanged


@triton.jit
def any_nonzero(weights, first: tl.constexpr, ids: tl.constexpr):
    """Whether one of a group of rows has to be read."""
    found = tl.load(weights + ids[first]) != 0.0
    for k in tl.static_range(1, GROUP):
        if first + k < len(ids):
            found = found | (tl.load(weights + ids[first + k]) != 0.0)
    return found


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
    line, start, numel, weights, full: tl.constexpr, ids: tl.constexpr, dtypes: tl.constexpr, base: tl.constexpr,
    parts: tl.constexpr, ndim: tl.constexpr, width: tl.constexpr, compute: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """All rows of a block are loaded before it is stored: a direction may be the gradient's own memory."""
    count: tl.constexpr = len(dtypes)
    total = tl.zeros([block], dtype=compute)
    if base:
        origin = load_row(line, count - 1, start, numel, dtypes, parts, ndim, width, full, compute, block)
    for first in tl.static_range(0, len(ids), GROUP):
        if first == 0 or any_nonzero(weights, first, ids):
            for k in tl.static_range(GROUP):
                if first + k < len(ids):
                    w = tl.load(weights + ids[first + k])
                    x = load_row(
                        line, first + k, start, numel, dtypes, parts, ndim, width, full, compute, block, w
                    )  # fmt: skip
                    if base and first + k == 0:
                        x = tl.where(w != 0.0, origin - x, 0.0)
                    total += w.to(compute) * x
    if base:
        total = origin - total
    pointer = row_pointer(line, 0, dtypes[0], full)
    index = start + tl.arange(0, block)
    places = places_of(line, 0, index, count, width, ndim)
    if full:
        tl.store(pointer + places, narrow(total, dtypes[0]))
    else:
        tl.store(pointer + places, narrow(total, dtypes[0]), mask=index < numel)


@triton.jit(do_not_specialize=["segments", "blocks", "num_rows"])
def combine_kernel(
    table, segments, blocks, weights, num_rows, ids: tl.constexpr, dtypes: tl.constexpr, base: tl.constexpr,
    parts: tl.constexpr, ndim: tl.constexpr, width: tl.constexpr, compute: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Reads the rows whose weight is not 0 once, and the base, and writes row 0, 16 bytes at a time in aligned full blocks;
    weights (1, 0, .., 0) of a part read and write nothing in it. Walks backwards: what a Gram pass read last is still in L2."""
    count: tl.constexpr = len(dtypes)
    if not parts and is_unchanged(weights, ids):
        return
    programs = tl.num_programs(0).to(tl.int64)
    program = programs - 1 - tl.program_id(0)
    first, last = program * blocks // programs, (program + 1) * blocks // programs
    segment = find_segment(table, segments, last - 1, count, width)
    for k in range(last - first):
        b = last - 1 - k
        numel = tl.load(table + segment * width + count)
        begin = tl.load(table + segment * width + count + 1) - (numel + block - 1) // block
        while begin > b:
            segment -= 1
            numel = tl.load(table + segment * width + count)
            begin = tl.load(table + segment * width + count + 1) - (numel + block - 1) // block
        line = table + segment * width
        start = tl.multiple_of((b - begin) * block, block)
        if parts:
            w = weights + tl.load(line + count + 3) * num_rows
            changed = is_unchanged(w, ids) == 0
        else:
            w = weights
            changed = True
        if changed:
            if ndim == 0 and (start + block <= numel) & (tl.load(line + count + 2) != 0):
                combine_block(line, start, numel, w, True, ids, dtypes, base, parts, ndim, width, compute, block)
            else:
                combine_block(line, start, numel, w, False, ids, dtypes, base, parts, ndim, width, compute, block)


def combine(rows: Rows, weights: Tensor) -> None:
    """Any number of rows in one pass."""
    with torch.cuda.device_of(weights):
        for launch in rows.walk(tuple(range(rows.num_rows))).launches:
            programs = min(launch.blocks, programs_for(rows.device))
            combine_kernel[(programs,)](
                *launch.arguments, weights, rows.num_rows, *launch.form, launch.table.shape[1], rows.compute, rows.block,
                num_warps=8,
            )  # fmt: skip


def combine_(
    grads: list[Tensor], directions: list[Tensor | None], weights: Tensor, base: list[Tensor | None] | None = None,
    scales: list[Tensor | None] | None = None, parts: tuple[int, ...] = (), num_parts: int = 0,
) -> None:  # fmt: skip
    """The op ``combine_``; see ``gradproj.ops``."""
    rows = Rows.to_write(grads, directions, base, scales, parts, num_parts)
    combine(rows, small(weights, (*rows.lead, rows.num_rows), rows, "weights"))
