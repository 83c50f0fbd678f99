"""The ops in plain torch: runs wherever torch runs, with nothing built.

Columns are walked in chunks of at most ``_CHUNK_BYTES`` of float64, so that the extra memory does not grow with N.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from gradproj import methods
from gradproj.ops import implement

_CHUNK_BYTES = 1 << 18

Column = list[Tensor | None]  # a tensor of every row, or of a chunk of it


def gram(rows, num_rows, gram_dd=None, parts=(), num_parts=0) -> Tensor:
    """Reads R N bytes. Products and sums in float64, one matrix product per chunk."""
    device = next(t for t in rows if t is not None).device
    total = torch.zeros(max(1, num_parts), num_rows, num_rows, dtype=torch.float64, device=device)
    for part, chunk in _chunks(rows, num_rows, parts):
        shape = next(t for t in chunk if t is not None).shape
        zeros = torch.zeros((), dtype=torch.float64, device=device).expand(shape)
        matrix = torch.stack([(zeros if t is None else t.double()).reshape(-1) for t in chunk])
        if gram_dd is None:
            total[part] += matrix @ matrix.T
        else:
            total[part, 0] += matrix @ matrix[0]
    total[:, :, 0] = total[:, 0]
    if gram_dd is not None:
        total[:, 1:, 1:] = gram_dd
    return total if num_parts else total[0]


def combine_(grads, directions, weights, parts=(), num_parts=0) -> None:
    """Reads R N bytes and writes N, whatever the weights are: torch cannot skip a row without asking the device."""
    rows, num_rows = [*grads, *directions], 1 + len(directions) // len(grads)
    wide = any(t is not None and t.dtype == torch.float64 for t in rows)
    dtype = torch.float64 if wide else torch.float32
    weights = weights.view(-1, num_rows)
    used = weights != 0
    unchanged = (weights[:, 0] == 1) & ~used[:, 1:].any(dim=1)
    for part, chunk in _chunks(rows, num_rows, parts):
        g = chunk[0]
        total = torch.zeros(g.shape, dtype=dtype, device=g.device)
        for r, t in enumerate(chunk):
            if t is not None:
                total += torch.where(used[part, r], weights[part, r].to(dtype) * t.to(dtype), 0.0)
        g.copy_(torch.where(unchanged[part], g, total.to(g.dtype)))


def project_(grads, directions, method, gamma, eps, gram_dd=None, parts=(), num_parts=0) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    products = gram(rows, len(rows) // len(grads), gram_dd, parts, num_parts)
    weights = methods.solve(products, method, gamma, eps)
    combine_(grads, directions, weights, parts, num_parts)
    return products, weights


def _chunks(rows: Column, num_rows: int, parts) -> Iterator[tuple[int, Column]]:
    """Part and tensors of every chunk of every column that has a tensor."""
    count = len(rows) // num_rows
    limit = max(1, _CHUNK_BYTES // (8 * num_rows))
    for i in range(count):
        for chunk in _cut(rows[i::count], limit):
            yield parts[i] if parts else 0, chunk


def _cut(column: Column, limit: int) -> Iterator[Column]:
    """Chunks of at most ``limit`` elements, flat where all strides allow it: views that can be written."""
    shape = next((t.shape for t in column if t is not None), (0,))
    numel = prod(shape)
    if numel <= limit:
        if numel:
            yield column
    elif all(t is None or t.is_contiguous() for t in column):
        flat = [None if t is None else t.view(-1) for t in column]
        for start in range(0, numel, limit):
            yield [None if t is None else t[start : start + limit] for t in flat]
    else:
        dim = max(range(len(shape)), key=lambda d: shape[d])
        half = shape[dim] // 2
        for start, length in ((0, half), (half, shape[dim] - half)):
            yield from _cut([None if t is None else t.narrow(dim, start, length) for t in column], limit)


for _function in (gram, combine_, project_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
