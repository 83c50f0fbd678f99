"""The ops in plain torch: they run wherever torch runs, with nothing built.

Columns are walked in chunks of at most ``_CHUNK_BYTES`` of float64, so that the extra memory does not grow with N.
"""

import contextlib
import threading
from collections.abc import Iterator
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradproj.kernels import methods
from gradproj.kernels.ops import implement

_CHUNK_BYTES = 1 << 18
_COLUMNS = 768  # of a 16-bit weight that are widened at a time on a CPU
_BATCH = 8  # with so many layers that are alike, batched products on copies are faster than products one by one

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # W, U, B, bias
Column = list[Any]  # of every row a tensor or None, or a chunk of those


def gram(rows, num_rows, gram_dd=None, part=(), num_parts=0) -> Tensor:
    """Reads R N bytes. Products and sums in float64, one matrix product per chunk."""
    device = next(t for t in rows if t is not None).device
    total = torch.zeros(max(1, num_parts), num_rows, num_rows, dtype=torch.float64, device=device)
    for p, chunk in _chunks(rows, num_rows, part):
        shape = next(t for t in chunk if t is not None).shape
        zeros = torch.zeros((), dtype=torch.float64, device=device).expand(shape)
        matrix = torch.stack([(zeros if t is None else t.double()).reshape(-1) for t in chunk])
        if gram_dd is None:
            total[p] += matrix @ matrix.T
        else:
            total[p, 0] += matrix @ matrix[0]
    total[:, :, 0] = total[:, 0]
    if gram_dd is not None:
        total[:, 1:, 1:] = gram_dd
    return total if num_parts else total[0]


def combine_(grads, directions, weights, part=(), num_parts=0) -> None:
    """Reads R N bytes and writes N, whatever the weights are: torch cannot skip a row without asking the device."""
    rows, num_rows = [*grads, *directions], 1 + len(directions) // len(grads)
    wide = any(t is not None and t.dtype == torch.float64 for t in rows)
    dtype = torch.float64 if wide else torch.float32
    weights = weights.view(-1, num_rows)
    used = weights != 0
    unchanged = (weights[:, 0] == 1) & ~used[:, 1:].any(dim=1)
    for p, chunk in _chunks(rows, num_rows, part):
        g = chunk[0]
        total = torch.zeros(g.shape, dtype=dtype, device=g.device)
        for r, t in enumerate(chunk):
            if t is not None:
                total += torch.where(used[p, r], weights[p, r].to(dtype) * t.to(dtype), 0.0)
        g.copy_(torch.where(unchanged[p], g, total.to(g.dtype)))


def project_(grads, directions, method, gamma, eps, gram_dd=None, part=(), num_parts=0) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    products = gram(rows, len(rows) // len(grads), gram_dd, part, num_parts)
    weights = methods.solve(products, method, gamma, eps)
    combine_(grads, directions, weights, part, num_parts)
    return products, weights


def _chunks(rows: Column, num_rows: int, part) -> Iterator[tuple[int, Column]]:
    """The part and the tensors of every chunk of every column that has a tensor."""
    count = len(rows) // num_rows
    limit = max(1, _CHUNK_BYTES // (8 * num_rows))
    for i in range(count):
        for chunk in _cut(rows[i::count], limit):
            yield part[i] if part else 0, chunk


def _cut(column: Column, limit: int) -> Iterator[Column]:
    """Views of at most ``limit`` elements, which can be written; flat where all strides allow it."""
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
        dim = max(range(len(shape)), key=shape.__getitem__)
        halves = [(None, None) if t is None else t.tensor_split([shape[dim] // 2], dim) for t in column]
        for half in zip(*halves, strict=True):
            yield from _cut([*half], limit)


def pin_(weights, bases, targets, biases, biased) -> Tensor:
    """Two matrix products per block of a weight's rows, so that on a CPU the second finds the block in cache. Small
    layers that are alike take batched products on copies: calls cost more than their elements."""
    if not weights:
        return torch.zeros(0, dtype=torch.float64)
    device_type = weights[0].device.type
    limit = _pin_bytes(device_type)
    small = limit >> 7
    bias_of = dict(zip(biased, biases, strict=True))
    bases = [u if u.dim() == 2 else u.sum(0, dtype=torch.float32) for u in bases]
    layers: list[Layer] = [
        (*layer, bias_of.get(k)) for k, layer in enumerate(zip(weights, bases, targets, strict=True))
    ]
    alike: dict[Any, list[int]] = {}
    for k, (weight, basis, target, bias) in enumerate(layers):
        form = weight.shape, basis.shape, weight.dtype, target is None, bias is None
        alike.setdefault(k if weight.numel() > small else form, []).append(k)
    batches: list[list[int]] = []
    large: list[int] = []
    alone: list[int] = []  # small layers that few others are like
    for group in alike.values():
        weight, basis, *_ = layers[group[0]]
        (outputs, inputs), rank = weight.shape, basis.shape[1]
        # A layer takes copies of W, U, B and the bias in the type of the products, and W U.
        size = max(4, weight.itemsize) * ((outputs + rank) * (inputs + 1) + 2 * outputs * rank)
        most = max(1, limit // (1 + size))
        for start in range(0, len(group), most):
            some = group[start : start + most]
            if len(some) >= _BATCH:
                batches.append(some)
            elif weight.numel() > small:
                large += some
            else:
                alone += some
    with _exact_products(device_type):
        squares = [_pin_batch([layers[k] for k in batch]) for batch in batches]
        squares += [_pin_blocks(*layers[k], limit) for k in large]
        moved = [_pin_block(*layers[k]) for k in alone]
    if moved:
        squares.append(torch.stack(torch._foreach_norm(moved)).square())
    found = torch.cat(squares).double()
    order = [*chain.from_iterable(batches), *large, *alone]
    if order == list(range(len(order))):
        return found
    place = dict(zip(order, found.unbind(), strict=True))
    return torch.stack([place[k] for k in range(len(order))])


def _pin_bytes(device_type: str) -> int:
    """Limit for temporaries: on a CPU they should stay in cache, elsewhere a launch should have enough to do."""
    return 1 << 20 if device_type == "cpu" else 32 << 20


def _pin_batch(layers: list[Layer]) -> Tensor:
    """|W U - B|^2 of layers that are alike."""
    dtype = torch.promote_types(layers[0][0].dtype, torch.float32)
    weights, bases, targets, biases = zip(*layers, strict=True)
    w, u = (torch.stack(row).to(dtype) for row in (weights, bases))
    of_inputs = u if biases[0] is None else u[:, :-1]
    if targets[0] is None:
        moved = torch.bmm(w, of_inputs)
    else:
        moved = torch.baddbmm(torch.stack(targets).to(dtype), w, of_inputs, beta=-1.0)
    if biases[0] is not None:
        bias, of_bias = torch.stack(biases).to(dtype)[:, :, None], u[:, -1:]
        moved.baddbmm_(bias, of_bias)
        bias.baddbmm_(moved, of_bias.mT, alpha=-1.0)
        torch._foreach_copy_(biases, bias[:, :, 0].unbind())
    w.baddbmm_(moved, of_inputs.mT, alpha=-1.0)
    torch._foreach_copy_(weights, w.unbind())
    return moved.square_().sum(dim=(1, 2))


def _block_rows(limit: int, rank: int, inputs: int, dtype: torch.dtype) -> int:
    """Rows of a weight in a block: each takes a row of W U, and a copy in float32 if it is a 16-bit one."""
    held = 4 * (rank + inputs) if dtype.itemsize == 2 else dtype.itemsize * rank
    return max(1, limit // max(1, held))


def _pin_block(weight: Tensor, basis: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
    """Pins ``weight`` and ``bias``; returns W U - B before."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide, basis = weight.to(dtype), basis.to(dtype)
    of_inputs = basis if bias is None else basis[:-1]
    if target is None:
        moved = torch.mm(wide, of_inputs)
    else:
        moved = torch.addmm(target.to(dtype), wide, of_inputs, beta=-1.0)
    if bias is not None:
        _pin_bias(bias, moved, basis[-1])
    wide.addmm_(moved, of_inputs.T, alpha=-1.0)
    if wide is not weight:
        weight.copy_(wide)
    return moved


def _pin_columns(weight: Tensor, basis: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
    """:func:`_pin_block` of a 16-bit weight, whose columns are widened some at a time, twice: that costs little, and
    within the same memory a block has more rows, for which a BLAS arranges U once."""
    parts = [*zip(weight.split(_COLUMNS, 1), basis[: weight.shape[1]].split(_COLUMNS), strict=True)]
    moved = basis.new_zeros(weight.shape[0], basis.shape[1]) if target is None else target.to(basis.dtype).neg()
    for some, of_inputs in parts:
        moved.addmm_(some.to(basis.dtype), of_inputs)
    if bias is not None:
        _pin_bias(bias, moved, basis[-1])
    for some, of_inputs in parts:
        some.copy_(some.to(basis.dtype).addmm_(moved, of_inputs.T, alpha=-1.0))
    return moved


def _pin_bias(bias: Tensor, moved: Tensor, of_bias: Tensor) -> None:
    """Adds the bias's product to ``moved``, and pins the bias."""
    wide = bias.to(moved.dtype)
    moved.addr_(wide, of_bias)
    wide.addmv_(moved, of_bias, alpha=-1.0)
    if wide is not bias:
        bias.copy_(wide)


def _pin_blocks(weight: Tensor, basis: Tensor, target: Tensor | None, bias: Tensor | None, limit: int) -> Tensor:
    """[1]: |W U - B|^2, one block of rows after the other."""
    outputs, inputs = weight.shape
    split = weight.device.type == "cpu" and weight.dtype.itemsize == 2 and inputs > _COLUMNS
    pin_block = _pin_columns if split else _pin_block
    rows = _block_rows(limit, basis.shape[1], _COLUMNS if split else inputs, weight.dtype)
    if outputs <= rows and not split:
        flat = _pin_block(weight, basis, target, bias).view(-1)
        return torch.dot(flat, flat).view(1)
    basis = basis.to(torch.promote_types(weight.dtype, torch.float32))
    squares = []
    rows = -(-outputs // -(-outputs // rows))  # no small rest
    for start in range(0, outputs, rows):
        block, goal, shift = (None if t is None else t[start : start + rows] for t in (weight, target, bias))
        flat = pin_block(block, basis, goal, shift).view(-1)  # type: ignore[arg-type]
        squares.append(torch.dot(flat, flat))
    return torch.stack(squares).sum(0, keepdim=True, dtype=torch.float64)


_precision_lock = threading.Lock()


@contextlib.contextmanager
def _exact_products(device_type: str) -> Iterator[None]:
    """Matrix products in the type of their factors: no autocast, and no TF32 on a GPU."""
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
        matmul = torch.backends.cuda.matmul
        if device_type != "cuda" or matmul.fp32_precision == "ieee":
            yield
            return
        with _precision_lock:  # the setting is the process's: another thread must not take this one for the user's
            before = matmul.fp32_precision
            matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                matmul.fp32_precision = "none"  # inherited from torch.backends.fp32_precision
                if matmul.fp32_precision != before:
                    matmul.fp32_precision = before


for _function in (gram, combine_, project_, pin_):
    implement("gradproj_torch", _function.__name__, _function, "CompositeExplicitAutograd")
implement("gradproj_torch", "weights", methods.solve, "CompositeExplicitAutograd")
