"""W <- W - (W U - B) U^T for many weights in one launch: what W makes of the inputs that U spans becomes B."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj import torch_backend
from gradproj.triton_kernels.combine import narrow
from gradproj.triton_kernels.table import implement

ROWS = 32  # of a weight that a program takes: its second read of them comes from cache
COLUMNS = 64  # inputs that it takes at a time
RANKS = 64  # columns of U that it takes at a time
FIELDS = tl.constexpr(17)  # of a layer's line in the table
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def find_layer(table, layers, program):
    """The layer whose programs ``program`` is among: the last whose first is not behind it."""
    low = layers * 0
    high = layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(table + middle * FIELDS + 16) <= program:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def load_weight(line, rows, columns, outputs, inputs, dtype: tl.constexpr, even: tl.constexpr):
    """[ROWS, COLUMNS] of W, and where it lies."""
    w = tl.load(line).to(tl.pointer_type(dtype))
    if even:  # every row starts on a 16-byte boundary, and elements of a row are neighbours
        w = tl.multiple_of(w, 16)
        places = w + rows[:, None] * tl.multiple_of(tl.load(line + 7), 16) + columns[None, :]
    else:
        places = w + rows[:, None] * tl.load(line + 7) + columns[None, :] * tl.load(line + 8)
    mask = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    return tl.load(places, mask=mask, other=0.0), places, mask


@triton.jit
def moved_products(
    line, rows, ranks, outputs, inputs, rank, dtype: tl.constexpr, even: tl.constexpr,
    row_block: tl.constexpr, column_block: tl.constexpr, rank_block: tl.constexpr,
):  # fmt: skip
    """[ROWS, RANKS] of W U - B. Reads ROWS x inputs of W and inputs x RANKS of U; sums in float32."""
    u = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    step, stride = tl.load(line + 9), tl.load(line + 10)
    moved = tl.zeros([row_block, rank_block], dtype=tl.float32)
    for start in range(0, inputs, column_block):
        columns = start + tl.arange(0, column_block)
        w, _, _ = load_weight(line, rows, columns, outputs, inputs, dtype, even)
        mask = (columns < inputs)[:, None] & (ranks < rank)[None, :]
        basis = tl.load(u + columns[:, None] * step + ranks[None, :] * stride, mask=mask, other=0.0)
        moved = tl.dot(w.to(tl.float32), basis, moved, input_precision="tf32x3")
    mask = (rows < outputs)[:, None] & (ranks < rank)[None, :]
    if tl.load(line + 3) != 0:
        bias = tl.load(
            tl.load(line + 3).to(tl.pointer_type(dtype)) + rows * tl.load(line + 13), mask=rows < outputs, other=0.0
        )
        of_bias = tl.load(u + inputs * step + ranks * stride, mask=ranks < rank, other=0.0)
        moved += bias.to(tl.float32)[:, None] * of_bias[None, :]
    if tl.load(line + 2) != 0:
        target = tl.load(line + 2).to(tl.pointer_type(tl.float32))
        moved -= tl.load(
            target + rows[:, None] * tl.load(line + 11) + ranks[None, :] * tl.load(line + 12), mask=mask, other=0.0
        )
    return tl.where(mask, moved, 0.0)


@triton.jit(do_not_specialize=["layers"])
def pin_kernel(
    table, partial, layers, dtype: tl.constexpr, even: tl.constexpr, row_block: tl.constexpr,
    column_block: tl.constexpr, rank_block: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of one weight: reads them from memory once, again from cache, writes them once; per RANKS
    columns of U, which are orthogonal to all others, so that one block after the other is exact. Writes |W U - B|^2."""
    program = tl.program_id(0).to(tl.int64)
    line = table + find_layer(table, layers, program) * FIELDS
    outputs, inputs, rank = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)
    if even:
        inputs = tl.multiple_of(inputs, 16)
    rows = (program - tl.load(line + 16)) * row_block + tl.arange(0, row_block)
    u = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    step, stride = tl.load(line + 9), tl.load(line + 10)
    square = tl.zeros([row_block], dtype=tl.float64)
    for first in range(0, rank, rank_block):
        ranks = first + tl.arange(0, rank_block)
        moved = moved_products(
            line, rows, ranks, outputs, inputs, rank, dtype, even, row_block, column_block, rank_block
        )  # fmt: skip
        square += tl.sum(moved * moved, axis=1).to(tl.float64)
        for start in range(0, inputs, column_block):
            columns = start + tl.arange(0, column_block)
            mask = (ranks < rank)[:, None] & (columns < inputs)[None, :]
            basis = tl.load(u + columns[None, :] * step + ranks[:, None] * stride, mask=mask, other=0.0)
            w, places, there = load_weight(line, rows, columns, outputs, inputs, dtype, even)
            pinned = w.to(tl.float32) - tl.dot(moved, basis, input_precision="tf32x3")
            tl.store(places, narrow(pinned, dtype), mask=there)
        if tl.load(line + 3) != 0:
            places = tl.load(line + 3).to(tl.pointer_type(dtype)) + rows * tl.load(line + 13)
            of_bias = tl.load(u + inputs * step + ranks * stride, mask=ranks < rank, other=0.0)
            bias = tl.load(places, mask=rows < outputs, other=0.0).to(tl.float32)
            pinned = bias - tl.sum(moved * of_bias[None, :], axis=1)
            tl.store(places, narrow(pinned, dtype), mask=rows < outputs)
    tl.store(partial + program, tl.sum(square, axis=0))


@triton.jit
def pin_finish_kernel(table, partial, squares, block: tl.constexpr):
    """Adds up the programs of a layer, in fixed order."""
    line = table + tl.program_id(0) * FIELDS
    first, count = tl.load(line + 16), tl.load(line + 15)
    total = tl.zeros([block], dtype=tl.float64)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partial + first + index, mask=index < count, other=0.0)
    tl.store(squares + tl.load(line + 14), tl.sum(total, axis=0))


@implement
def pin_(
    weights: list[Tensor], bases: list[Tensor], targets: list[Tensor | None], biases: list[Tensor], biased: list[int]
) -> Tensor:
    """The op ``pin_``; see ``gradproj.ops``. One launch for all weights of one dtype and alignment; float64 goes to a BLAS."""
    wide = [k for k, w in enumerate(weights) if w.dtype == torch.float64]
    bias_of = dict(zip(biased, biases, strict=True))
    squares = torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device if weights else "cpu")
    if wide:
        some = [k for k in wide if k in bias_of]
        squares[wide] = torch_backend.pin_(
            *([row[k] for k in wide] for row in (weights, bases, targets)),
            [bias_of[k] for k in some],
            [wide.index(k) for k in some],
        )
    forms: dict[tuple, list[int]] = {}
    for k, w in enumerate(weights):
        if w.dtype != torch.float64 and w.numel() and bases[k].shape[1]:
            forms.setdefault((w.dtype, _even(w)), []).append(k)
    for (dtype, even), mine in forms.items():
        held = [_as_float32(t) for k in mine for t in (bases[k], targets[k])]  # alive until the launch
        lines, programs = [], 0
        for at, k in enumerate(mine):
            lines.append(_line(weights[k], *held[2 * at : 2 * at + 2], bias_of.get(k), k, programs))
            programs += lines[-1][15]
        table = torch.from_numpy(np.array(lines, dtype=np.int64)).to(squares.device, non_blocking=True)
        partial = torch.empty(programs, dtype=torch.float64, device=squares.device)
        with torch.cuda.device_of(squares):
            pin_kernel[(programs,)](
                table, partial, len(mine), _TYPES[dtype], even, ROWS, COLUMNS, RANKS, num_warps=4, num_stages=3
            )  # fmt: skip
            pin_finish_kernel[(len(mine),)](table, partial, squares, 256)
    return squares


def _as_float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _even(w: Tensor) -> bool:
    return w.stride(1) == 1 and w.stride(0) % 16 == 0 and w.shape[1] % 16 == 0 and w.data_ptr() % 16 == 0


def _line(w: Tensor, u: Tensor, target: Tensor | None, bias: Tensor | None, number: int, first: int) -> list[int]:
    addresses = [0 if t is None else t.data_ptr() for t in (w, u, target, bias)]
    of_target = (0, 0) if target is None else target.stride()
    of_bias = 0 if bias is None else bias.stride(0)
    programs = -(-w.shape[0] // ROWS)
    return [*addresses, *w.shape, u.shape[1], *w.stride(), *u.stride(), *of_target, of_bias, number, programs, first]
