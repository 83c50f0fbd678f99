"""What a protection is: the four calls that the optimizer wrapper makes, and what all protections have in common.

``capture()`` is the body of ``opt.protect()``; ``before_step()`` and ``after_step()`` surround the inner optimizer's step;
``state()`` and ``load_state()`` travel with its checkpoints. The wrapper knows nothing else.
"""

import abc
import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradproj.capture import Direction, captured
from gradproj.projection import Projection
from gradproj.ranks import RanksAgree
from gradproj.sharding import Sharding

Closure = Callable[[], Any]


class Protection(abc.ABC):
    """Base class of :class:`gradproj.Directions`. One protection belongs to one optimizer, or to one list of them.

    Attributes:
        last: what the last projection did, as device tensors; None before the first.
        sharding: of the parameters, as given to the wrapper.
    """

    def __init__(self) -> None:
        self.last: Projection | None = None
        self.sharding: Sharding | None = None
        self._optimizers: Sequence[weakref.ref[Optimizer]] = ()  # weak, as they own the hooks that own this
        self._capturing = self._in_closure = False
        self._ranks_agree = RanksAgree()

    @abc.abstractmethod
    def __len__(self) -> int:
        """How much is protected; with 0 the next step is the plain step."""

    @abc.abstractmethod
    def _add(self, taken: Direction) -> None:
        """Take the gradients that a capture block has made."""

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
    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """The reverse. A ``state_dict`` without anything protected changes nothing.

        Raises:
            ValueError: what is protected there does not fit ``parameters``. Nothing is changed.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget what is protected: the next step is the plain step."""

    def project(self) -> Projection | None:
        """Project the gradients now, for clipping or logging before the step; that step then does not do it again.

        Returns:
            what happened, also kept as ``last``; None if nothing is protected.
        Raises:
            RuntimeError: the protection acts inside the step.
        """
        raise RuntimeError(f"project(): {type(self).__name__} with these settings acts inside step()")

    def pin(self) -> Any:
        """Bring the weights back to what is protected now, for evaluation and before a checkpoint."""
        raise RuntimeError(f"pin(): {type(self).__name__} does not pin weights")

    def capture(self) -> "CaptureBlock":
        """Context manager: protect what the gradients made inside say.

        Several backward passes inside add up. ``p.grad`` is set aside when the block is entered and put back when it ends.
        The gradients are taken, not copied, except those whose memory somebody else may write: DDP's bucket views,
        gradients that share memory, gradients that the caller keeps. An exception inside leaves everything as it was.

        Gradients of parameters that are not this optimizer's are not touched: they accumulate as they always do.

        Raises:
            RuntimeError: no parameter received a gradient inside the block (with a group, some ranks may own none); the block
                is inside another one, or inside a closure of ``step()``; a parameter is stepped during the backward pass;
                DeepSpeed owns the parameters.
            NotImplementedError: a gradient is sparse.
        """
        return CaptureBlock(self._capture())

    def _check_capture(self) -> None:
        if self._capturing:
            raise RuntimeError(
                "protect() inside another protect(): several backward passes in one block add up already"
            )
        if self._in_closure:
            raise RuntimeError(
                "protect() inside the closure of step(), which an optimizer may call many times: protect before step(), under "
                "Lightning in on_train_batch_start()"
            )

    @contextlib.contextmanager
    def _capture(self) -> Iterator[None]:
        self._check_capture()
        self._capturing = True
        try:
            with captured(self.parameters) as taken:
                yield
        finally:
            self._capturing = False
        alone = self.sharding is None or (self.sharding.group is None and self.sharding.placement is None)
        if not taken.gradients and alone:  # in a group, a rank may own nothing
            raise RuntimeError(f"protect(): {taken.why_empty()}")
        self._ranks_agree.tell(self.parameters(), taken.gradients, self.sharding)
        self._add(taken.gradients)

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
        self._ranks_agree.check(self.parameters())

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
        # The owner binds a copy to its own optimizer.
        return {**self.__dict__, "_optimizers": (), "_ranks_agree": RanksAgree()}


class CaptureBlock:
    """A context manager that warns if it was never entered: ``opt.protect()`` without ``with`` protects nothing."""

    def __init__(self, block: contextlib.AbstractContextManager[None]):
        self._block = block
        self._entered = False

    def __enter__(self) -> None:
        self._entered = True
        self._block.__enter__()

    def __exit__(self, *error) -> bool | None:
        return self._block.__exit__(*error)

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                "protect() was called without `with`: nothing was protected; write `with opt.protect():` around the "
                "backward pass",
                RuntimeWarning,
                stacklevel=2,
            )
