"""The drop-in wrapper, and the same on the user's own optimizer object: both use torch's hooks."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from gradproj.capture import CaptureBlock
from gradproj.hooks import Hooks, inner_optimizer
from gradproj.protection import Protection
from gradproj.rows.results import Pin, Projection
from gradproj.rows.sharding import Sharding


class Handle:
    """What :class:`ProjectedOptimizer` and the result of :func:`attach` have in common."""

    protection: Protection
    _hooks: Hooks

    def protect(self) -> CaptureBlock:
        """Context manager: the gradients made inside say what is protected. See :meth:`Protection.capture`."""
        self._hooks.settle()
        return self.protection.capture()

    def unprotect(self) -> None:
        """Forget what is protected; the next ``step()`` is the plain step."""
        self.protection.clear()

    def project(self) -> Projection | Pin | None:
        """Project the gradients now, for clipping or logging; the step that follows does not do it again."""
        return self.protection.project()

    def pin(self) -> Pin | None:
        """Pin the weights of a :class:`gradproj.NullSpace` now, for evaluation and before the last checkpoint."""
        return self.protection.pin()

    @property
    def last(self) -> Projection | Pin | None:
        """What the last projection did, as device tensors; None before the first."""
        return self.protection.last

    def detach(self) -> None:
        """Take the protection off: the optimizer steps as if it had never been there. Another may then have it."""
        self._hooks.remove()


class ProjectedOptimizer(Handle, Optimizer):
    """A torch optimizer whose steps leave alone what is protected.

    It is an ``Optimizer`` and shares the wrapped one's ``param_groups``, ``state`` and ``defaults``: schedulers,
    scalers, checkpoints and ``add_param_group`` see the wrapped optimizer's own objects. ``state_dict()`` is the
    wrapped optimizer's; what is protected is in it as entries ``"protected_0"``, ``"protected_1"``, .. (oldest first)
    of each parameter's state. An optimizer that does not know these ignores them, once a step has made the rest.

    Args:
        optimizer: any ``torch.optim`` optimizer, or one that derives from it.
        protection: a :class:`gradproj.NullSpace` or :class:`gradproj.Directions`.
        sharding: what the other ranks hold, where parameters are sharded or replicated without being DTensors.
    Raises:
        TypeError: not an optimizer, not a protection, not a sharding; an optimizer that wraps another (SAM).
        RuntimeError: the optimizer is protected already, or the protection belongs to another one.
        NotImplementedError: DeepSpeed's engine; an optimizer that changes weights during the backward pass (LOMO).

    Examples: see :class:`gradproj.NullSpace` and :class:`gradproj.Directions`.
    """

    def __init__(self, optimizer: Optimizer, protection: Protection, *, sharding: Sharding | None = None):
        # Not super().__init__(): groups and a state of its own would drift apart from the wrapped optimizer's, which
        # load_state_dict replaces.
        inner = inner_optimizer("ProjectedOptimizer", optimizer)
        self.optimizer = optimizer
        self.protection = protection
        self._hooks = Hooks("ProjectedOptimizer", [inner], protection, sharding)

    def step(self, closure: Callable[[], Any] | None = None):
        """Project, then the wrapped optimizer's step. A closure's gradients are projected each time it is called."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"ProjectedOptimizer({self.optimizer!r}, {self.protection!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Only what is ours: a scheduler leaves its own step() in __dict__, which can be neither copied nor pickled.
        return {"optimizer": self.optimizer, "protection": self.protection}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, sharding=state["protection"].sharding)  # type: ignore[misc]


class Attached(Handle):
    """What :func:`attach` has put on an optimizer. It can be neither copied nor pickled, as hooks cannot."""

    def __init__(self, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        self.protection = protection
        self._hooks = Hooks("attach", optimizers, protection, sharding)
        self._hooks.warn_of_copies()

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "what attach() returned can be neither copied nor pickled, because hooks cannot: call gradproj.attach() on "
            "the copy of the optimizer, or use ProjectedOptimizer, which goes with its copies"
        )


def attach(
    optimizer: Optimizer | Sequence[Optimizer], protection: Protection, *, sharding: Sharding | None = None
) -> Attached:
    """Protect the user's own optimizer object, or several that step the parts of one model.

    Args:
        optimizer: as for :class:`ProjectedOptimizer`; of a wrapper without step hooks (Accelerate's), what it wraps. A
            list, such as Muon for the matrices and AdamW for the rest, is protected jointly: all gradients are
            projected before the first steps, and weights are pinned when the last has stepped; if one is left out, at
            the next step, ``protect()`` or ``state_dict()``.
        protection, sharding: as for :class:`ProjectedOptimizer`.
    Returns:
        Attached: ``protect()``, ``project()``, ``unprotect()``, ``last``, ``detach()``. Hooks do not survive copying or
        pickling the optimizer: attach again afterwards.
    Raises:
        TypeError, RuntimeError, NotImplementedError: as for :class:`ProjectedOptimizer`.
        ValueError: the list is empty, or names an optimizer twice.
    """
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [inner_optimizer("attach", o) for o in given]
    if not optimizers or len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError(f"attach: pass each optimizer once, got {[type(o).__name__ for o in given]}")
    return Attached(optimizers, protection, sharding)


def _forwarded(name: str, doc: str | None) -> property:
    """An attribute that lives on the wrapped optimizer."""
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
        lambda self: delattr(self.optimizer, name),
        doc,
    )


# By name, not by __getattr__: GradScaler sets grad_scale and found_inf on the object that it is given, and they must
# reach the optimizer that reads them. Hooks are registered on the wrapped optimizer too, which runs them.
for _name, _doc in {
    "param_groups": "The wrapped optimizer's parameter groups, the very list.",
    "state": "The wrapped optimizer's state, the very dict.",
    "defaults": "The wrapped optimizer's defaults.",
    "grad_scale": "For GradScaler with fused optimizers.",
    "found_inf": "For GradScaler with fused optimizers.",
    "_step_supports_amp_scaling": "Whether GradScaler may leave unscaling to the step.",
    "train": "For optimizers that evaluate other weights than they train.",
    "eval": "For optimizers that evaluate other weights than they train.",
    **{name: doc.__doc__ for name, doc in vars(Optimizer).items() if name.startswith("register_")},
}.items():
    setattr(ProjectedOptimizer, _name, _forwarded(_name, _doc))
