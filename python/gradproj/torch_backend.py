"""The ops in plain torch: runs wherever torch runs, with nothing built.

Every buffer is walked in blocks of at most ``_BLOCK_BYTES`` of float64, so the extra memory does not grow with N.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import methods
from gradproj.ops import implement

_BLOCK_BYTES = 1 << 18
_PIN_BYTES = 1 << 20  # of a weight's rows that are taken at a time


class _Column(NamedTuple):
    tensors: list
    part: int


def _rows(rows, num_rows: int, parts) -> Iterator[_Column]:
    n = len(rows) // num_rows
    for i in range(n):
        tensors = rows[i::n]
        if any(t is not None for t in tensors):
            yield _Column(tensors, parts[i] if parts else 0)


def _blocks(column: list, limit: int) -> Iterator[list]:
    """Cut one column into flat blocks of at most ``limit`` elements, views of the buffers except for odd strides."""
    like = next(t for t in column if t is not None)
    numel = prod(like.shape)
    if numel <= limit:
        if numel:
            yield column
        return
    if all(t is None or t.is_contiguous() for t in column):
        flat = [None if t is None else t.view(-1) for t in column]
        for start in range(0, numel, limit):
            stop = min(start + limit, numel)
            yield [None if t is None else t[start:stop] for t in flat]
        return
    dim = max(range(len(like.shape)), key=lambda d: like.shape[d])
    half = like.shape[dim] // 2
    for start, length in ((0, half), (half, like.shape[dim] - half)):
        yield from _blocks([None if t is None else t.narrow(dim, start, length) for t in column], limit)


def gram(rows, num_rows, gram_dd=None, parts=(), num_parts=0) -> Tensor:
    """Reads R N bytes. Products and sums in float64, one matrix product per block."""
    device = next(t for t in rows if t is not None).device
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    total = torch.zeros(max(1, num_parts), num_rows, num_rows, dtype=torch.float64, device=device)
    for column in _rows(rows, num_rows, parts):
        products = total[column.part]
        for block in _blocks(column.tensors, limit):
            like = next(t for t in block if t is not None)
            zeros = torch.zeros((), dtype=torch.float64, device=device).expand(like.shape)
            values = [zeros if t is None else t.double() for t in block]
            matrix = torch.stack([v.reshape(-1) for v in values])
            if gram_dd is None:
                products += matrix @ matrix.T
            else:
                products[0] += matrix @ matrix[0]
    total[:, :, 0] = total[:, 0]
    if gram_dd is not None:
        total[:, 1:, 1:] = gram_dd
    return total if num_parts else total[0]


def combine_(grads, directions, weights, parts=(), num_parts=0) -> None:
    """Reads R N bytes and writes N, whatever the weights are: torch cannot skip a row without asking the device."""
    num_rows = 1 + len(directions) // len(grads)
    rows = [*grads, *directions]
    wide = any(t is not None and t.dtype == torch.float64 for t in rows)
    dtype = torch.float64 if wide else torch.float32
    weights = weights.view(-1, num_rows)
    used = weights != 0
    unchanged = (weights[:, 0] == 1) & ~used[:, 1:].any(dim=1)
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    for column in _rows(rows, num_rows, parts):
        w, read, same = weights[column.part].to(dtype), used[column.part], unchanged[column.part]
        for block in _blocks(column.tensors, limit):
            g = block[0]
            total = torch.zeros(g.shape, dtype=dtype, device=g.device)
            for r, t in enumerate(block):
                if t is not None:
                    total += torch.where(read[r], w[r] * t.to(dtype), 0.0)
            g.copy_(torch.where(same, g, total.to(g.dtype)))


def project_(
    grads, directions, method, gamma, eps, gram_dd=None, parts=(), num_parts=0
) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    g = gram(rows, len(rows) // len(grads), gram_dd, parts, num_parts)
    weights = methods.solve(g, method, gamma, eps)
    combine_(grads, directions, weights, parts, num_parts)
    return g, weights


def pin_(weights, bases, targets, biases, biased) -> Tensor:
    """Two matrix products per block of a weight's rows, so that the second finds the block in cache. Holds a block's W U."""
    bias_of = dict(zip(biased, biases, strict=True))
    squares = []
    for k, (weight, basis, target) in enumerate(zip(weights, bases, targets, strict=True)):
        squares.append(_pin(weight, basis, target, bias_of.get(k)))
    return torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64)


def _pin(weight: Tensor, basis: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    rank = basis.shape[1]
    square = torch.zeros((), dtype=torch.float64, device=weight.device)
    if not rank or not outputs:
        return square
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    basis = basis.to(dtype)
    of_inputs, of_bias = basis[:inputs], basis[inputs:]
    rows = max(16, min(outputs, _PIN_BYTES // max(1, inputs * 4)))
    moved = torch.empty(rows, rank, dtype=dtype, device=weight.device)
    for start in range(0, outputs, rows):
        block = weight[start : start + rows]
        here = moved[: len(block)]
        wide = block.to(dtype)
        torch.mm(wide, of_inputs, out=here)
        if bias is not None:
            here.addr_(bias[start : start + rows].to(dtype), of_bias[0])
        if target is not None:
            here.sub_(target[start : start + rows])
        square += here.square().sum(dtype=torch.float64)
        wide.addmm_(here, of_inputs.T, alpha=-1.0)
        if wide is not block:
            block.copy_(wide)
        if bias is not None:
            part = bias[start : start + rows]
            part.copy_(part.to(dtype) - here @ of_bias[0])
    return square


for _function in (gram, combine_, project_, pin_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
