"""Row 0 <- sum_r weights[r] row r."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.op import Start, implement, launch
from gradproj.triton_kernels.table import Table, check_small
from gradproj.triton_kernels.walk import find_segment, is_full, load_row, row_pointers

ROWS_IN_FLIGHT = tl.constexpr(8)  # rows whose loads are in flight together
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def any_nonzero(weights, rows: tl.constexpr, first: tl.constexpr, last: tl.constexpr):
    """Whether one of ``rows[first:last]`` has to be read."""
    found = tl.full([], 0, tl.int1)
    for k in tl.static_range(first, last):
        if k < len(rows):
            found = found | (tl.load(weights + rows[k]) != 0.0)
    return found


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round once, to nearest even. By hand where triton's interpreter would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        result = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def combine_chunk(
    segment, start, weights, full: tl.constexpr, rows: tl.constexpr, dtypes: tl.constexpr, instance: tl.constexpr
):  # fmt: skip
    """All rows of a chunk are loaded before it is stored: a direction may be the gradient's own memory."""
    chunk: tl.constexpr = instance.chunk
    total = tl.zeros([chunk], dtype=instance.compute)
    for first in tl.static_range(0, len(rows), ROWS_IN_FLIGHT):
        if first == 0 or any_nonzero(weights, rows, first, first + ROWS_IN_FLIGHT):
            for k in tl.static_range(first, first + ROWS_IN_FLIGHT):
                if k < len(rows):
                    w = tl.load(weights + rows[k])
                    used = tl.broadcast_to(w, [chunk]) != 0.0  # triton's interpreter cannot broadcast the comparison
                    total += w.to(instance.compute) * load_row(segment, k, dtypes[k], start, full, instance, used)
    index = start + tl.arange(0, chunk)
    pointers = row_pointers(segment, 0, dtypes[0], index, full, instance)
    if full:
        tl.store(pointers, narrow(total, dtypes[0]))
    else:
        tl.store(pointers, narrow(total, dtypes[0]), mask=index < tl.load(segment + 1))


@triton.jit(do_not_specialize=["width", "num_rows"])
def combine_kernel(
    segments, width, programs, weights, num_rows, rows: tl.constexpr, dtypes: tl.constexpr, instance: tl.constexpr
):  # fmt: skip
    """Reads the rows whose weight is not 0 once and writes row 0, 16 bytes at a time in full chunks; weights (1, 0, ..,
    0) read and write nothing. A program walks its chunks backwards: what a Gram read last is still in L2."""
    program = programs + tl.program_id(0) * 4
    weights += tl.load(program + 2) * num_rows
    if (tl.load(weights) == 1.0) & (any_nonzero(weights, rows, 1, len(rows)) == 0):
        return
    first, last = tl.load(program), tl.load(program + 4)
    segment = segments + tl.load(program + 5) * width
    for k in range(last - first):
        chunk = last - 1 - k
        segment = find_segment(segment, width, chunk)
        start = (chunk - tl.load(segment)) * instance.chunk
        if instance.ndim == 0 and is_full(segment, start, instance):
            combine_chunk(segment, start, weights, True, rows, dtypes, instance)
        else:
            combine_chunk(segment, start, weights, False, rows, dtypes, instance)


def combine(table: Table, weights: Tensor) -> None:
    """Any number of rows in one pass."""
    starts = []
    for at in table.launches:
        form = at.rows, at.dtypes, at.instance
        arguments = (*at.arguments, weights, table.num_rows, *form)
        starts.append(Start(combine_kernel, form, at.grid, arguments, at.warps))
    with torch.cuda.device_of(weights):
        launch(table.device, starts)


@implement
def combine_(
    grads: list[Tensor],
    directions: list[Tensor | None],
    weights: Tensor,
    parts: tuple[int, ...] = (),
    num_parts: int = 0,
) -> None:
    """The op ``combine_``; see ``gradproj.kernels.ops``."""
    table = Table.to_write(grads, directions, parts, num_parts)
    check_small(weights, (table.num_rows,), table, "weights")
    combine(table, weights)
