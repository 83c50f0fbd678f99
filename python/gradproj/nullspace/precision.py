"""Products in the operands' own precision, whatever surrounds them."""

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products inside are of the operands' own dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
