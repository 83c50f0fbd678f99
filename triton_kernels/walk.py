"""How kernels walk a table: which segment holds a chunk, and where a row has its elements. ``table.Launch`` says what
it holds."""

import triton
import triton.language as tl


@triton.jit
def find_segment(segment, width, chunk):
    """The segment that holds ``chunk``, looked for from a near one."""
    while tl.load(segment) > chunk:
        segment -= width
    while tl.load(segment + width) <= chunk:
        segment += width
    return segment


@triton.jit
def is_full(segment, start, instance: tl.constexpr):
    """Whether the chunk from element ``start`` moves 16 bytes at a time: complete, and aligned in every row."""
    return (start + instance.chunk <= tl.load(segment + 1)) & (tl.load(segment + 2) != 0)


@triton.jit
def row_pointers(segment, position, dtype: tl.constexpr, index, full: tl.constexpr, instance: tl.constexpr):
    """Where the row at ``position`` has the elements ``index`` of a segment."""
    ndim: tl.constexpr = instance.ndim
    row = segment + 3 + ndim + position * (1 + ndim)
    pointer = tl.load(row).to(tl.pointer_type(dtype))
    if full:  # the host has checked it: a false hint is undefined behaviour
        pointer = tl.multiple_of(pointer, 16)
    if ndim == 0:
        offset = index
    else:
        offset = index * 0
        for k in tl.static_range(ndim):
            size = tl.load(segment + 2 + ndim - k)
            offset += index % size * tl.load(row + ndim - k)
            index = index // size
    return pointer + offset


@triton.jit
def load_row(
    segment, position, dtype: tl.constexpr, start, full: tl.constexpr, instance: tl.constexpr, used=None
):  # fmt: skip
    """A chunk of a row as ``instance.compute``. Full: 16 bytes at a time; else element by element, from any address.

    A row that is not ``used`` is not read, and zeros: no branch, so that the loads of several rows are in flight
    together.
    """
    index = start + tl.arange(0, instance.chunk)
    pointers = row_pointers(segment, position, dtype, index, full, instance)
    mask = used
    if not full:
        inside = index < tl.load(segment + 1)
        mask = inside if used is None else inside & used
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(instance.compute)
