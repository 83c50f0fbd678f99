"""Gram -> weights: one program per part, the tableau in registers. csrc/weights.h says what is computed, and why."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj import methods

MAX_DIRECTIONS = 64  # a tableau of twice that would not fit the registers of a program
CLOSED_FORMS = ("orthogonal", "conflict", "mix")  # at K = 1
TOLERANCE = tl.constexpr(methods.RANK_TOLERANCE)


@triton.jit
def closed_form(gg, gd, dd, gamma, eps, method: tl.constexpr):
    """The weight of the only direction: csrc/weights.h, solve_weights_k1."""
    infinity = float("inf")
    applies = (tl.abs(gg) < infinity) & (tl.abs(gd) < infinity) & (tl.abs(dd) < infinity)
    if method == "mix":
        weight = gamma
    else:
        length2 = dd + eps
        applies = applies & (length2 > 0.0)
        if method == "conflict":
            applies = applies & (gd < 0.0)
        weight = -gd / tl.where(applies, length2, 1.0)
    return tl.where(applies, weight, 0.0)


@triton.jit
def one_direction_kernel(gram, weights, gamma: tl.float64, eps: tl.float64, method: tl.constexpr):
    """K = 1 of a Gram that is there already; a projection's own comes with its weights."""
    part = tl.program_id(0).to(tl.int64)
    gram += part * 4
    gg, gd, dd = tl.load(gram), tl.load(gram + 1), tl.load(gram + 3)
    # As tensors: triton's interpreter makes a float32 of a number.
    weight = closed_form(gg, gd, dd, tl.full([], gamma, tl.float64), tl.full([], eps, tl.float64), method)
    tl.store(weights + part * 2, tl.full([], 1.0, tl.float64))
    tl.store(weights + part * 2 + 1, weight)


@triton.jit
def pick(x, k, at):
    """x[at], for one index."""
    return tl.sum(tl.where(k == at, x, 0.0), axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def many_directions_kernel(gram, weights, num_rows, eps: tl.float64, method: tl.constexpr, block: tl.constexpr):
    """Reads the Gram twice. A step of the loop is a sweep: block^2 independent operations and a few sums over as many."""
    gram += tl.program_id(0).to(tl.int64) * num_rows * num_rows
    weights += tl.program_id(0).to(tl.int64) * num_rows
    k = tl.arange(0, block)
    i, j = k[:, None], k[None, :]
    inside = k < num_rows - 1
    within = (i < num_rows - 1) & (j < num_rows - 1)
    infinity = float("inf")
    added = tl.full([], eps, tl.float64)

    gg = tl.load(gram)
    to_gradient = tl.load(gram + (k + 1) * num_rows, mask=inside, other=0.0)
    products = tl.load(gram + (i + 1) * num_rows + j + 1, mask=within, other=0.0)
    wrong = tl.sum(tl.where(tl.abs(products) < infinity, 0, 1).to(tl.int32), axis=1)
    wrong = tl.sum(wrong + tl.where(tl.abs(to_gradient) < infinity, 0, 1).to(tl.int32), axis=0)
    finite = (wrong == 0) & (tl.abs(gg) < infinity)
    to_gradient = tl.where(finite, to_gradient, 0.0)

    length2 = tl.sum(tl.where(i == j, products, 0.0), axis=1) + tl.where(inside, added, 0.0)
    usable = finite & (length2 > 0.0)
    scale = tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, length2, 1.0)), 0.0)
    table = tl.where(finite, products, 0.0) + tl.where((i == j) & within, added, 0.0)
    table = table * scale[:, None] * scale[None, :]
    last = -to_gradient * scale  # of the tableau: x where swept, the residual elsewhere
    slack = 1e-12 * tl.sqrt(tl.where(finite, gg, 0.0))
    y = tl.zeros([block], dtype=tl.float64)
    settled = finite & False
    left = 10 * num_rows
    while left > 0:
        diagonal = tl.sum(tl.where(i == j, table, 0.0), axis=1)
        active = diagonal < -0.5
        if method == "conflict":
            blocks = active & (last <= 0.0)
            gap = tl.where(blocks & (y > 0.0), y - last, 1.0)
            fraction = tl.where(blocks, y / gap, infinity)
            step, leaves = tl.min(fraction, axis=0, return_indices=True)
            leaving = step < infinity
            usable = (diagonal > TOLERANCE) & (active == 0)
            most, enters = tl.max(tl.where(usable, last, -infinity), axis=0, return_indices=True)
            pivot = tl.where(leaving, leaves, enters)
            step = tl.where(leaving, step, 1.0)
            moved = (1.0 - step) * y + step * last
            stays = active & ((k != leaves) | (leaving == 0)) & (moved > 0.0)
            y = tl.where(stays, moved, 0.0)
            moves = leaving | (most > slack)
        else:
            most, pivot = tl.max(diagonal, axis=0, return_indices=True)
            moves = most > TOLERANCE
            y = tl.where(active, last, 0.0)
        if moves:
            value = pick(diagonal, k, pivot)
            sign = tl.where(value > 0.0, -1.0, 1.0)
            column = tl.where(k == pivot, sign, tl.sum(tl.where(j == pivot, table, 0.0), axis=1))
            row = tl.where(k == pivot, sign, tl.sum(tl.where(i == pivot, table, 0.0), axis=0))
            taken = pick(last, k, pivot)
            table = tl.where((i == pivot) | (j == pivot), 0.0, table) - column[:, None] * row[None, :] / value
            last = tl.where(k == pivot, 0.0, last) - column * taken / value
            left -= 1
        else:
            settled = finite
            left = 0

    # One step of iterative refinement, with the residual from the Gram itself.
    active = tl.sum(tl.where(i == j, table, 0.0), axis=1) < -0.5
    w = y * scale
    products = tl.where(finite, tl.load(gram + (i + 1) * num_rows + j + 1, mask=within, other=0.0), 0.0)
    residual = to_gradient + added * w + tl.sum(products * w[None, :], axis=1)
    residual = tl.where(active & settled, -residual * scale, 0.0)
    w += tl.where(active, -tl.sum(table * residual[None, :], axis=1), 0.0) * scale
    if method == "conflict":
        w = tl.maximum(w, 0.0)
    tl.store(weights, tl.full([], 1.0, tl.float64))
    tl.store(weights + 1 + k, tl.where(finite, w, 0.0), mask=inside)


def weights(gram: Tensor, method: str, gamma: float, eps: float) -> Tensor:
    """[R] or [P, R] float64. Without a kernel of its own: ``"mix"`` and ``"pcgrad"``, and more than 64 directions."""
    parts = methods.as_parts(gram).contiguous()
    num_rows = parts.shape[-1]
    closed = num_rows == 2 and method in CLOSED_FORMS
    if not closed and (method not in ("orthogonal", "conflict") or not 2 <= num_rows <= MAX_DIRECTIONS + 1):
        return methods.solve(gram, method, gamma, eps)
    result = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    if not len(parts):
        return result
    with torch.cuda.device_of(result):
        if closed:
            one_direction_kernel[(len(parts),)](parts, result, gamma, eps, method)
        else:
            block = triton.next_power_of_2(num_rows - 1)
            warps = max(1, block * block // 256)  # 8 entries a thread
            many_directions_kernel[(len(parts),)](parts, result, num_rows, eps, method, block, num_warps=warps)
    return result
