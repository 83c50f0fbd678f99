"""The drop-in wrapper, and the same on the user's own optimizer object: one implementation, torch's hooks."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradproj import checkpoint
from gradproj.projection import Pin, Projection
from gradproj.protection import CaptureBlock, Protection
from gradproj.sharding import Sharding


class Protected:
    """What :class:`ProjectedOptimizer` and the result of :func:`attach` have in common.

    Attributes:
        protection: what the wrapper was given; settings are its own.
    """

    protection: Protection

    def protect(self) -> CaptureBlock:
        """Context manager: what the gradients made inside say is protected. See :meth:`Protection.capture`."""
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


class ProjectedOptimizer(Protected, Optimizer):
    """A torch optimizer whose steps leave alone what is protected.

    It is an ``Optimizer`` and shares the wrapped one's ``param_groups``, ``state`` and ``defaults``: schedulers, scalers,
    checkpoints and ``add_param_group`` see the wrapped optimizer's own objects. ``state_dict()`` is the wrapped optimizer's,
    with what is protected in it as entries ``"protected_0"``, ``"protected_1"``, .. (oldest first) of each parameter's
    state. Whatever does not know them ignores them, once a step has made the rest of the state.

    Args:
        optimizer: any ``torch.optim`` optimizer, or one that derives from it.
        protection: a :class:`gradproj.NullSpace` or :class:`gradproj.Directions`.
        sharding: what the other ranks hold, where parameters are sharded or replicated without being DTensors.
    Raises:
        TypeError, ValueError, NotImplementedError: not an optimizer, not a protection, DeepSpeed's engine.

    Example::

        opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5), gradproj.Directions())
        with opt.protect():
            capability_loss(model, anchor).backward()
        safety_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    """

    def __init__(self, optimizer: Optimizer, protection: Protection, *, sharding: Sharding | None = None):
        # Not super().__init__(): that would build groups and a state of its own, which drift apart from the wrapped
        # optimizer's as soon as load_state_dict replaces those.
        self.optimizer = _inner("ProjectedOptimizer", optimizer)
        self.protection = protection
        self._hooks = _Hooks("ProjectedOptimizer", [self.optimizer], protection, sharding)

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
        return {"optimizer": self.optimizer, "protection": self.protection, "sharding": self.protection.sharding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["protection"], sharding=state["sharding"])  # type: ignore[misc]


class Attached(Protected):
    """What :func:`attach` has put on an optimizer. It can be neither copied nor pickled, as hooks cannot."""

    def __init__(self, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        self.protection = protection
        self._hooks = _Hooks("attach", optimizers, protection, sharding)
        for optimizer in optimizers:
            self._warn_of_copies(optimizer)

    def detach(self) -> None:
        """Take it off again: the optimizers step as if it had never been there, and the protection may go to another."""
        self._hooks.remove()

    def _warn_of_copies(self, optimizer: Optimizer) -> None:
        original = optimizer.__getstate__

        def getstate():
            if len(self.protection) and self._hooks.handles:  # type: ignore[arg-type]
                warnings.warn(
                    "an optimizer that attach() protects is being copied, but its hooks do not go with it: the copy steps "
                    "without protection until attach() is called on it",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return original()

        # Copying and pickling go through it, and torch leaves out both the hooks and this, so that only the copy is unprotected.
        optimizer.__getstate__ = getstate  # type: ignore[method-assign]

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "what attach() returned can be neither copied nor pickled, because hooks cannot: call gradproj.attach() on the copy "
            "of the optimizer, or use ProjectedOptimizer, which goes with its copies"
        )


def attach(
    optimizer: Optimizer | Sequence[Optimizer], protection: Protection, *, sharding: Sharding | None = None
) -> Attached:
    """Protect the user's own optimizer object, or several that step the parts of one model.

    Args:
        optimizer: as for :class:`ProjectedOptimizer`; of a wrapper without step hooks (Accelerate's), what it wraps is taken.
            A list, such as Muon for the matrices and AdamW for the rest, is protected jointly: before the first of them steps.
        protection, sharding: as for :class:`ProjectedOptimizer`.
    Returns:
        Attached: ``protect()``, ``project()``, ``unprotect()``, ``last``, ``detach()``. Hooks do not survive copying or
        pickling the optimizer: attach again afterwards.
    Raises:
        TypeError, RuntimeError, NotImplementedError: not an optimizer; it is protected already; DeepSpeed's engine.
    """
    several = isinstance(optimizer, list | tuple)
    optimizers = [_inner("attach", o) for o in (optimizer if several else [optimizer])]  # type: ignore[list-item, union-attr]
    if not optimizers:
        raise ValueError("attach: the list of optimizers is empty")
    return Attached(optimizers, protection, sharding)


class _Hooks:
    """The hooks of one protection on its optimizers."""

    def __init__(self, caller: str, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        if not isinstance(protection, Protection):
            raise TypeError(
                f"{caller}: protection must be a gradproj.NullSpace or gradproj.Directions, got {type(protection).__name__}; for example "
                f'gradproj.Directions(8, "conflict")'
            )
        if sharding is not None and not isinstance(sharding, Sharding):
            raise TypeError(f"{caller}: sharding must be a gradproj.Sharding, got {type(sharding).__name__}")
        for optimizer in optimizers:
            if getattr(optimizer, "_gradproj", None) is not None:
                raise RuntimeError(
                    f"{caller}: this {type(optimizer).__name__} is protected already; detach() first, or use what protects it"
                )
        protection.bind(optimizers, sharding)
        self.protection = protection
        self._stepped: set[int] = set()  # optimizers of a list that have stepped since the last projection
        self._count = len(optimizers)
        self.handles: list[RemovableHandle] = []
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._install(optimizer)

    def _install(self, optimizer: Optimizer) -> None:
        loading: dict[str, Any] = {}

        def parameters():
            return [p for group in optimizer.param_groups for p in group["params"]]

        def before_load(_, state_dict):
            loading.update(state_dict)
            # The optimizer would cast directions to its parameters' dtype and keep them as its own.
            return checkpoint.without_directions(state_dict)

        def after_load(_):
            self.protection.load_state(dict(loading), parameters())
            loading.clear()

        self.handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(lambda _, found: self.protection.state(found, parameters())),
            optimizer.register_load_state_dict_pre_hook(before_load),
            optimizer.register_load_state_dict_post_hook(after_load),
        ]
        optimizer._gradproj = self  # type: ignore[attr-defined]
        found = checkpoint.take_from(optimizer.state, parameters())
        if found:  # a checkpoint was loaded before
            ids = [*range(len(parameters()))]
            empty = {"state": {}, "param_groups": [{"params": ids}]}
            rows = [[row.get(p) for p in parameters()] for row in found]
            self.protection.load_state(checkpoint.insert(empty, rows), parameters())

    def _before_step(self, optimizer: Optimizer, args, kwargs):
        if id(optimizer) in self._stepped:  # a new round, though not all of a list have stepped in the last one
            self._end_round()
        # args[0] is the optimizer itself
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        wrapped = self.protection.before_step(closure)
        if wrapped is None:
            return None
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        self._stepped.add(id(optimizer))
        if len(self._stepped) == self._count:
            self._end_round()

    def _end_round(self) -> None:
        self._stepped.clear()
        self.protection.after_step()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for optimizer in self._optimizers:
            optimizer._gradproj = None  # type: ignore[attr-defined]
        self.protection.release()


def _inner(caller: str, optimizer: Any) -> Optimizer:
    """The optimizer that has the step hooks.

    Raises:
        TypeError, NotImplementedError: there is none.
    """
    kinds = [f"{c.__module__}.{c.__name__}" for c in type(optimizer).__mro__]
    engine = next((k for k in kinds if k.startswith(("deepspeed.runtime.", "accelerate.utils.deepspeed."))), None)
    if engine is not None:
        raise NotImplementedError(
            f"{caller}: {engine} belongs to DeepSpeed's engine, which reduces, partitions and frees the gradients itself, so that "
            f"p.grad is not the gradient; shard with fully_shard (FSDP2) and pass a torch optimizer"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{caller} takes a torch.optim.Optimizer, got {type(optimizer).__name__}; for example "
            f"torch.optim.AdamW(model.parameters())"
        )
    if isinstance(optimizer, ProjectedOptimizer):
        raise TypeError(f"{caller}: this optimizer is a ProjectedOptimizer, which projects already")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        wrapped = getattr(optimizer, "optimizer", None)
        if wrapped is None:
            raise TypeError(
                f"{caller}: {type(optimizer).__name__} has no step hooks, because it is a wrapper; pass the optimizer that it wraps"
            )
        return _inner(caller, wrapped)
    return optimizer


def _forwarded(name: str, doc: str) -> property:
    """An attribute that lives on the wrapped optimizer, for reading, writing and deleting."""

    def get(self):
        return getattr(self.optimizer, name)

    def set_(self, value):
        setattr(self.optimizer, name, value)

    def delete(self):
        delattr(self.optimizer, name)

    return property(get, set_, delete, doc)


# By name, not by __getattr__: GradScaler hands grad_scale and found_inf to the object it is given, and they must reach the
# optimizer that reads them.
for _name, _doc in {
    "param_groups": "The wrapped optimizer's parameter groups, the very list.",
    "state": "The wrapped optimizer's state, the very dict.",
    "defaults": "The wrapped optimizer's defaults.",
    "grad_scale": "For GradScaler with fused optimizers.",
    "found_inf": "For GradScaler with fused optimizers.",
    "_step_supports_amp_scaling": "Whether GradScaler may leave unscaling to the step.",
}.items():
    setattr(ProjectedOptimizer, _name, _forwarded(_name, _doc))

for _name in (
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
):

    def _register(self, *args, _name=_name, **kwargs):
        return getattr(self.optimizer, _name)(*args, **kwargs)

    _register.__name__ = _name
    _register.__doc__ = getattr(Optimizer, _name).__doc__
    setattr(ProjectedOptimizer, _name, _register)
