"""From lists of tensors to tables of addresses that a kernel walks: the host's part, in Python.

A launch covers all dense segments of one signature (which rows are present, of which dtypes). Its table is int64, a line per
segment: the address of every row, numel, the cumulative number of blocks, and whether every row starts on a 16-byte boundary.
A segment that is off that boundary by the same number of elements in every row is split into a head and an aligned rest.
Columns without a common dense order get a launch each, with sizes and strides in the table.

Tables are kept, so that a training loop builds them once: under the addresses, sizes and dtypes of all buffers, at most
``CACHE_SIZE`` of them. On CUDA the host side is pinned and lives as long as the entry. An entry that a CUDA graph captured
stays for ever, because the graph will read it at every replay.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

MAX_DIMS = 8
CACHE_SIZE = 64
BLOCK = 2048  # elements
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        table: int64 on the device; lines as described above, or sizes and strides of one strided column.
        rows: the ids of the rows that are present, row by row of the table.
        dtypes: triton types of those rows.
        segments, blocks: how many; a strided column is one segment.
        ndim: 0 if dense.
    """

    table: Tensor
    rows: tuple[int, ...]
    dtypes: tuple
    segments: int
    blocks: int
    ndim: int


_cache: OrderedDict[tuple, tuple[list[Launch], list[Tensor]]] = OrderedDict()
_captured: list[tuple[list[Launch], list[Tensor]]] = []


def _key(t: Tensor | None):
    if t is None:
        return None
    if t.is_contiguous():
        return t.data_ptr(), t.numel(), t.dtype
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def launches(rows: list[Tensor | None], num_rows: int, wanted: tuple[int, ...], block: int = BLOCK) -> list[Launch]:
    """Tables for the rows ``wanted`` out of ``num_rows``, from the cache if the buffers are where they were.

    Raises:
        RuntimeError: a table would have to be built while a CUDA graph is captured.
        NotImplementedError: a column needs more than 8 dimensions after merging.
    """
    device = next(t for t in rows if t is not None).device
    key = (device, num_rows, wanted, block, *map(_key, rows))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    entry = _cache.get(key)
    if entry is None:
        if capturing:
            raise RuntimeError(
                "gradproj: these buffers are new to the Triton backend, and a table cannot be copied to the device while a "
                "CUDA graph is captured; run one step with the same buffers before the capture"
            )
        entry = _cache[key] = _build(rows, num_rows, wanted, block, device)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    if capturing:
        _captured.append(entry)
    return entry[0]


def _build(rows, num_rows, wanted, block, device) -> tuple[list[Launch], list[Tensor]]:
    n = len(rows) // num_rows
    dense: dict[tuple, list[list[int]]] = {}
    result, pinned = [], []

    def upload(values) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        if device.type == "cuda":
            host = host.pin_memory()
            pinned.append(host)
        return host.to(device, non_blocking=True)

    for i in range(n):
        column = [(r, rows[r * n + i]) for r in wanted]
        present = [(r, t) for r, t in column if t is not None]
        if not present or present[0][1].numel() == 0:
            continue
        ids = tuple(r for r, _ in present)
        types = tuple(_TYPES[t.dtype] for _, t in present)
        tensors = [t for _, t in present]
        sizes, strides = coalesce(tensors)
        if len(sizes) == 1 and all(s == [1] for s in strides):
            _append(dense.setdefault((ids, types), []), tensors)
            continue
        if len(sizes) > MAX_DIMS:
            raise NotImplementedError(
                f"gradproj: buffer {i} with shape {tuple(tensors[0].shape)} needs {len(sizes)} dimensions after merging; the "
                f"Triton kernels take {MAX_DIMS}: make it contiguous"
            )
        numel = tensors[0].numel()
        line = [numel, *sizes]
        for t, s in zip(tensors, strides, strict=True):
            line += [t.data_ptr(), *s]
        result.append(Launch(upload(line), ids, types, 1, -(-numel // block), len(sizes)))
    for (ids, types), segments in dense.items():
        widths = [t.primitive_bitwidth // 8 for t in types]
        lines, blocks = [], 0
        for *addresses, numel in segments:
            for line in _split(addresses, widths, numel):
                blocks += -(-line[-1] // block)
                aligned = all(address % 16 == 0 for address in line[:-1])
                lines.append([*line, blocks, int(aligned)])
        result.append(Launch(upload(lines), ids, types, len(lines), blocks, 0))
    return result, pinned


def _append(segments: list[list[int]], tensors: list[Tensor]) -> None:
    """Add a segment, or lengthen the last one if it ends where this one starts in every row."""
    numel = tensors[0].numel()
    starts = [t.data_ptr() for t in tensors]
    if segments:
        *before, length = segments[-1]
        if all(b + length * t.element_size() == s for b, s, t in zip(before, starts, tensors, strict=True)):
            segments[-1][-1] += numel
            return
    segments.append([*starts, numel])


def _split(addresses: list[int], widths: list[int], numel: int) -> list[list[int]]:
    """Cut off a head so that the rest is aligned in every row, where one cut does that for all rows."""
    heads = {(-address % 16) // width for address, width in zip(addresses, widths, strict=True)}
    head = heads.pop()
    if heads or head == 0 or head >= numel:
        return [[*addresses, numel]]
    rest = [address + head * width for address, width in zip(addresses, widths, strict=True)]
    return [[*addresses, head], [*rest, numel - head]]


def coalesce(tensors: list[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of a column with mergeable dimensions merged, outermost first in the first tensor's order."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [first.numel()], [[1]] * len(tensors)
    order = sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=lambda d: -first.stride(d))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d in order:
        size = first.shape[d]
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, tensors, strict=True)):
            sizes[-1] *= size
            for s, t in zip(strides, tensors, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, tensors, strict=True):
                s.append(t.stride(d))
    return (sizes, strides) if sizes else ([1], [[1]] * len(tensors))
