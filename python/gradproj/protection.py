"""What a protection is: all that the optimizer's wrapper and the integrations know of it, and what protections share.

``capture()`` is the body of ``opt.protect()``; ``before_step()`` and ``after_step()`` surround the inner optimizer's
step; ``state()``, ``strip()`` and ``load_state()`` are for its checkpoints, and ``metrics()`` for a log.
"""

import abc
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradproj.capture import CaptureBlock
from gradproj.rows.results import Pin, Projection
from gradproj.rows.sharding import Sharding

Closure = Callable[[], Any]


class Protection(abc.ABC):
    """Base class of all protections. One belongs to one optimizer, or to one list of them.

    Attributes:
        captures_once: one capture before training is enough; otherwise fresh ones are wanted again and again.
        sharding: of the parameters, as given to the wrapper.
    """

    captures_once: ClassVar[bool]

    def __init__(self) -> None:
        self.sharding: Sharding | None = None
        self._optimizers: Sequence[weakref.ref[Optimizer]] = ()  # weak, as they own the hooks that own this
        self._capturing = self._in_closure = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """How much is protected; with 0 the next step is the plain step."""

    @property
    @abc.abstractmethod
    def last(self) -> Projection | Pin | None:
        """What the protection did last, as device tensors; None before the first time."""

    @abc.abstractmethod
    def capture(self) -> CaptureBlock:
        """Context manager: backward passes inside say what to protect. ``p.grad`` is set aside meanwhile."""

    @abc.abstractmethod
    def before_step(self, closure: Closure | None, begins: bool = True) -> Closure | None:
        """To call before the inner step; returns the closure to give to it. ``begins`` is False if another of the
        optimizers has stepped since ``after_step()``."""

    @abc.abstractmethod
    def after_step(self) -> None:
        """To call when the inner optimizers have stepped."""

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """Around what puts other weights in place, which an optimizer evaluates instead of those that it trains."""
        yield

    @abc.abstractmethod
    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """An optimizer's ``state_dict``, with what is protected of its ``parameters`` in it."""

    @abc.abstractmethod
    def strip(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The reverse: ``state_dict`` as the inner optimizer knows it."""

    @abc.abstractmethod
    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take what :meth:`state` put in, if anything. A ValueError, and no change, if it does not fit."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget what is protected: the next step is the plain step."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, float]:
        """What the last step did, for a log; reading it waits for the device. Empty before the first."""

    def project(self) -> Projection | Pin | None:
        """Project the gradients now, for clipping or logging before the step, which does not do it again then. Returns
        what happened, also kept as ``last``; None if nothing is protected."""
        raise RuntimeError(f"project(): {type(self).__name__} with these settings acts inside step()")

    def pin(self) -> Pin | None:
        """Bring the weights back to what is protected now, for evaluation and before a checkpoint."""
        raise RuntimeError(f"pin(): {type(self).__name__} does not pin weights")

    @contextlib.contextmanager
    def _while_capturing(self) -> Iterator[None]:
        """Refuses a capture inside another one or inside a closure, and a step inside the capture."""
        if self._capturing:
            raise RuntimeError(
                "protect() inside another protect(): several backward passes in one block add up already"
            )
        if self._in_closure:
            raise RuntimeError(
                "protect() inside the closure of step(), which an optimizer may call many times: protect before "
                "step(), under Lightning in on_train_batch_start()"
            )
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def bind(self, optimizers: Sequence[Optimizer], sharding: Sharding | None) -> None:
        """Belong to these optimizers, and to no others; their ``param_groups`` are read anew each time."""
        if any(ref() is not None for ref in self._optimizers):
            raise RuntimeError(
                f"this {type(self).__name__} protects another optimizer already: make one for each, detach() it, or "
                "attach one to a list of optimizers"
            )
        self._optimizers, self.sharding = [weakref.ref(o) for o in optimizers], sharding

    def release(self) -> None:
        """Belong to no optimizer. What is protected stays."""
        self._optimizers = ()

    def _live_groups(self) -> list[dict[str, Any]]:
        """The optimizers' parameter groups, as of now."""
        optimizers = [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]
        if not optimizers:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to no optimizer: pass it to ProjectedOptimizer or attach() first"
            )
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[Tensor]:
        """What the optimizers step, in their order, as of now."""
        return [p for group in self._live_groups() for p in group["params"]]

    def _check_step(self) -> None:
        if self._capturing:
            raise RuntimeError(
                "step() inside protect(): the gradients made there are not for a step; leave the block first"
            )
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "step() during a backward pass (optimizer-in-backward): a projection needs the gradients of all "
                "parameters at once; remove that hook and call step() after backward()"
            )

    def _step_was_skipped(self) -> bool:
        """A GradScaler has told a fused optimizer of an inf, so that nothing has moved."""
        found = [getattr(ref(), "found_inf", None) for ref in self._optimizers]
        return any(f is not None and bool(f) for f in found)

    def _guarded(self, closure: Closure, then: Callable[[], Any]) -> Closure:
        """``closure``, in which protect() is refused, followed by ``then``."""

        def guarded():
            self._in_closure = True
            try:
                loss = closure()
            finally:
                self._in_closure = False
            then()
            return loss

        return guarded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": ()}  # the owner binds a copy to its own optimizer
