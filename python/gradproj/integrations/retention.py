"""How much of what a model could do it still can: the loss of a few sequences that were held out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gradproj.capture import evaluating
from gradproj.integrations.own_text import random_states


class Retention:
    """The loss of held-out batches, in nats a token: before training, and its change since."""

    def __init__(self, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor], before: float | None = None):
        """
        Args:
            batches: of every rank; those of rank 0 are taken, so that every rank measures the same.
            before: their loss before training, if it has been measured already.
        """
        shared = [send_to_device(batches, "cpu")]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(shared, src=0)
        (self.batches,) = shared
        self.loss, self.before = loss, before

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What a log says. To call on every rank: a sharded model gathers its weights. Training is not disturbed."""
        device = next(model.parameters()).device
        with torch.no_grad(), evaluating(model), random_states(model):
            losses = [self.loss(model, send_to_device(batch, device)).float() for batch in self.batches]
        now = torch.stack(losses).mean().item()
        if self.before is None:
            self.before = now
        return {"gradproj/retention": now, "gradproj/retention_change": now - self.before}

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Batches that are not dictionaries of tensors are left to the caller to find again."""
        plain = [dict(batch) for batch in self.batches if isinstance(batch, Mapping)]
        if len(plain) < len(self.batches) or not all(isinstance(t, Tensor) for b in plain for t in b.values()):
            plain = []
        return {"before": self.before, "held_out": plain}
