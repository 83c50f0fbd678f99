"""Row 0 <- sum_r weights[r] row r."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.op import implement, launch
from gradproj.triton_kernels.table import PROGRAM, SEGMENT, Table, check_small
from gradproj.triton_kernels.walk import element_pointers, find_segment, is_full, load_row, narrow

ROWS_IN_FLIGHT = tl.constexpr(8)  # rows whose loads are in flight together


@triton.jit
def any_nonzero(weights_ptr, rows: tl.constexpr, first: tl.constexpr, last: tl.constexpr):
    """Whether one of ``rows[first:last]`` has to be read."""
    found = tl.full([], 0, tl.int1)
    for k in tl.static_range(first, min(last, len(rows))):
        found = found | (tl.load(weights_ptr + rows[k]) != 0.0)
    return found


@triton.jit
def combine_chunk(
    segment_ptr, start, weights_ptr, full: tl.constexpr, rows: tl.constexpr, dtypes: tl.constexpr,
    instance: tl.constexpr,
):  # fmt: skip
    """Loads all rows of a chunk before it stores the chunk: a direction may be the gradient's own memory."""
    chunk: tl.constexpr = instance.chunk
    total = tl.zeros([chunk], dtype=instance.compute)
    for first in tl.static_range(0, len(rows), ROWS_IN_FLIGHT):
        if first == 0 or any_nonzero(weights_ptr, rows, first, first + ROWS_IN_FLIGHT):
            for k in tl.static_range(first, min(first + ROWS_IN_FLIGHT, len(rows))):
                w = tl.load(weights_ptr + rows[k])
                used = tl.broadcast_to(w, [chunk]) != 0.0  # triton's interpreter cannot broadcast the comparison
                total += w.to(instance.compute) * load_row(segment_ptr, k, dtypes[k], start, full, instance, used)
    index = start + tl.arange(0, chunk)
    elements_ptr = element_pointers(segment_ptr, 0, dtypes[0], index, full, instance)
    inside = None if full else index < tl.load(segment_ptr + SEGMENT.numel)
    tl.store(elements_ptr, narrow(total, dtypes[0]), mask=inside)


@triton.jit(do_not_specialize=["width", "num_rows"])
def combine_kernel(
    segments_ptr, width, programs_ptr, weights_ptr, num_rows, rows: tl.constexpr, dtypes: tl.constexpr,
    instance: tl.constexpr,
):  # fmt: skip
    """Reads the rows whose weight is not 0 once and writes row 0, 16 bytes at a time in full chunks; weights (1, 0, ..,
    0) read and write nothing. A program walks its chunks backwards: what a Gram read last is still in L2."""
    program_ptr = programs_ptr + tl.program_id(0) * len(PROGRAM)
    next_ptr = program_ptr + len(PROGRAM)
    weights_ptr += tl.load(program_ptr + PROGRAM.part) * num_rows
    if (tl.load(weights_ptr) == 1.0) & (any_nonzero(weights_ptr, rows, 1, len(rows)) == 0):
        return
    first, last = tl.load(program_ptr + PROGRAM.first_chunk), tl.load(next_ptr + PROGRAM.first_chunk)
    segment_ptr = segments_ptr + tl.load(next_ptr + PROGRAM.segment) * width
    for k in range(last - first):
        chunk = last - 1 - k
        segment_ptr = find_segment(segment_ptr, width, chunk)
        start = (chunk - tl.load(segment_ptr + SEGMENT.first_chunk)) * instance.chunk
        if instance.ndim == 0 and is_full(segment_ptr, start, instance):
            combine_chunk(segment_ptr, start, weights_ptr, True, rows, dtypes, instance)
        else:
            combine_chunk(segment_ptr, start, weights_ptr, False, rows, dtypes, instance)


def combine(table: Table, weights: Tensor) -> None:
    """Combines any number of rows in one pass."""
    starts = [
        at.start(combine_kernel, (at.rows, at.dtypes, at.instance), weights, table.num_rows) for at in table.launches
    ]
    with torch.cuda.device_of(weights):
        launch(weights.device, starts)


@implement
def combine_(
    grads: list[Tensor], directions: list[Tensor | None], weights: Tensor, part: Sequence[int] = (), num_parts: int = 0
) -> None:
    """The op ``combine_``; see ``gradproj.kernels.ops``."""
    table = Table.to_write(grads, directions, part, num_parts)
    check_small(weights, (table.num_rows,), table, "weights")
    combine(table, weights)
