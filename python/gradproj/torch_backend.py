"""The ops in plain torch: runs wherever torch runs, with nothing built.

Columns are walked in chunks of at most ``_CHUNK_BYTES`` of float64, so that the extra memory does not grow with N.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradproj import methods
from gradproj.ops import implement

_CHUNK_BYTES = 1 << 18
_PIN_BYTES = 3 << 18  # of float32 copies and products that a block of a weight's rows may take

Column = list[Any]  # of every row a tensor or None, or a chunk of those


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


def pin_(weights, bases, targets, biases, biased) -> Tensor:
    """Two matrix products per block of a weight's rows, so that the second finds the block in cache. Holds a block's W U."""
    bias_of = dict(zip(biased, biases, strict=True))
    squares: list[Tensor] = []  # of all blocks
    counts = []
    for k, (weight, basis, target) in enumerate(zip(weights, bases, targets, strict=True)):
        before = len(squares)
        if weight.shape[0] and basis.shape[1]:
            squares += _pin(weight, basis, target, bias_of.get(k))
        counts.append(len(squares) - before)
    device = weights[0].device if weights else None
    found = torch.stack(squares).double() if squares else torch.zeros(0, dtype=torch.float64, device=device)
    return found if counts == [1] * len(weights) else torch.stack([part.sum() for part in found.split(counts)])


def _pin(weight: Tensor, basis: Tensor, target: Tensor | None, bias: Tensor | None) -> Iterator[Tensor]:
    """|W U - B|^2 of one block of rows after the other."""
    inputs = weight.shape[1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    basis = basis.to(dtype)
    of_inputs = basis[:inputs]
    held = basis.shape[1] + (0 if weight.dtype == dtype else inputs)  # per row: W U, and a 16-bit row in float32
    rows = max(1, _PIN_BYTES // (dtype.itemsize * held))
    for block, goal, shift in zip(_blocks(weight, rows), _blocks(target, rows), _blocks(bias, rows), strict=False):
        wide = block.to(dtype)
        if goal is None:
            moved = torch.mm(wide, of_inputs)
        else:
            moved = torch.addmm(goal.to(dtype), wide, of_inputs, beta=-1.0)
        if shift is not None:
            wide_shift = shift.to(dtype)
            moved.addr_(wide_shift, basis[inputs])
            wide_shift.addmv_(moved, basis[inputs], alpha=-1.0)
            if wide_shift is not shift:
                shift.copy_(wide_shift)
        flat = moved.view(-1)
        yield torch.dot(flat, flat)
        wide.addmm_(moved, of_inputs.T, alpha=-1.0)
        if wide is not block:
            block.copy_(wide)


def _blocks(t: Tensor | None, rows: int) -> Iterable[Any]:
    if t is None:
        return repeat(None)
    return t.split(rows) if rows < len(t) else (t,)


for _function in (gram, combine_, project_, pin_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
