"""The drop-in wrapper, and the same machinery on the user's own optimizer object."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradproj import checkpoint, distributed, methods
from gradproj.functional import Projection
from gradproj.projector import Per, Projector


class ProjectedOptimizer(Optimizer):
    """A torch optimizer whose step leaves protected directions alone.

    It is an ``Optimizer`` and shares the wrapped one's ``param_groups``, ``state`` and ``defaults``: schedulers, scalers,
    checkpoints and ``add_param_group`` see the wrapped optimizer's own objects. ``state_dict()`` is the wrapped optimizer's.

    Under a ``GradScaler`` nothing needs to be unscaled for ``"orthogonal"`` and ``"conflict"`` with ``eps=0``, which do not
    depend on the scale of a direction. For other methods, divide the capability loss by what the safety loss is divided by.

    Args:
        optimizer: any ``torch.optim`` optimizer, or one that derives from it.
        method: ``"orthogonal"``, ``"conflict"``, ``("mix", gamma)``, or a callable Gram -> weights; see
            :func:`gradproj.project_`.
        directions: how many protected directions to keep; each further ``protect()`` replaces the oldest.
        space: ``"gradient"`` or ``"update"``; see :class:`gradproj.projector.Projector`.
        group: process group over which the parameters are spread, if their DTensors do not tell.
        eps: added to every <d, d>; 0 is scale-free.
        save_directions: ``state_dict()`` holds the protected directions too, as entries ``"protected_0"``, ``"protected_1"``, ..
            (oldest first) of each parameter's state, K more copies of the gradients. Whatever does not know them ignores
            them, once a step has made the rest of the state; ``load_state_dict`` restores them whenever they are there.
        plain: ``"replicated"`` (DDP) or ``"sharded"`` (FSDP1, ZeRO, pipeline stages), of parameters that are no DTensors.
        counted: parameter -> False where another rank counts it already. See :func:`gradproj.project_` for both.
        per: ``"model"``, ``"group"`` or ``"tensor"``: what is projected as one vector.
        store_dtype, store_device, average: how directions are kept; see :class:`gradproj.directions.Directions`.
        refresh_every: after how many steps ``protection_due`` asks for a new direction.
    Raises:
        TypeError, ValueError, NotImplementedError: not an optimizer, an unknown setting, DeepSpeed's engine.

    Example::

        opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5))
        with opt.protect():
            capability_loss(model, anchor).backward()
        safety_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: methods.Method = "orthogonal",
        directions: int = 1,
        space: Literal["gradient", "update"] = "gradient",
        group=None,
        eps: float = 0.0,
        save_directions: bool = False,
        plain: distributed.Plain | None = None,
        counted: Callable[[Tensor], bool] | None = None,
        per: Per = "model",
        store_dtype: torch.dtype | None = None,
        store_device: torch.device | str | None = None,
        average: float | None = None,
        refresh_every: int = 1,
    ):
        _check("ProjectedOptimizer", optimizer)
        # Not super().__init__(): that would build groups and a state of its own, which drift apart from the wrapped
        # optimizer's as soon as load_state_dict replaces those.
        self.optimizer = optimizer
        settings = (group, eps, plain, counted, per, store_dtype, store_device, average, refresh_every)
        self.projector = Projector(self._live_groups, method, directions, space, *settings)
        self.save_directions = save_directions

    def _live_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    # --- protection ---------------------------------------------------------------------------------------------------

    def protect(self):
        """Context manager: the gradients made inside become one protected direction. See :meth:`Projector.protect`."""
        return self.projector.protect()

    def protect_each(self, losses) -> None:
        """One protected direction per loss. See :meth:`Projector.protect_each`."""
        self.projector.protect_each(losses)

    @property
    def protection_due(self) -> bool:
        """Whether nothing was protected in the last ``refresh_every`` steps."""
        return self.projector.protection_due

    def unprotect(self) -> None:
        """Forget all protected directions; the next ``step()`` is the plain step."""
        self.projector.unprotect()

    def project(self) -> Projection | None:
        """Project the gradients now, for clipping or logging; the step that follows does not do it again."""
        return self.projector.project()

    @property
    def last(self) -> Projection | None:
        """What the last projection did, as device tensors; None before the first."""
        return self.projector.last

    # --- Optimizer ----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None):
        """Project, then the wrapped optimizer's step. A closure's gradients are projected each time it is called."""
        closure = self.projector.before_step(closure)
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.projector.after_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.projector.forget_gradients()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        state_dict = self.optimizer.state_dict()
        return self.projector.with_directions(state_dict) if self.save_directions else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The wrapped optimizer would cast them to its parameters' dtype and keep them as its own.
        without, _ = checkpoint.extract(state_dict)
        self.optimizer.load_state_dict(without)
        self.projector.load_state_dict(state_dict)

    def __repr__(self) -> str:
        p = self.projector
        return f"ProjectedOptimizer(method={p.method!r}, protected={len(p)}, space={p.space!r}, {self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Only what is ours: a scheduler leaves its own step() in __dict__, which can be neither copied nor pickled.
        return {name: self.__dict__[name] for name in ("optimizer", "projector", "save_directions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.projector.param_groups = self._live_groups


def _check(caller: str, optimizer: Any) -> None:
    kinds = [f"{c.__module__}.{c.__name__}" for c in type(optimizer).__mro__]
    engine = next((k for k in kinds if k.startswith(("deepspeed.runtime.", "accelerate.utils.deepspeed."))), None)
    if engine is not None:
        raise NotImplementedError(
            f"{caller}: {engine} belongs to DeepSpeed's engine, which reduces, partitions and frees the gradients itself, so that "
            f"p.grad is not the gradient; shard with fully_shard (FSDP2) and pass a torch optimizer"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{caller} takes a torch.optim.Optimizer, got {type(optimizer).__name__}")


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


def attach(
    optimizer: Optimizer,
    method: methods.Method = "orthogonal",
    directions: int = 1,
    space: Literal["gradient", "update"] = "gradient",
    group=None,
    eps: float = 0.0,
    save_directions: bool = False,
    plain: distributed.Plain | None = None,
    counted: Callable[[Tensor], bool] | None = None,
    per: Per = "model",
    store_dtype: torch.dtype | None = None,
    store_device: torch.device | str | None = None,
    average: float | None = None,
    refresh_every: int = 1,
) -> Projector:
    """The machinery of :class:`ProjectedOptimizer` on the user's own optimizer object, by torch's hooks.

    Args: as for :class:`ProjectedOptimizer`.
    Returns:
        Projector: ``protect()``, ``project()``, ``unprotect()``, ``last``. Hooks do not survive copying or pickling the
        optimizer: attach again afterwards.
    """
    _check("attach", optimizer)
    if isinstance(optimizer, ProjectedOptimizer):
        raise TypeError("attach: this optimizer is a ProjectedOptimizer, which projects already")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"attach: {type(optimizer).__name__} has no step hooks, because it is a wrapper; attach to the optimizer that it wraps"
        )
    settings = (group, eps, plain, counted, per, store_dtype, store_device, average, refresh_every)
    projector = Projector(lambda: optimizer.param_groups, method, directions, space, *settings)
    projector._attached = True

    def before(_, args, kwargs):
        # args[0] is the optimizer itself
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        wrapped = projector.before_step(closure)
        if wrapped is None:
            return None
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    optimizer.register_step_pre_hook(before)
    optimizer_state = optimizer.__getstate__

    def getstate():
        projector.warn_of_a_copy()
        return optimizer_state()

    loading: dict[str, Any] = {}

    def before_load(_, state_dict):
        loading.update(state_dict)
        return checkpoint.extract(state_dict)[0]

    def after_load(_):
        projector.load_state_dict(loading)
        loading.clear()

    # Copying and pickling go through it, and torch leaves out both the hooks and this, so that only the copy is unprotected.
    optimizer.__getstate__ = getstate  # type: ignore[method-assign]
    optimizer.register_step_post_hook(lambda *_: projector.after_step())
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)
    if save_directions:
        optimizer.register_state_dict_post_hook(lambda _, state_dict: projector.with_directions(state_dict))
    return projector
