"""The hooks of one protection on the optimizers that it belongs to."""

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports the compiler only when needed
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradproj.capture import DEEPSPEED
from gradproj.protection import Protection
from gradproj.rows.sharding import Sharding

SWITCHES = ("train", "eval")  # methods by which some optimizers evaluate other weights than they train


class Hooks:
    """The hooks of one protection on its optimizers. They refer to them weakly: an optimizer owns its hooks, so that it
    and what is protected are freed when nobody else refers to it."""

    def __init__(self, caller: str, optimizers: list[Optimizer], protection: Protection, sharding: Sharding | None):
        if not isinstance(protection, Protection):
            raise TypeError(
                f"{caller}: protection must be a gradproj.NullSpace or gradproj.Directions, got "
                f'{type(protection).__name__}; for example gradproj.Directions(8, "conflict")'
            )
        if sharding is not None and not isinstance(sharding, Sharding):
            raise TypeError(f"{caller}: sharding must be a gradproj.Sharding, got {type(sharding).__name__}")
        for optimizer in optimizers:
            if hasattr(optimizer, "_gradproj"):
                raise RuntimeError(
                    f"{caller}: this {type(optimizer).__name__} is protected already; detach() first, or use what "
                    f"protects it"
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
            optimizer._gradproj = self  # type: ignore[attr-defined]
            self._hear_switches(optimizer)
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_state_dict_post_hook(self._save),
                optimizer.register_load_state_dict_pre_hook(self._load),
            ]

    def _hear_switches(self, optimizer: Optimizer) -> None:
        """Schedule-free optimizers put other weights in place by ``eval()`` and ``train()``; torch has no hooks for
        these."""

        def switch(name, ref, *args):
            with self.protection.switching():
                return getattr(type(ref()), name)(ref(), *args)

        for name in SWITCHES:
            if callable(getattr(type(optimizer), name, None)):
                vars(optimizer)[name] = functools.partial(switch, name, weakref.ref(optimizer))

    def _adopt(self, optimizer: Optimizer) -> None:
        """Take over what the optimizer keeps as its own, because it loaded a checkpoint without these hooks."""
        parameters = _parameters(optimizer)
        state = {i: optimizer.state[p] for i, p in enumerate(parameters) if p in optimizer.state}
        live = {"state": state, "param_groups": [{"params": range(len(parameters))}]}
        self.protection.load_state(live, parameters)
        left = self.protection.strip(live)["state"]
        for i, mine in state.items():
            if i not in left:
                del optimizer.state[parameters[i]]
            elif left[i] is not mine:
                optimizer.state[parameters[i]] = left[i]

    def _adopt_late(self, optimizer: Optimizer) -> None:
        """The same for a class that loads in a way of its own, as those of bitsandbytes do."""
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            self._adopt(optimizer)

    def warn_of_copies(self) -> None:
        """Copying and pickling go through ``__getstate__``; torch copies neither the hooks nor this one."""

        def getstate(ref):
            if len(self.protection):
                warnings.warn(
                    "an optimizer that attach() protects is being copied, but its hooks do not go with it: the copy "
                    "steps without protection until attach() is called on it",
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
        itself, *given = args
        closure = self.protection.before_step(given[0] if given else kwargs.get("closure"), begins=not self._stepped)
        if closure is None:
            return None
        return ((itself, closure, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": closure})

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return _untraced(self._after_step, optimizer, args, kwargs)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self.end_round()

    def end_round(self) -> None:
        """No other optimizer of a list will step this time."""
        if self._stepped:
            self._stepped.clear()
            self.protection.after_step()

    def settle(self) -> None:
        """Finish pending rounds and late loads, before protect() or state_dict()."""
        self.end_round()
        for ref in self._optimizers:
            if (optimizer := ref()) is not None:
                self._adopt_late(optimizer)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.settle()
        return self.protection.state(self.protection.strip(state_dict), _parameters(optimizer))

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._stepped.clear()  # an incomplete round no longer matters
        self.protection.load_state(state_dict, _parameters(optimizer))
        # The optimizer would cast directions to its parameters' dtype and keep them as its own.
        return self.protection.strip(state_dict)

    def remove(self) -> None:
        if not self._handles:
            return
        self.end_round()
        for handle in self._handles:
            handle.remove()
        for ref in self._optimizers:
            if (optimizer := ref()) is not None:
                del optimizer._gradproj  # type: ignore[attr-defined]
                for name in ("__getstate__", *SWITCHES):
                    vars(optimizer).pop(name, None)
        self._handles, self._optimizers = [], []
        self.protection.release()


@_disable_dynamo
def _untraced(function, *args):
    return function(*args)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def inner_optimizer(caller: str, optimizer: Any) -> Optimizer:
    """The optimizer that has the step hooks; TypeError or NotImplementedError if there is none."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith(("deepspeed.runtime", "accelerate.utils.deepspeed")):
            raise NotImplementedError(f"{caller}: {kind.__module__}.{kind.__name__}: {DEEPSPEED}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{caller} takes a torch.optim.Optimizer, got {type(optimizer).__name__}; for example "
            f"torch.optim.AdamW(model.parameters())"
        )
    _refuse_unheard(caller, optimizer)
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer
    wrapped = getattr(optimizer, "optimizer", None)
    if wrapped is None:
        raise TypeError(
            f"{caller}: {type(optimizer).__name__} has no step hooks, because it is a wrapper; pass the optimizer that "
            f"it wraps"
        )
    return inner_optimizer(caller, wrapped)


def _refuse_unheard(caller: str, optimizer: Optimizer) -> None:
    """Refuse optimizers that change weights where no hook is called."""
    name, base = type(optimizer).__name__, getattr(optimizer, "base_optimizer", None)
    if hasattr(optimizer, "fused_backward") or hasattr(optimizer, "optimizer_dict"):  # LOMO; transformers' layerwise
        raise NotImplementedError(
            f"{caller}: {name} changes weights during the backward pass: take an optimizer that steps when the "
            "gradients of all parameters are there"
        )
    if hasattr(optimizer, "second_step") and isinstance(base, Optimizer):
        raise TypeError(
            f"{caller}: {name}.second_step() calls no step hooks but those of its base_optimizer: pass that "
            f"{type(base).__name__}"
        )
    if hasattr(optimizer, "_optimizer_step_pre_hooks") and not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        raise TypeError(  # pytorch_optimizer's Lookahead and others
            f"{caller}: {name} wraps an optimizer and has not all hooks of one: pass the optimizer that it wraps, and "
            "capture before the first step, so that weights which it averages are pinned from the beginning"
        )
