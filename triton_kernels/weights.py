"""Gram -> weights: the closed form at K = 1 in one launch, everything else in torch operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj import methods


@triton.jit
def weights_kernel(gram, weights, conflict: tl.constexpr):
    """csrc/weights.h, solve_weights_k1, with eps = 0."""
    gg, gd, dd = tl.load(gram), tl.load(gram + 1), tl.load(gram + 3)
    infinity = float("inf")
    applies = (tl.abs(gg) < infinity) & (tl.abs(gd) < infinity) & (dd > 0.0) & (dd < infinity)
    if conflict:
        applies = applies & (gd < 0.0)
    tl.store(weights, 1.0)
    tl.store(weights + 1, tl.where(applies, -gd / tl.where(applies, dd, 1.0), 0.0))


def weights(gram: Tensor, method: str, gamma: float, eps: float) -> Tensor:
    """[R] float64, or [P, R] of a [P, R, R] Gram."""
    if gram.dim() == 3:
        return torch.stack([weights(part, method, gamma, eps) for part in gram])
    # A float argument of a Triton kernel is a float32: an eps goes the other way.
    if gram.shape[0] != 2 or method not in ("orthogonal", "conflict") or eps:
        return methods.solve(gram, method, gamma, eps)
    result = torch.empty(2, dtype=torch.float64, device=gram.device)
    with torch.cuda.device_of(result):
        weights_kernel[(1,)](gram.contiguous(), result, method == "conflict")
    return result
