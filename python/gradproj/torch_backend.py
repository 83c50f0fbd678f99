"""The ops in plain torch: runs wherever torch runs, with nothing built.

Every buffer is walked in blocks of at most ``_BLOCK_BYTES`` of float64, so the extra memory does not grow with N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradproj import methods
from gradproj.ops import implement

_BLOCK_BYTES = 1 << 18


def _blocks(column: list[Tensor | None], limit: int) -> Iterator[list[Tensor | None]]:
    """Cut one column into flat blocks of at most ``limit`` elements, views of the buffers except for odd strides."""
    like = next(t for t in column if t is not None)
    if like.numel() <= limit:
        if like.numel():
            yield column
        return
    if all(t is None or t.is_contiguous() for t in column):
        flat = [None if t is None else t.view(-1) for t in column]
        for start in range(0, like.numel(), limit):
            stop = min(start + limit, like.numel())
            yield [None if t is None else t[start:stop] for t in flat]
        return
    dim = max(range(like.dim()), key=lambda d: like.shape[d])
    half = like.shape[dim] // 2
    for start, length in ((0, half), (half, like.shape[dim] - half)):
        yield from _blocks([None if t is None else t.narrow(dim, start, length) for t in column], limit)


def _columns(rows: list[Tensor | None], num_rows: int) -> Iterator[list[Tensor | None]]:
    n = len(rows) // num_rows
    for i in range(n):
        column = rows[i::n]
        if any(t is not None for t in column):
            yield column


def gram(rows: list[Tensor | None], num_rows: int, known: Tensor | None = None) -> Tensor:
    """Reads R N bytes. Products and sums in float64, one matrix product per block."""
    device = next(t for t in rows if t is not None).device
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    for column in _columns(rows, num_rows):
        for block in _blocks(column, limit):
            like = next(t for t in block if t is not None)
            zeros = torch.zeros((), dtype=torch.float64, device=device).expand(like.shape)
            matrix = torch.stack([(zeros if t is None else t.double()).reshape(-1) for t in block])
            if known is None:
                total += matrix @ matrix.T
            else:
                total[0] += matrix @ matrix[0]
    total[:, 0] = total[0]
    if known is not None:
        total[1:, 1:] = known
    return total


def combine_(grads: list[Tensor], directions: list[Tensor | None], weights: Tensor) -> None:
    """Reads R N bytes and writes N, whatever the weights are: torch cannot skip a row without asking the device."""
    num_rows = 1 + len(directions) // len(grads)
    rows = [*grads, *directions]
    wide = any(t is not None and t.dtype == torch.float64 for t in rows)
    w = weights.to(torch.float64 if wide else torch.float32)
    used = weights != 0
    unchanged = (weights[0] == 1) & ~used[1:].any()
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    for column in _columns(rows, num_rows):
        for block in _blocks(column, limit):
            g = block[0]
            assert g is not None
            total = torch.zeros(g.shape, dtype=w.dtype, device=g.device)
            for r, t in enumerate(block):
                if t is not None:
                    total += torch.where(used[r], w[r] * t.to(w.dtype), 0.0)
            g.copy_(torch.where(unchanged, g, total.to(g.dtype)))


def project_(
    grads: list[Tensor],
    directions: list[Tensor | None],
    method: str,
    gamma: float,
    eps: float,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    g = gram(rows, len(rows) // len(grads), known)
    weights = methods.solve(g, method, gamma, eps)
    combine_(grads, directions, weights)
    return g, weights


for _function in (gram, combine_, project_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
