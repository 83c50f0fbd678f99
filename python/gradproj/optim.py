"""The drop-in wrapper, and the same on the user's own optimizer object: one implementation, torch's hooks."""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports the compiler only when needed
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradproj import checkpoint
from gradproj.capture import DEEPSPEED
from gradproj.functional import Projection
from gradproj.protection import CaptureBlock, Protection
from gradproj.sharding import Sharding


class Protected:
    """What :class:`ProjectedOptimizer` and the result of :func:`attach` have in common.

    Attributes:
        protection: what the wrapper was given; settings are its own.
    """

    protection: Protection
    _hooks: "_Hooks"

    def protect(self) -> CaptureBlock:
        """Context manager: what the gradients made inside say is protected. See :meth:`Protection.capture`."""
        self._hooks.settle()
        return self.protection.capture()

    def unprotect(self) -> None:
        """Forget what is protected; the next ``step()`` is the plain step."""
        self.protection.clear()

    def project(self) -> Projection | None:
        """Project the gradients now, for clipping or logging; the step that follows does not do it again."""
        return self.protection.project()

    @property
    def last(self) -> Projection | None:
        """What the last projection did, as device tensors; None before the first."""
        return self.protection.last

    def detach(self) -> None:
        """Take the protection off: the optimizer steps as if it had never been there, and it may go to another one."""
        self._hooks.remove()


class ProjectedOptimizer(Protected, Optimizer):
    """A torch optimizer whose steps leave alone what is protected.

    It is an ``Optimizer`` and shares the wrapped one's ``param_groups``, ``state`` and ``defaults``: schedulers, scalers,
    checkpoints and ``add_param_group`` see the wrapped optimizer's own objects. ``state_dict()`` is the wrapped optimizer's,
    with what is protected in it as entries ``"protected_0"``, ``"protected_1"``, .. (oldest first) of each parameter's
    state. Whatever does not know them ignores them, once a step has made the rest of the state.

    Args:
        optimizer: any ``torch.optim`` optimizer, or one that derives from it.
        protection: a :class:`gradproj.Directions`.
        sharding: what the other ranks hold, where parameters are sharded or replicated without being DTensors.
    Raises:
        TypeError: not an optimizer, not a protection, not a sharding.
        RuntimeError: the optimizer is protected already, or the protection belongs to another one.
        NotImplementedError: DeepSpeed's engine.

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
        inner = _inner("ProjectedOptimizer", optimizer)
        self.optimizer = optimizer
        self.protection = protection
        self._hooks = _Hooks("ProjectedOptimizer", [inner], protection, sharding)

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


class Attached(Protected):
    """What :func:`attach` has put on an optimizer. It can be neither copied nor pickled, as hooks cannot."""

    def __init__(self, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        self.protection = protection
        self._hooks = _Hooks("attach", optimizers, protection, sharding)
        self._hooks.warn_of_copies()

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
            A list, such as Muon for the matrices and AdamW for the rest, is protected jointly: all gradients before the
            first of them steps. In update space the projection comes when the last one has stepped; if one is left out,
            with the next step, ``protect()`` or ``state_dict()``.
        protection, sharding: as for :class:`ProjectedOptimizer`.
    Returns:
        Attached: ``protect()``, ``project()``, ``unprotect()``, ``last``, ``detach()``. Hooks do not survive copying or
        pickling the optimizer: attach again afterwards.
    Raises:
        TypeError, RuntimeError, NotImplementedError: as for :class:`ProjectedOptimizer`.
        ValueError: the list is empty, or names an optimizer twice.
    """
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [_inner("attach", o) for o in given]
    if not optimizers or len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError(f"attach: pass each optimizer once, got {[type(o).__name__ for o in given]}")
    return Attached(optimizers, protection, sharding)


class _Hooks:
    """The hooks of one protection on its optimizers. They refer to them weakly: an optimizer owns its hooks, so that it and
    what is protected are freed when nobody else refers to it."""

    def __init__(self, caller: str, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        if not isinstance(protection, Protection):
            raise TypeError(
                f"{caller}: protection must be a gradproj.Directions, got {type(protection).__name__}; for example "
                f'gradproj.Directions(8, "conflict")'
            )
        if sharding is not None and not isinstance(sharding, Sharding):
            raise TypeError(f"{caller}: sharding must be a gradproj.Sharding, got {type(sharding).__name__}")
        for optimizer in optimizers:
            if hasattr(optimizer, "_gradproj"):
                raise RuntimeError(
                    f"{caller}: this {type(optimizer).__name__} is protected already; detach() first, or use what protects it"
                )
        protection.bind(optimizers, sharding)
        self.protection = protection
        self._optimizers = [weakref.ref(o) for o in optimizers]
        self._stepped: set[int] = set()  # optimizers of a list that have stepped since the last projection
        self._handles: list[RemovableHandle] = []
        try:
            for optimizer in optimizers:
                self._adopt(optimizer)
        except BaseException:
            protection.release()
            raise
        for optimizer in optimizers:
            self._install(optimizer)

    def _install(self, optimizer: Optimizer) -> None:
        optimizer._gradproj = self  # type: ignore[attr-defined]
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    def _adopt(self, optimizer: Optimizer) -> None:
        """Take over what the optimizer keeps as its own, because it loaded a checkpoint without these hooks."""
        self.protection.load_state(checkpoint.live(optimizer), _parameters(optimizer))
        checkpoint.remove_from(optimizer)

    def _adopt_late(self, optimizer: Optimizer) -> None:
        """The same, where its class may load in a way of its own, as those of bitsandbytes do."""
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            self._adopt(optimizer)

    def warn_of_copies(self) -> None:
        """Copying and pickling go through ``__getstate__``; torch leaves out both the hooks and this, so that only the copy is
        unprotected."""

        def getstate(ref):
            if len(self.protection):
                warnings.warn(
                    "an optimizer that attach() protects is being copied, but its hooks do not go with it: the copy steps "
                    "without protection until attach() is called on it",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return type(ref()).__getstate__(ref())

        for ref in self._optimizers:
            vars(ref())["__getstate__"] = functools.partial(getstate, ref)

    def _before_step(self, optimizer: Optimizer, args, kwargs):
        if torch.compiler.is_compiling():
            # What is decided here changes from step to step, and each change would compile the step anew.
            return _untraced(self._before_step, optimizer, args, kwargs)
        if id(optimizer) in self._stepped:  # a new round, though not all of a list have stepped in the last one
            self.end_round()
        self._adopt_late(optimizer)
        # args[0] is the optimizer itself
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        wrapped = self.protection.before_step(closure, begins=not self._stepped)
        if wrapped is None:
            return None
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return _untraced(self._after_step, optimizer, args, kwargs)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self.end_round()

    def end_round(self) -> None:
        """The optimizers of a list that have stepped are all that step this time."""
        if self._stepped:
            self._stepped.clear()
            self.protection.after_step()

    def settle(self) -> None:
        """To call before something else than a step: what is still to be done for the steps and loads so far."""
        self.end_round()
        for ref in self._optimizers:
            if (optimizer := ref()) is not None:
                self._adopt_late(optimizer)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.settle()
        return self.protection.state(checkpoint.without_directions(state_dict), _parameters(optimizer))

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._stepped.clear()  # what a round that is not complete has done is of no interest any more
        self.protection.load_state(state_dict, _parameters(optimizer))
        # The optimizer would cast directions to its parameters' dtype and keep them as its own.
        return checkpoint.without_directions(state_dict)

    def remove(self) -> None:
        if not self._handles:
            return
        self.end_round()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for ref in self._optimizers:
            optimizer = ref()
            if optimizer is not None:
                del optimizer._gradproj  # type: ignore[attr-defined]
                vars(optimizer).pop("__getstate__", None)
        self._optimizers = []
        self.protection.release()


@_disable_dynamo
def _untraced(function, *args):
    return function(*args)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _inner(caller: str, optimizer: Any) -> Optimizer:
    """The optimizer that has the step hooks.

    Raises:
        TypeError, NotImplementedError: there is none.
    """
    kinds = [f"{c.__module__}.{c.__name__}" for c in type(optimizer).__mro__]
    engine = next((k for k in kinds if k.startswith(("deepspeed.runtime.", "accelerate.utils.deepspeed."))), None)
    if engine is not None:
        raise NotImplementedError(f"{caller}: {engine}: {DEEPSPEED}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{caller} takes a torch.optim.Optimizer, got {type(optimizer).__name__}; for example "
            f"torch.optim.AdamW(model.parameters())"
        )
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
