"""Gram -> weights: the one step in which gradient-surgery methods differ.

Torch operations only, so it runs on any device, without a host synchronisation on CUDA. ``csrc/weights.h`` holds the
same rules for the native backends, and says why they are right. Weights are float64; ``w[0]`` scales the gradient,
``w[k]`` direction k. A Gram is [R, R], or [P, R, R] for P parts that are projected each by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-8  # squared sine under which a direction counts as dependent on the others; as in csrc/weights.h
NAMES = ("orthogonal", "conflict", "mix", "pcgrad")

Weighting = Callable[[Tensor], Tensor]
Method = str | tuple[str, float] | Weighting


class Rule(NamedTuple):
    """A method in the form that the ops take."""

    name: str
    gamma: float = 0.0
    eps: float = 0.0


def parse(method: Method, eps: float = 0.0) -> Rule | Weighting:
    """Check a user's ``method`` and ``eps``; raises ValueError or TypeError."""
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if isinstance(method, str):
        if method == "mix":
            raise ValueError('method "mix" needs its weight: pass ("mix", gamma)')
        if method not in NAMES:
            known = '"orthogonal", "conflict", "pcgrad", ("mix", gamma), or a callable'
            raise ValueError(f"unknown method {method!r}; known: {known}")
        return Rule(method, eps=float(eps))
    if isinstance(method, tuple):
        if len(method) != 2 or method[0] != "mix":
            raise ValueError(f'unknown method {method!r}; the only pair is ("mix", gamma)')
        gamma = float(method[1])
        if not abs(gamma) < float("inf"):
            raise ValueError(f'("mix", gamma) needs a finite gamma, got {gamma}')
        return Rule("mix", gamma=gamma)
    if not callable(method):
        raise TypeError(f"method must be a name, a pair or a callable, got {type(method).__name__}")
    return method


def apply_weighting(weighting: Weighting, gram: Tensor) -> Tensor:
    """[R] or [P, R] float64: weights of a user's callable, which maps an [R, R] Gram to [R] weights on any device.

    The callable sees the identity instead of a Gram that is not finite; where that or a weight is not finite, the
    weights are (1, 0, .., 0).

    Raises:
        ValueError: the callable returned something else.
    """
    grams, num_rows = as_parts(gram), gram.shape[-1]
    rows = []
    for one in torch.where(_finite(grams)[:, None], grams, torch.eye(num_rows).to(gram)):
        weights = weighting(one)
        if not isinstance(weights, Tensor) or weights.shape != (num_rows,):
            shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"method: the callable must return a tensor of shape ({num_rows},), got {shape}")
        rows.append(weights.detach().to(gram))
    stacked = torch.stack(rows) if rows else grams[:, 0]
    finite = _finite(grams) & stacked.isfinite().all(1, keepdim=True)
    return torch.where(finite, stacked, _untouched(stacked)).view(gram.shape[:-1])


def solve(gram: Tensor, method: str, gamma: float = 0.0, eps: float = 0.0) -> Tensor:
    """[K + 1] or [P, K + 1] float64: weights of a named method; (1, 0, .., 0) for a part that is not finite.

    ``"pcgrad"`` takes rows in ascending order, where the paper shuffles, because ranks must agree; without any conflict
    all its weights are 1. The other arguments are those of :func:`gradproj.project_`.
    """
    grams = as_parts(gram)
    if method == "mix":
        weights = torch.full_like(grams[:, 0], gamma)
        weights[:, 0] = 1.0
    elif method == "pcgrad":
        weights = _pcgrad(grams, eps)
    elif method not in ("orthogonal", "conflict"):
        raise ValueError(f"unknown method {method!r}; known: {', '.join(NAMES)}")
    elif gram.shape[-1] == 1:
        weights = torch.ones_like(grams[:, 0])
    elif gram.shape[-1] == 2:
        weights = _one_direction(grams, method, eps)
    else:
        weights = _many_directions(grams, method, eps)
    return torch.where(_finite(grams), weights, _untouched(weights)).view(gram.shape[:-1])


def as_parts(gram: Tensor) -> Tensor:
    """[P, R, R]: a Gram of the whole is one part. Raises ValueError for what is no Gram."""
    if gram.dim() not in (2, 3) or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise ValueError(f"gram must have shape [R, R] or [P, R, R], got {tuple(gram.shape)}")
    return gram if gram.dim() == 3 else gram[None]


def _finite(grams: Tensor) -> Tensor:
    """[P, 1] bool."""
    return grams.isfinite().flatten(1).all(1, keepdim=True)


def _untouched(weights: Tensor) -> Tensor:
    """(1, 0, .., 0) for every part, for which combine touches nothing."""
    return (torch.arange(weights.shape[1], device=weights.device) == 0).to(weights.dtype).expand_as(weights)


def _one_direction(grams: Tensor, method: str, eps: float) -> Tensor:
    product, length2 = grams[:, 0, 1], grams[:, 1, 1] + eps
    applies = length2 > 0
    if method == "conflict":
        applies = applies & (product < 0)
    weight = torch.where(applies, -product / torch.where(applies, length2, 1.0), 0.0)
    return torch.stack([torch.ones_like(weight), weight], dim=1)


def _pcgrad(grams: Tensor, eps: float) -> Tensor:
    """Row i of ``products`` holds the inner products of what is left of gradient i with all gradients."""
    products, weights = grams, torch.ones_like(grams[:, 0])
    index = torch.arange(grams.shape[1], device=grams.device)
    for j in range(grams.shape[1]):
        conflicts = (products[:, :, j] < 0) & (index != j)
        taken = torch.where(conflicts, products[:, :, j] / torch.where(conflicts, grams[:, j, j, None] + eps, 1.0), 0.0)
        products = products - taken[:, :, None] * grams[:, j, None, :]
        weights = weights - taken.sum(1, keepdim=True) * (index == j)
    return weights


def _many_directions(grams: Tensor, method: str, eps: float) -> Tensor:
    """Both solvers sweep the tableau [C b] of cosines: csrc/weights.h."""
    length2 = grams.diagonal(dim1=1, dim2=2)[:, 1:] + eps
    scale = torch.where(length2 > 0, length2, 1.0).rsqrt() * (length2 > 0)
    products = grams[:, 1:, 1:] + torch.diag_embed(torch.full_like(length2, eps))
    cosines = products * scale[:, None, :] * scale[:, :, None]
    table = torch.cat([cosines, (-grams[:, 1:, 0] * scale)[:, :, None]], dim=2)
    solved = torch.ones_like(grams[:, 0, :1], dtype=torch.bool)
    if method == "orthogonal":
        table, x = _solve_all(table)
    else:
        table, x, solved = _solve_nonnegative(table, 1e-12 * grams[:, 0, 0].sqrt())
    weights = torch.cat([torch.ones_like(x[:, :1]), x * scale], dim=1)

    # One step of iterative refinement, with the residual from the Gram itself.
    active = _active(table)
    left = (grams[:, 1:] @ weights[:, :, None])[:, :, 0] + eps * weights[:, 1:]
    residual = torch.where(active, -left * scale, 0.0)
    change = torch.where(active & solved, -(table[:, :, :-1] @ residual[:, :, None])[:, :, 0], 0.0)
    weights[:, 1:] += change * scale
    return weights.clamp(min=0.0) if method == "conflict" else weights


def _active(table: Tensor) -> Tensor:
    """[P, K] bool: the directions that the tableau is swept on."""
    return table.diagonal(dim1=1, dim2=2) < -0.5


def _sweep(table: Tensor, pivot: Tensor, moves: Tensor) -> Tensor:
    """Where ``moves[p]``, direction ``pivot[p]`` enters the active set of part p, or leaves it."""
    row = table.take_along_dim(pivot[:, None, None], dim=1)[:, 0]
    value = row.take_along_dim(pivot[:, None], dim=1)
    here = torch.arange(row.shape[1], device=row.device) == pivot[:, None]
    vector = torch.where(here, -value.sign(), row)
    cleared = torch.where(here[:, :-1, None] | here[:, None, :], 0.0, table)
    value = torch.where(moves[:, None], value, 1.0)
    swept = cleared - vector[:, :-1, None] * vector[:, None, :] / value[:, :, None]
    return torch.where(moves[:, None, None], swept, table)


def _may_ask(device: torch.device) -> bool:
    """Whether a loop may read values to stop early: on any device but the CPU that would synchronise."""
    return device.type == "cpu"


def _solve_all(table: Tensor) -> tuple[Tensor, Tensor]:
    """All directions enter; next is always the one with most outside the span of those that have entered."""
    ask = _may_ask(table.device)
    for _ in range(table.shape[1]):
        most, pivot = table.diagonal(dim1=1, dim2=2).max(1)
        moves = most > RANK_TOLERANCE
        if ask and not moves.any():
            break
        table = _sweep(table, pivot, moves)
    return table, torch.where(_active(table), table[:, :, -1], 0.0)


def _solve_nonnegative(table: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """argmin over y >= 0 of y' C y / 2 - b' y (Lawson & Hanson 1974, chapter 23), one sweep of every part a step.

    Returns the swept tableau, y [P, K], and [P, 1] whether y is the solution on the active set. When the bound on the
    number of steps came first, y is feasible but not yet the nearest. About K steps are usual; the bound is lower where
    the loop always runs in full.
    """
    num_parts, k, _ = table.shape
    index = torch.arange(k, device=table.device)
    y = table.new_zeros(num_parts, k)
    moves = torch.ones_like(y[:, 0], dtype=torch.bool)
    ask = _may_ask(table.device)
    for _ in range((10 if ask else 3) * (k + 1)):
        x, active = table[:, :, k], _active(table)
        blocks = active & (x <= 0)
        gap = torch.where(blocks & (y > 0), y - x, 1.0)
        step, leaves = torch.where(blocks, y / gap, torch.inf).min(1)
        leaving = step < torch.inf
        usable = ~active & (table.diagonal(dim1=1, dim2=2) > RANK_TOLERANCE)
        most, enters = torch.where(usable, x, -torch.inf).max(1)
        step = torch.where(leaving, step, 1.0)[:, None]
        stays = active & ~(leaving[:, None] & (index == leaves[:, None]))
        y = torch.where(stays, ((1 - step) * y + step * x).clamp(min=0.0), 0.0)
        moves = leaving | (most > slack)
        if ask and not moves.any():
            break
        table = _sweep(table, torch.where(leaving, leaves, enters), moves)
    return table, y, ~moves[:, None]
