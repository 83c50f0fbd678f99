"""Products in the operands' own precision, whatever surrounds them."""

import contextlib

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products inside are of the operands' own dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def wide(t: Tensor) -> Tensor:
    """float32, or float64 if it is that."""
    return t if t.dtype == torch.float64 else t.float()


def eps(t: Tensor) -> float:
    """Of the numbers that a product takes of ``t``: autocast's, and on a GPU TF32's, are coarser than its own."""
    if not t.dtype.is_floating_point:
        return 0.0
    kind, own = t.device.type, torch.finfo(t.dtype).eps
    if t.dtype == torch.float64:
        return own
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return max(own, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return max(own, 2.0**-10) if kind == "cuda" else own
