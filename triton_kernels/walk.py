"""How a kernel walks a table: which segment a block is in, and what a row holds there. ``table.Launch`` describes a line."""

import triton
import triton.language as tl

from gradproj.float8 import BLOCK

SCALE_BLOCK = tl.constexpr(BLOCK)
GROUP = tl.constexpr(8)  # neighbours that share one load of their scale in a full block: what a thread has


@triton.jit
def find_segment(table, segments, block, rows: tl.constexpr, width: tl.constexpr):
    """The segment that holds ``block``: the first whose cumulative count of blocks exceeds it."""
    low = segments * 0
    high = segments - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(table + middle * width + rows + 1) > block:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def row_pointer(line, r: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(line + r).to(tl.pointer_type(dtype))
    if aligned:  # true only where the host has checked it: a false hint is undefined behaviour
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def places_of(line, r: tl.constexpr, index, rows: tl.constexpr, width: tl.constexpr, ndim: tl.constexpr):
    """Where row ``r`` has the elements ``index``, counted from its address."""
    if ndim == 0:
        places = index
    else:
        sizes = line + (width - ndim * (1 + rows))
        places = index * 0
        for k in tl.static_range(ndim):
            size = tl.load(sizes + (ndim - 1 - k))
            places += index % size * tl.load(sizes + (ndim * (1 + r) + ndim - 1 - k))
            index = index // size
    return places


@triton.jit
def decode(codes, dtype: tl.constexpr):
    """float8_e4m3fn as float32, exactly."""
    if dtype == tl.uint8:  # shifted, the bits are those of a float16 that is 2^8 times smaller; NaN alone is not
        magnitude = codes & 0x7F
        bits = (magnitude.to(tl.uint16) << 7) | ((codes & 0x80).to(tl.uint16) << 8)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = tl.where(magnitude == 0x7F, float("nan"), values)
    else:
        values = codes.to(tl.float32)
    return values


@triton.jit
def is_nonzero(weight, size: tl.constexpr):
    """[size] mask. Broadcast first, for triton's interpreter: it broadcasts a comparison as a number."""
    return tl.zeros([size], dtype=tl.float64) + weight != 0.0


@triton.jit
def load_where(pointers, mask):
    """Zeros where the mask is not set; without a mask, everything."""
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values


@triton.jit
def load_row(
    line, r: tl.constexpr, start, numel, dtypes: tl.constexpr, parts: tl.constexpr, ndim: tl.constexpr,
    width: tl.constexpr, full: tl.constexpr, compute: tl.constexpr, block: tl.constexpr, weight=None,
):  # fmt: skip
    """A block of row ``r`` from element ``start``. Full: 16 bytes at a time; else element by element, from any address. With
    a ``weight`` of 0 the row is not read, and zeros: no branch, so that the loads of several rows are in flight together."""
    rows: tl.constexpr = len(dtypes)
    dtype: tl.constexpr = dtypes[r]
    pointer = row_pointer(line, r, dtype, full)
    index = start + tl.arange(0, block)
    places = places_of(line, r, index, rows, width, ndim)
    mask = None
    if weight is not None:
        mask = is_nonzero(weight, block)
    if not full:
        mask = (index < numel) if mask is None else (index < numel) & mask
    values = load_where(pointer + places, mask)
    if dtype == tl.uint8 or dtype == tl.float8e4nv:
        scales = row_pointer(line, rows + 3 + parts + r, tl.float32, False)
        values = decode(values, dtype).to(compute)
        if full:
            groups: tl.constexpr = block // GROUP
            place = scales + (start + tl.arange(0, groups) * GROUP) // SCALE_BLOCK
            scale = load_where(place, None if weight is None else is_nonzero(weight, groups))
            values = tl.reshape(tl.reshape(values, [groups, GROUP]) * scale.to(compute)[:, None], [block])
        else:
            values *= load_where(scales + places // SCALE_BLOCK, mask).to(compute)
    return values.to(compute)


@triton.jit
def load_gradient(
    line, start, numel, dtypes: tl.constexpr, base: tl.constexpr, parts: tl.constexpr, ndim: tl.constexpr,
    width: tl.constexpr, full: tl.constexpr, compute: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of what the first row stands for: itself, or the base minus it."""
    values = load_row(line, 0, start, numel, dtypes, parts, ndim, width, full, compute, block)
    if base:
        origin: tl.constexpr = len(dtypes) - 1
        values = load_row(line, origin, start, numel, dtypes, parts, ndim, width, full, compute, block) - values
    return values
