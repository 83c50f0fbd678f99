"""Inner products of rows: one set of float64 sums per program, then one program that adds them up in fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.table import BLOCK, Launch, launches

PASS_ROWS = 9  # rows whose products one launch accumulates
MAX_PROGRAMS = 1024


@triton.jit
def find_segment(table, segments, width: tl.constexpr, block):
    """The segment that holds ``block``: the first whose cumulative count of blocks exceeds it."""
    low = segments * 0
    high = segments - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(table + middle * width + width - 2) > block:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def row_pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:  # true only where the host has checked it: a false hint is undefined behaviour
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_row(line, r: tl.constexpr, dtype: tl.constexpr, offsets, numel, full: tl.constexpr, compute: tl.constexpr):
    """A block of row ``r``. Full: 16 bytes at a time, no mask; else masked, from any address."""
    pointer = row_pointer(tl.load(line + r), dtype, full)
    if full:
        values = tl.load(pointer + offsets)
    else:
        values = tl.load(pointer + offsets, mask=offsets < numel, other=0.0)
    return values.to(compute)


@triton.jit
def add_products(
    sums, line, offsets, numel, rows: tl.constexpr, dtypes: tl.constexpr, row_only: tl.constexpr, full: tl.constexpr,
    compute: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """Products of a block in ``compute``, summed over the block, added to float64 ``sums``."""
    index = tl.arange(0, pairs)
    for i in tl.static_range(1 if row_only else rows):
        x = load_row(line, i, dtypes[i], offsets, numel, full, compute)
        for j in tl.static_range(i, rows):
            y = load_row(line, j, dtypes[j], offsets, numel, full, compute)
            product = tl.sum(x * y, axis=0).to(tl.float64)
            sums += tl.where(index == (i * rows - i * (i - 1) // 2 + j - i), product, 0.0)
    return sums


# Counts are not specialised: a value of 1 would be a constant of another type, and other values another compilation.
@triton.jit(do_not_specialize=["segments", "blocks"])
def gram_kernel(
    table, segments, blocks, partial, rows: tl.constexpr, dtypes: tl.constexpr, row_only: tl.constexpr,
    compute: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Products of dense rows. Reads each row once, 16 bytes at a time in aligned full blocks; writes ``pairs`` doubles a
    program. A program takes neighbouring blocks, in order: same grid, same bits."""
    width: tl.constexpr = rows + 3
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    first, last = program * blocks // programs, (program + 1) * blocks // programs
    segment = find_segment(table, segments, width, first)
    sums = tl.zeros([pairs], dtype=tl.float64)
    for b in range(first, last):
        while tl.load(table + segment * width + rows + 1) <= b:
            segment += 1
        line = table + segment * width
        numel = tl.load(line + rows)
        begin = tl.load(line + rows + 1) - (numel + block - 1) // block
        start = tl.multiple_of((b - begin) * block, block)
        offsets = start + tl.arange(0, block)
        if (start + block <= numel) & (tl.load(line + rows + 2) != 0):
            sums = add_products(sums, line, offsets, numel, rows, dtypes, row_only, True, compute, pairs)
        else:
            sums = add_products(sums, line, offsets, numel, rows, dtypes, row_only, False, compute, pairs)
    tl.store(partial + program * pairs + tl.arange(0, pairs), sums)


@triton.jit
def strided_offsets(line, row: tl.constexpr, ndim: tl.constexpr, index):
    """Element offsets of linear indices in one row of a strided column."""
    offset = index * 0
    for k in tl.static_range(ndim):
        size = tl.load(line + ndim - k)
        offset += index % size * tl.load(line + 1 + ndim + row * (ndim + 1) + ndim - k)
        index = index // size
    return offset


@triton.jit
def load_strided(line, r: tl.constexpr, dtype: tl.constexpr, ndim: tl.constexpr, index, numel, compute: tl.constexpr):
    pointer = row_pointer(tl.load(line + 1 + ndim + r * (ndim + 1)), dtype, False)
    return tl.load(pointer + strided_offsets(line, r, ndim, index), mask=index < numel, other=0.0).to(compute)


@triton.jit(do_not_specialize=["blocks"])
def gram_strided_kernel(
    line, blocks, partial, rows: tl.constexpr, dtypes: tl.constexpr, row_only: tl.constexpr, ndim: tl.constexpr,
    compute: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The same for one strided column."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    numel = tl.load(line)
    sums = tl.zeros([pairs], dtype=tl.float64)
    for b in range(program, blocks, programs):
        index = b * block + tl.arange(0, block).to(tl.int64)
        for i in tl.static_range(1 if row_only else rows):
            x = load_strided(line, i, dtypes[i], ndim, index, numel, compute)
            for j in tl.static_range(i, rows):
                y = load_strided(line, j, dtypes[j], ndim, index, numel, compute)
                product = tl.sum(x * y, axis=0).to(tl.float64)
                sums += tl.where(tl.arange(0, pairs) == (i * rows - i * (i - 1) // 2 + j - i), product, 0.0)
    tl.store(partial + program * pairs + tl.arange(0, pairs), sums)


@triton.jit(do_not_specialize=["programs", "num_rows"])
def gram_finish_kernel(
    partial, programs, gram, num_rows, ids: tl.constexpr, row_only: tl.constexpr, pairs: tl.constexpr
):
    """Adds the programs' sums to ``gram``, in fixed order. One program; reads programs * pairs doubles."""
    index = tl.arange(0, pairs)
    total = tl.zeros([pairs], dtype=tl.float64)
    for p in range(programs):
        total += tl.load(partial + p * pairs + index)
    rows: tl.constexpr = len(ids)
    for i in tl.static_range(1 if row_only else rows):
        for j in tl.static_range(i, rows):
            value = tl.sum(tl.where(index == (i * rows - i * (i - 1) // 2 + j - i), total, 0.0), axis=0)
            value += tl.load(gram + ids[i] * num_rows + ids[j])
            tl.store(gram + ids[i] * num_rows + ids[j], value)
            tl.store(gram + ids[j] * num_rows + ids[i], value)


def programs_for(blocks: int, device: torch.device) -> int:
    """A grid that fills the device; fixed for a device, so that sums are."""
    if device.type == "cuda":
        most = min(MAX_PROGRAMS, 4 * torch.cuda.get_device_properties(device).multi_processor_count)
    else:
        most = 4  # interpreted
    return max(1, min(most, blocks))


def compute_type(rows: list[Tensor | None]):
    return tl.float64 if any(t is not None and t.dtype == torch.float64 for t in rows) else tl.float32


def _accumulate(launch: Launch, gram: Tensor, row_only: bool, compute, block: int) -> None:
    rows = len(launch.rows)
    count = rows if row_only else rows * (rows + 1) // 2
    pairs = triton.next_power_of_2(count)
    programs = programs_for(launch.blocks, gram.device)
    partial = torch.empty(programs, pairs, dtype=torch.float64, device=gram.device)
    if launch.ndim:
        gram_strided_kernel[(programs,)](
            launch.table, launch.blocks, partial, rows, launch.dtypes, row_only, launch.ndim, compute, pairs, block
        )
    else:
        gram_kernel[(programs,)](
            launch.table, launch.segments, launch.blocks, partial, rows, launch.dtypes, row_only, compute, pairs, block,
            num_warps=8,
        )  # fmt: skip
    gram_finish_kernel[(1,)](partial, programs, gram, gram.shape[0], launch.rows, row_only, pairs)


def gram(rows: list[Tensor | None], num_rows: int, known: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """[R, R] float64. Up to 9 rows in one pass; more as passes of one row against eight others."""
    device = next(t for t in rows if t is not None).device
    result = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    compute = compute_type(rows)
    with torch.cuda.device_of(result):
        if known is None and num_rows <= PASS_ROWS:
            for launch in launches(rows, num_rows, tuple(range(num_rows)), block):
                _accumulate(launch, result, False, compute, block)
            return result
        for i in range(num_rows if known is None else 1):
            others = list(range(i + 1, num_rows))
            groups = [others[k : k + PASS_ROWS - 1] for k in range(0, len(others), PASS_ROWS - 1)] or [[]]
            for k, group in enumerate(groups):
                if k:  # every group has <x, x> again: the first one's counts
                    square = result[i, i].clone()
                for launch in launches(rows, num_rows, (i, *group), block):
                    if launch.rows[0] == i:
                        _accumulate(launch, result, True, compute, block)
                if k:
                    result[i, i] = square
        if known is not None:
            result[1:, 1:] = known
    return result
