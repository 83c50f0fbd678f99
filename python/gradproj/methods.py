"""Gram -> weights: the one step in which gradient-surgery methods differ.

Torch operations only, so that it runs on any device, and without a host synchronisation on CUDA. ``csrc/weights.h`` holds
the same rules for the native backends. Weights are float64; ``w[0]`` scales the gradient, ``w[k]`` direction k.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-8  # squared sine under which a direction counts as dependent on the others; as in csrc/weights.h
NAMES = ("orthogonal", "conflict", "mix")

Weighting = Callable[[Tensor], Tensor]
Method = str | tuple[str, float] | Weighting


class Rule(NamedTuple):
    """A method in the form that the ops take."""

    name: str
    gamma: float = 0.0
    eps: float = 0.0

    def __call__(self, gram: Tensor) -> Tensor:
        return solve(gram, self.name, self.gamma, self.eps)


def parse(method: Method, eps: float = 0.0) -> Rule | Weighting:
    """Check a user's ``method`` and ``eps``.

    Raises:
        ValueError: an unknown name, a ``("mix", gamma)`` without a finite gamma, a negative ``eps``.
        TypeError: neither a name, a pair nor a callable.
    """
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if isinstance(method, str):
        if method in ("orthogonal", "conflict"):
            return Rule(method, eps=float(eps))
        if method == "mix":
            raise ValueError('method "mix" needs its weight: pass ("mix", gamma)')
        raise ValueError(f'unknown method {method!r}; known: "orthogonal", "conflict", ("mix", gamma), or a callable')
    if isinstance(method, tuple):
        if len(method) != 2 or method[0] != "mix":
            raise ValueError(f'unknown method {method!r}; the only pair is ("mix", gamma)')
        gamma = float(method[1])
        if not abs(gamma) < float("inf"):
            raise ValueError(f'("mix", gamma) needs a finite gamma, got {gamma}')
        return Rule("mix", gamma=gamma)
    if callable(method):
        return method
    raise TypeError(f"method must be a name, a pair or a callable, got {type(method).__name__}")


def apply_weighting(weighting: Weighting, gram: Tensor) -> Tensor:
    """Weights of a user's callable, checked for shape and made safe: a non-finite Gram gives (1, 0, .., 0)."""
    weights = weighting(gram)
    if not isinstance(weights, Tensor) or weights.shape != (gram.shape[0],):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"method: the callable must return a tensor of shape ({gram.shape[0]},), got {shape}")
    return _unless_finite(gram, weights.detach().to(gram))


def solve(gram: Tensor, method: str, gamma: float = 0.0, eps: float = 0.0) -> Tensor:
    """Weights of a named method.

    Args:
        gram: [K + 1, K + 1] float64.
        method: ``"orthogonal"``, ``"conflict"`` or ``"mix"``.
        gamma: weight of every direction, for ``"mix"``.
        eps: added to every <d_k, d_k>; 0 is scale-free.
    Returns:
        [K + 1] float64 on the device of ``gram``.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for
    ``"conflict"``; Ouyang et al. 2022 (PTX) for ``"mix"``.
    """
    if method == "mix":
        weights = torch.full_like(gram[0], gamma)
        weights[0] = 1.0
        return _unless_finite(gram, weights)
    length2 = gram.diagonal()[1:] + eps
    scale = torch.where(length2 > 0, length2, 1.0).rsqrt() * (length2 > 0)
    cosines = (gram[1:, 1:] + torch.diag_embed(torch.full_like(length2, eps))) * scale * scale[:, None]
    target = -gram[1:, 0] * scale
    usable = scale > 0
    if method == "orthogonal":
        x = _solve_spd(cosines, target, usable)
    elif method == "conflict":
        x = _nonnegative(cosines, target, usable, 1e-12 * gram[0, 0].sqrt())
    else:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(NAMES)}")
    weights = torch.cat([torch.ones_like(x[:1]) if len(x) else gram.new_ones(1), x * scale])
    return _unless_finite(gram, weights)


def _unless_finite(gram: Tensor, weights: Tensor) -> Tensor:
    unchanged = torch.zeros_like(weights)
    unchanged[0] = 1.0
    return torch.where(gram.isfinite().all(), weights, unchanged)


def _solve_spd(matrix: Tensor, b: Tensor, chosen: Tensor) -> Tensor:
    """x with ``matrix[P, P] x[P] = b[P]`` on the chosen, independent rows P and 0 elsewhere.

    Gauss-Jordan with diagonal pivoting: K steps of a fixed number of operations, no data-dependent control flow.
    """
    k = len(b)
    table = torch.cat([matrix, b[:, None]], dim=1)
    waiting = chosen.clone()
    used = torch.zeros_like(chosen)
    index = torch.arange(k, device=b.device)
    for _ in range(k):
        pivot = torch.where(waiting, table[:, :k].diagonal(), -1.0).argmax().view(1)
        row, column = table.index_select(0, pivot), table.index_select(1, pivot)
        value = row.index_select(1, pivot)
        good = (value.view(()) > RANK_TOLERANCE) & waiting.index_select(0, pivot).view(())
        here = (index == pivot) & good
        row = row / torch.where(good, value, 1.0)
        table = torch.where(good, torch.where(here[:, None], row, table - column * row), table)
        used, waiting = used | here, waiting & ~here
    return torch.where(used, table[:, k], 0.0)


def _nonnegative(matrix: Tensor, b: Tensor, usable: Tensor, slack: Tensor) -> Tensor:
    """argmin over x >= 0 of x' matrix x / 2 - b' x: Lawson & Hanson 1974, chapter 23, one branch-free step at a time.

    A step adds the most violated row to the active set, or moves to the boundary and drops the rows that block. On the
    CPU it stops when done; on other devices it runs its bound of steps, because asking would synchronise.
    """
    k = len(b)
    x = torch.zeros_like(b)
    if k == 1:
        return torch.where(usable & (b > 0), b / torch.where(usable, matrix.diagonal(), 1.0), x)
    index = torch.arange(k, device=b.device)
    chosen = torch.zeros_like(usable)
    refused = ~usable  # dependent on the chosen rows: no use asking again until they change
    settled = torch.ones_like(b[0], dtype=torch.bool)
    for _ in range(4 * k + 1):
        residual = torch.where(chosen | refused, -1.0, b - matrix @ x)
        worst = residual.argmax()
        adding = settled & (residual.max() > slack)
        entering = adding & (index == worst)
        if b.device.type == "cpu" and bool(settled & ~adding):
            break
        chosen = chosen | entering
        trial = _solve_spd(matrix, b, chosen)
        blocking = chosen & (trial <= 0)
        settled = ~blocking.any()
        gap = torch.where(blocking, x - trial, 1.0)
        fraction = torch.where(blocking, torch.where(gap > 0, x / gap, 0.0), 1.0)
        step = fraction.min()
        x = torch.where(settled, torch.where(chosen, trial, 0.0), torch.where(chosen, x + step * (trial - x), x))
        drop = blocking & (fraction <= step)
        refused = ~usable | (drop & entering) | (refused & ~(settled & adding))
        chosen = chosen & ~drop
        x = torch.where(chosen, x, 0.0)
    return x
