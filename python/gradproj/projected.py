"""What is remembered of a projection: which gradients it was of, and what it found out, on its way to the host."""

import weakref

import torch
from torch import Tensor


class Projected:
    """Gradients that have been projected, and whether something was added to them, or protected, since."""

    def __init__(self, parameters: list[Tensor], grads: list[Tensor | None]):
        pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
        self._grads = {p: weakref.ref(g) for p, g in pairs}
        self._hooks = [p.register_post_accumulate_grad_hook(self._notice) for p, _ in pairs if p.requires_grad]
        self.outdated = False

    def _notice(self, p: Tensor) -> None:
        if p.grad is self._grads[p]():
            self.outdated = True

    def unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def holds(self, parameters: list[Tensor], grads: list[Tensor | None], repeatable: bool) -> bool:
        """Whether these gradients are projected.

        Args:
            repeatable: what is projected in part may be projected again.
        Raises:
            RuntimeError: it is, but may not.
        """
        there = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
        done = sum(1 for p, g in there if p in self._grads and self._grads[p]() is g)
        if not done:  # all of them are new
            return False
        if done < len(there) or self.outdated:
            if not repeatable:
                raise RuntimeError(
                    "step(): since project() a backward pass has added to the gradients, or protect() to what is protected; this "
                    "method is not to be applied twice: call project() after the last backward()"
                )
            return False
        return True


class OnHost:
    """A small tensor on its way to the host."""

    def __init__(self, t: Tensor):
        self._tensor, self._copied = t, None
        if t.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._tensor = t.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list:
        """Waits for what made it, not for what was queued afterwards."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.tolist()
