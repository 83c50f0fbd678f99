"""The ops in plain torch: runs wherever torch runs, with nothing built.

Every buffer is walked in blocks of at most ``_BLOCK_BYTES`` of float64, so the extra memory does not grow with N.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import methods
from gradproj.float8 import BLOCK
from gradproj.ops import implement

_BLOCK_BYTES = 1 << 18


class _Column(NamedTuple):
    """One buffer of every row, and of the base if there is one; which part it belongs to."""

    tensors: list
    part: int


def _rows(rows, num_rows: int, base, scales, parts) -> Iterator[_Column]:
    """Columns with any tensor in them, float8 buffers as views that still know their scales."""
    n = len(rows) // num_rows
    for i in range(n):
        tensors = rows[i::n]
        if scales is not None:
            tensors = [_Scaled.of(t, s) for t, s in zip(tensors, scales[i::n], strict=True)]
        if base is not None:
            tensors = [*tensors, base[i]]
        if any(t is not None for t in tensors):
            yield _Column(tensors, parts[i] if parts else 0)


class _Scaled:
    """A float8 buffer with its scales, cut as a tensor is; ``double()`` is what it stands for."""

    def __init__(self, codes: Tensor, scales: Tensor, start: int):
        self.codes, self.scales, self.start = codes, scales, start
        self.shape, self.device, self.dtype = codes.shape, codes.device, codes.dtype

    @staticmethod
    def of(codes: Tensor | None, scales: Tensor | None):
        return codes if codes is None or scales is None else _Scaled(codes, scales, int(codes.storage_offset()))

    def _like(self, codes: Tensor) -> "_Scaled":
        return _Scaled(codes, self.scales, self.start)

    def is_contiguous(self) -> bool:
        return self.codes.is_contiguous()

    def view(self, *shape) -> "_Scaled":
        return self._like(self.codes.view(*shape))

    def __getitem__(self, index) -> "_Scaled":
        return self._like(self.codes[index])

    def narrow(self, dim: int, start: int, length: int) -> "_Scaled":
        return self._like(self.codes.narrow(dim, start, length))

    def double(self) -> Tensor:
        offset = torch.full(self.codes.shape, int(self.codes.storage_offset()) - self.start, device=self.device)
        for dim, (size, stride) in enumerate(zip(self.codes.shape, self.codes.stride(), strict=True)):
            index = torch.arange(size, device=self.device) * stride
            offset += index.view([-1 if d == dim else 1 for d in range(self.codes.dim())])
        return self.codes.double() * self.scales.double()[offset // BLOCK]


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


def gram(rows, num_rows, known=None, base=None, scales=None, parts=(), num_parts=0) -> Tensor:
    """Reads R N bytes. Products and sums in float64, one matrix product per block."""
    device = next(t for t in rows if t is not None).device
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    total = torch.zeros(max(1, num_parts), num_rows, num_rows, dtype=torch.float64, device=device)
    for column in _rows(rows, num_rows, base, scales, parts):
        products = total[column.part]
        for block in _blocks(column.tensors, limit):
            like = next(t for t in block if t is not None)
            zeros = torch.zeros((), dtype=torch.float64, device=device).expand(like.shape)
            values = [zeros if t is None else t.double() for t in block]
            if base is not None:
                values[0] = values.pop() - values[0]
            matrix = torch.stack([v.reshape(-1) for v in values])
            if known is None:
                products += matrix @ matrix.T
            else:
                products[0] += matrix @ matrix[0]
    total[:, :, 0] = total[:, 0]
    if known is not None:
        total[:, 1:, 1:] = known
    return total if num_parts else total[0]


def combine_(grads, directions, weights, base=None, scales=None, parts=(), num_parts=0) -> None:
    """Reads R N bytes and writes N, whatever the weights are: torch cannot skip a row without asking the device."""
    num_rows = 1 + len(directions) // len(grads)
    rows = [*grads, *directions]
    if scales is not None:
        scales = [*(None for _ in grads), *scales]
    wide = any(t is not None and t.dtype == torch.float64 for t in [*rows, *(base or [])])
    dtype = torch.float64 if wide else torch.float32
    weights = weights.view(-1, num_rows)
    used = weights != 0
    unchanged = (weights[:, 0] == 1) & ~used[:, 1:].any(dim=1)
    limit = max(1, _BLOCK_BYTES // (8 * num_rows))
    for column in _rows(rows, num_rows, base, scales, parts):
        w, read, same = weights[column.part].to(dtype), used[column.part], unchanged[column.part]
        for block in _blocks(column.tensors, limit):
            g = block[0]
            origin = None if base is None else block.pop().to(dtype)
            total = torch.zeros(g.shape, dtype=dtype, device=g.device)
            for r, t in enumerate(block):
                if t is not None:
                    value = t.double().to(dtype) if isinstance(t, _Scaled) else t.to(dtype)
                    value = origin - value if origin is not None and r == 0 else value
                    total += torch.where(read[r], w[r] * value, 0.0)
            total = total if origin is None else origin - total
            g.copy_(torch.where(same, g, total.to(g.dtype)))


def project_(
    grads, directions, method, gamma, eps, known=None, base=None, scales=None, parts=(), num_parts=0
) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    all_scales = None if scales is None else [*(None for _ in grads), *scales]
    g = gram(rows, len(rows) // len(grads), known, base, all_scales, parts, num_parts)
    weights = methods.solve(g, method, gamma, eps)
    combine_(grads, directions, weights, base, scales, parts, num_parts)
    return g, weights


for _function in (gram, combine_, project_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
