"""Gram -> weights: one program a part, the tableau in registers. csrc/weights.h says what is computed, and why."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.kernels import methods
from gradproj.triton_kernels.op import implement

METHODS = ("orthogonal", "conflict", "mix")
MAX_DIRECTIONS = 64  # a tableau of twice that would not fit the registers of a program
TOLERANCE = tl.constexpr(methods.RANK_TOLERANCE)


@triton.jit
def solve(gram_ptr, weights_ptr, num_rows, gamma, eps, method: tl.constexpr, block: tl.constexpr):
    """Weights of one Gram, by all threads of a program. ``block``: a power of two >= the number of directions."""
    k = tl.arange(0, block)
    i, j = k[:, None], k[None, :]
    inside = k < num_rows - 1
    within = (i < num_rows - 1) & (j < num_rows - 1)
    gg = tl.load(gram_ptr)
    gd = tl.load(gram_ptr + k + 1, mask=inside, other=0.0)
    dd = tl.load(gram_ptr + (i + 1) * num_rows + j + 1, mask=within, other=0.0)
    wrong = tl.sum(is_wrong(dd), axis=1) + is_wrong(gd)
    finite = tl.sum(wrong, axis=0) + is_wrong(gg) == 0
    if method == "mix":
        w = tl.zeros([block], dtype=tl.float64) + gamma
    else:
        gg, gd, dd = tl.where(finite, gg, 0.0), tl.where(finite, gd, 0.0), tl.where(finite, dd, 0.0)
        dd += tl.where((i == j) & within, tl.full([], eps, tl.float64), 0.0)
        if block == 1:
            w = solve_one(gd, diagonal_of(dd, k), method)
        else:
            w = solve_finite(gg, gd, dd, k, 10 * num_rows, method, block)
    tl.store(weights_ptr, tl.full([], 1.0, tl.float64))
    tl.store(weights_ptr + 1 + k, tl.where(finite, w, 0.0), mask=inside)


@triton.jit
def is_wrong(x):
    return tl.where(tl.abs(x) < float("inf"), 0, 1).to(tl.int32)


@triton.jit
def solve_one(gd, length2, method: tl.constexpr):
    """Weight of the only direction, in closed form."""
    applies = length2 > 0.0
    if method == "conflict":
        applies = applies & (gd < 0.0)
    return tl.where(applies, -gd / tl.where(applies, length2, 1.0), 0.0)


@triton.jit
def solve_finite(gg, gd, dd, k, steps, method: tl.constexpr, block: tl.constexpr):
    """Weights of the directions. A step is a sweep: block^2 independent operations and a few sums over as many."""
    length2 = diagonal_of(dd, k)
    scale = tl.where(length2 > 0.0, 1.0 / tl.sqrt(tl.where(length2 > 0.0, length2, 1.0)), 0.0)
    table = dd * scale[:, None] * scale[None, :]
    last = -gd * scale  # of the tableau: x where swept, the residual elsewhere
    slack = 1e-12 * tl.sqrt(gg)
    y = tl.zeros([block], dtype=tl.float64)
    while steps > 0:
        diagonal = diagonal_of(table, k)
        active = diagonal < -0.5
        if method == "conflict":
            y, pivot, moves = next_nonnegative(diagonal, active, last, y, slack, k)
        else:
            y = tl.where(active, last, 0.0)
            most, pivot = tl.max(diagonal, axis=0, return_indices=True)
            moves = most > TOLERANCE
        if moves:
            table, last = sweep(table, last, pivot, k)
            steps -= 1
        else:
            steps = -1

    # Unless the bound of steps came first: one step of iterative refinement, with the residual from the Gram itself.
    active = diagonal_of(table, k) < -0.5
    w = y * scale
    residual = tl.where(active & (steps < 0), -(gd + tl.sum(dd * w[None, :], axis=1)) * scale, 0.0)
    w += tl.where(active, -tl.sum(table * residual[None, :], axis=1), 0.0) * scale
    if method == "conflict":
        w = tl.maximum(w, 0.0)
    return w


@triton.jit
def next_nonnegative(diagonal, active, last, y, slack, k):
    """A step of Lawson & Hanson: y, moved towards the solution on the active set, and the direction that leaves or
    enters."""
    infinity = float("inf")
    blocks = active & (last <= 0.0)
    gap = tl.where(blocks & (y > 0.0), y - last, 1.0)
    step, leaves = tl.min(tl.where(blocks, y / gap, infinity), axis=0, return_indices=True)
    leaving = step < infinity
    usable = (diagonal > TOLERANCE) & (active == 0)
    most, enters = tl.max(tl.where(usable, last, -infinity), axis=0, return_indices=True)
    step = tl.where(leaving, step, 1.0)
    moved = (1.0 - step) * y + step * last
    stays = active & ((k != leaves) | (leaving == 0)) & (moved > 0.0)
    return tl.where(stays, moved, 0.0), tl.where(leaving, leaves, enters), leaving | (most > slack)


@triton.jit
def sweep(table, last, pivot, k):
    """Takes direction ``pivot`` into the active set, or out of it."""
    i, j, here = k[:, None], k[None, :], k == pivot
    column = tl.sum(tl.where(j == pivot, table, 0.0), axis=1)
    row = tl.sum(tl.where(i == pivot, table, 0.0), axis=0)
    value = tl.sum(tl.where(here, column, 0.0), axis=0)
    taken = tl.sum(tl.where(here, last, 0.0), axis=0)
    sign = tl.where(value > 0.0, -1.0, 1.0)
    column, row = tl.where(here, sign, column), tl.where(here, sign, row)
    table = tl.where((i == pivot) | (j == pivot), 0.0, table) - column[:, None] * row[None, :] / value
    return table, tl.where(here, 0.0, last) - column * taken / value


@triton.jit
def diagonal_of(table, k):
    return tl.sum(tl.where(k[:, None] == k[None, :], table, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def weights_kernel(
    gram_ptr, weights_ptr, num_rows, gamma: tl.float64, eps: tl.float64, method: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    solve(gram_ptr + part * num_rows * num_rows, weights_ptr + part * num_rows, num_rows, gamma, eps, method, block)


@implement
def weights(gram: Tensor, method: str, gamma: float, eps: float) -> Tensor:
    """The op ``weights``; see ``gradproj.kernels.ops``."""
    parts = methods.as_parts(gram).contiguous()
    num_rows = parts.shape[-1]
    if method not in METHODS or not 2 <= num_rows <= MAX_DIRECTIONS + 1:
        return methods.solve(gram, method, gamma, eps)
    result = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    if len(parts):
        block = triton.next_power_of_2(num_rows - 1)
        warps = max(1, block * block // 256)  # 8 entries a thread
        with torch.cuda.device_of(result):
            weights_kernel[(len(parts),)](parts, result, num_rows, gamma, eps, method, block, num_warps=warps)
    return result
