"""What is remembered of a projection: which gradients it has changed, and what it found out about the directions."""

import weakref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class StepMemory:
    """The gradients of the last projection, and whether something was added to them, or protected, since."""

    def __init__(self) -> None:
        self._grads: dict[Tensor, weakref.ref[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        self._first: tuple[weakref.ref[Tensor], int] | None = None  # a gradient, and its version after the projection
        self.outdated = False

    def remember(self, parameters: list[Tensor], grads: list[Tensor | None], watch: bool) -> None:
        """These gradients were just projected; ``watch`` if further backward passes may come before the step."""
        self.forget()
        if watch:
            pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
            self._grads = {p: weakref.ref(g) for p, g in pairs}
            self._hooks = [p.register_post_accumulate_grad_hook(self._notice) for p, _ in pairs if p.requires_grad]
        else:
            some = next((g for g in grads if g is not None), None)
            self._first = None if some is None else (weakref.ref(some), some._version)

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._grads, self._hooks, self._first, self.outdated = {}, [], None, False

    def _notice(self, p: Tensor) -> None:
        if p.grad is self._grads[p]():
            self.outdated = True

    def holds(self, parameters: list[Tensor], grads: list[Tensor | None], repeatable: bool) -> bool:
        """Whether these gradients have been projected. If only in part: RuntimeError, unless ``repeatable``."""
        if self._first is not None:
            # Where a step calls the step of its base class, torch's hooks run in both. The version tells this from a
            # step that raised.
            grad, version = self._first[0](), self._first[1]
            return grad is not None and grad._version == version and any(g is grad for g in grads)
        if not self._grads:
            return False
        there = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
        done = sum(1 for p, g in there if p in self._grads and self._grads[p]() is g)
        if done == len(there) and not self.outdated:
            return done > 0
        if done and not repeatable:
            raise RuntimeError(
                "step(): since project() a backward pass has added to the gradients, or protect() to what is "
                "protected; this method is not to be applied twice: call project() after the last backward()"
            )
        return False


class OnHost:
    """A small tensor on its way to the host."""

    def __init__(self, t: Tensor):
        self._tensor, self._copied = t, None
        if t.is_cuda and not is_capturing():
            self._tensor = t.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list:
        """Waits for what made it, not for what was queued afterwards."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.tolist()


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, so that nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
