"""What kernels share: how they walk a table of ``table.Launch``, and how they round."""

import triton
import triton.language as tl

from gradproj.kernels import backends
from gradproj.triton_kernels.table import SEGMENT

INTERPRETED = tl.constexpr(backends.INTERPRETED)


@triton.jit
def find_segment(segment_ptr, width, chunk):
    """The segment that holds ``chunk``, searched from a near one."""
    while tl.load(segment_ptr + SEGMENT.first_chunk) > chunk:
        segment_ptr -= width
    while tl.load(segment_ptr + width + SEGMENT.first_chunk) <= chunk:
        segment_ptr += width
    return segment_ptr


@triton.jit
def is_full(segment_ptr, start, instance: tl.constexpr):
    """Whether the chunk from element ``start`` moves 16 bytes at a time: dense, complete, and aligned in every row."""
    complete = start + instance.chunk <= tl.load(segment_ptr + SEGMENT.numel)
    return complete & (tl.load(segment_ptr + SEGMENT.aligned) != 0)


@triton.jit
def element_pointers(segment_ptr, position, dtype: tl.constexpr, index, full: tl.constexpr, instance: tl.constexpr):
    """Where the row at ``position`` has the elements ``index`` of a segment."""
    ndim: tl.constexpr = instance.ndim
    sizes_ptr = segment_ptr + len(SEGMENT)
    row_ptr = sizes_ptr + ndim + position * (1 + ndim)
    address_ptr = tl.load(row_ptr).to(tl.pointer_type(dtype))
    if full:  # the host has checked it: a false hint is undefined behaviour
        address_ptr = tl.multiple_of(address_ptr, 16)
    offset = index if ndim == 0 else index * 0
    for k in tl.static_range(1, ndim + 1):  # the last dimension first
        size = tl.load(sizes_ptr + ndim - k)
        offset += index % size * tl.load(row_ptr + 1 + ndim - k)
        index = index // size
    return address_ptr + offset


@triton.jit
def load_row(segment_ptr, position, dtype: tl.constexpr, start, full: tl.constexpr, instance: tl.constexpr, used=None):
    """A chunk of a row as ``instance.compute``: 16 bytes at a time if ``full``, else by element from any address.
    A row that is not ``used`` is zeros and not read: no branch, so the loads of several rows are in flight together."""
    index = start + tl.arange(0, instance.chunk)
    elements_ptr = element_pointers(segment_ptr, position, dtype, index, full, instance)
    mask = used
    if not full:
        inside = index < tl.load(segment_ptr + SEGMENT.numel)
        mask = inside if used is None else inside & used
    return tl.load(elements_ptr, mask=mask, other=None if mask is None else 0.0).to(instance.compute)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Rounds once, to nearest even: by hand to bfloat16 in triton's interpreter, which would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        result = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result
