"""What a protection is: what the optimizer's wrapper and the integrations ask of it, and what all protections have in
common.

``capture()`` is the body of ``opt.protect()``; ``before_step()`` and ``after_step()`` surround the inner optimizer's
step; ``state()``, ``strip()`` and ``load_state()`` travel with its checkpoints; ``metrics()`` is for a log. The wrapper
knows nothing else.
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
        captures_once: whether one capture before training is all that it needs; else fresh ones are wanted again and
            again.
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
        """To call before the inner step.

        Args:
            closure: of the inner step.
            begins: False if another of the optimizers has stepped since ``after_step()``.
        Returns:
            the closure to give to the inner step.
        """

    @abc.abstractmethod
    def after_step(self) -> None:
        """To call when the inner optimizers have stepped."""

    @abc.abstractmethod
    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """An optimizer's ``state_dict``, with what is protected of its ``parameters`` in it."""

    @abc.abstractmethod
    def strip(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The reverse: ``state_dict`` as the inner optimizer knows it."""

    @abc.abstractmethod
    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take what :meth:`state` put in. A ``state_dict`` without anything protected changes nothing.

        Raises:
            ValueError: what is protected there does not fit ``parameters``. Nothing is changed.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget what is protected: the next step is the plain step."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, float]:
        """What the last step did, for a log; reading it waits for the device. Empty before the first."""

    def project(self) -> Projection | Pin | None:
        """Project the gradients now, for clipping or logging before the step; that step then does not do it again.

        Returns:
            what happened, also kept as ``last``; None if nothing is protected.
        Raises:
            RuntimeError: the protection acts inside the step.
        """
        raise RuntimeError(f"project(): {type(self).__name__} with these settings acts inside step()")

    def pin(self) -> Pin | None:
        """Bring the weights back to what is protected now, for evaluation and before a checkpoint."""
        raise RuntimeError(f"pin(): {type(self).__name__} does not pin weights")

    @contextlib.contextmanager
    def _while_capturing(self) -> Iterator[None]:
        """Refuses a capture inside of another, or of a closure, and steps inside of it."""
        if self._capturing:
            raise RuntimeError(
                "protect() inside another protect(): several backward passes in one block add up already"
            )
        if self._in_closure:
            raise RuntimeError(
                "protect() inside the closure of step(), which an optimizer may call many times: protect before step(), under "
                "Lightning in on_train_batch_start()"
            )
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def bind(self, optimizers: Sequence[Optimizer], sharding: Sharding | None) -> None:
        """Belong to these optimizers, whose ``param_groups`` are asked anew each time.

        Raises:
            RuntimeError: it belongs to others already.
        """
        if any(ref() is not None for ref in self._optimizers):
            raise RuntimeError(
                f"this {type(self).__name__} protects another optimizer already: make one for each, detach() it, or attach "
                f"one to a list of optimizers"
            )
        self._optimizers, self.sharding = [weakref.ref(o) for o in optimizers], sharding

    def release(self) -> None:
        """Belong to no optimizer. What is protected stays."""
        self._optimizers = ()

    def _live_groups(self) -> list[dict[str, Any]]:
        """The optimizers' live parameter groups, one list after the other."""
        optimizers = [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]
        if not optimizers:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to no optimizer: pass it to ProjectedOptimizer or attach() first"
            )
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizers step, in their order, as of now."""
        return [p for group in self._live_groups() for p in group["params"]]

    def _check_step(self) -> None:
        """Refuse a step at a wrong time."""
        if self._capturing:
            raise RuntimeError(
                "step() inside protect(): the gradients made there are not for a step; leave the block first"
            )
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "step() during a backward pass (optimizer-in-backward): a projection needs the gradients of all parameters at "
                "once; remove that hook and call step() after backward()"
            )

    def _guarded(self, closure: Closure, then: Callable[[], Any] | None = None) -> Closure:
        """``closure``, in which protect() is refused, and ``then`` after each call of it."""

        def guarded():
            self._in_closure = True
            try:
                loss = closure()
            finally:
                self._in_closure = False
            if then is not None:
                then()
            return loss

        return guarded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": ()}  # the owner binds a copy to its own optimizer
