"""PEFT's adapters: plain LoRA becomes blind to protected inputs; what does more is refused.

Beside an embedding, lora_A's columns are looked up: those of captured tokens stay what they are.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.nullspace.hearing import Listener
from gradproj.nullspace.matrices import At, Slot, Wanted, find_slots, is_looked_up, without_wrappers
from gradproj.nullspace.products import Part, read
from gradproj.nullspace.regions import whole


class Adapter(NamedTuple):
    """B A x beside a layer: the layer's module, and the slots of the two weights."""

    module: Any
    down: Slot
    up: Slot

    @property
    def starts_at_zero(self) -> bool:
        """As plain LoRA does with B = 0, and that of an embedding with A = 0."""
        return not (self.up.get().detach().any() and self.down.get().detach().any())

    @property
    def is_heard(self) -> bool:
        """Whether hearing knows it: added to a parameter, or looked up. Else its layer's calls are told."""
        return type(self.module).__name__ == "ParamWrapper" or is_looked_up(self.down)

    def parts(self, x: Tensor) -> list[Part]:
        """The adapter's A, told by the inputs and the output gradients of its layer: its own are zero while B is."""
        weight, down = self.down.get(), self.down.module
        at = At(self.down, whole(weight.shape), self.up)
        func: Any = F.linear
        settings: tuple = ()
        if isinstance(down, nn.modules.conv._ConvNd):
            func = getattr(F, f"conv{weight.dim() - 2}d")
            settings = None, down.stride, down.padding, down.dilation, down.groups
        heard = read(func, lambda *_: at, (x, weight, *settings), {})
        return heard.parts if heard else []


def _is_adapted(module: nn.Module) -> bool:
    """A layer under PEFT's LoRA: a frozen base layer and pairs of adapters. Those of AdaLoRA are plain parameters."""
    pairs = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
    return hasattr(module, "base_layer") and all(isinstance(part, nn.ModuleDict) for part in pairs)


def candidates(
    model: nn.Module, wanted: Wanted | None, slots: Sequence[Slot] = (), adapters: Sequence[Adapter] = ()
) -> tuple[list[Slot], list[Adapter]]:
    """The parameters that may be covered, and the adapters among them: those that train now, and those that did
    earlier."""
    _refuse_prompts(model)
    layers = _trained_layers(model, wanted)
    slots = [*{slot.name: slot for slot in [*slots, *find_slots(model, wanted)]}.values()]
    return slots, [*{a.down.name: a for a in [*adapters, *_find(layers, slots)]}.values()]


def _trained_layers(model: nn.Module, wanted: Wanted | None) -> list[Any]:
    """The layers whose adapters train. Refuses adapters that do more than add B A x, as DoRA does, and other kinds."""
    found = []
    for full_name, module in model.named_modules():
        name = without_wrappers(full_name)
        if not any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__) or (
            wanted and not wanted(name, module)
        ):
            continue
        if not any(p.requires_grad for key, p in module.named_parameters() if not key.startswith("base_layer.")):
            continue
        kind, advice = "", "train a plain LoRA"
        if not _is_adapted(module):
            package = type(module).__module__.split(".")[-2]
            kind = f"{package}'s {type(module).__name__} is an adapter that does not add B A x"
        else:
            variants = getattr(module, "lora_variant", {})
            for adapter, down, _ in _pairs(module):
                is_dora = adapter in module.lora_magnitude_vector
                if down.requires_grad and (is_dora or adapter in variants):
                    variant = "DoRA" if is_dora else type(variants[adapter]).__name__
                    kind = f"the adapter {adapter!r} is a {variant}, which does more than add B A x"
                    advice = "train a plain LoRA (for DoRA use_dora=False)"
        if kind:
            raise NotImplementedError(
                f"NullSpace: {name}: {kind}, so that it would change what the layer makes of protected inputs: "
                f"{advice}, or leave the layer out with modules="
            )
        found.append(module)
    return found


def _refuse_prompts(model: nn.Module) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise NotImplementedError(
                f"NullSpace: the adapter {name!r} is a prompt that is learnt, an input of all that the model says: to "
                "keep that it could learn nothing; train a plain LoRA"
            )


def _find(layers: Sequence[Any], slots: Sequence[Slot]) -> list[Adapter]:
    """The LoRA adapters of these layers that train."""
    by_parameter = {id(slot.get()): slot for slot in slots}
    return [
        Adapter(module, by_parameter[id(down)], by_parameter[id(up)])
        for module in layers
        for _, down, up in _pairs(module)
        if id(down) in by_parameter and id(up) in by_parameter
    ]


def _pairs(module: Any) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """The names of a layer's adapters, and their weights."""
    for name, down in module.lora_A.items():
        yield name, down.weight, module.lora_B[name].weight
    for name, down in module.lora_embedding_A.items():
        yield name, down, module.lora_embedding_B[name]


def names(blind: Sequence[Adapter]) -> set[str]:
    """Of the parameters that are not matrices by themselves."""
    return {slot.name for adapter in blind for slot in (adapter.down, adapter.up)}


def heard(adapters: Sequence[Adapter], blind: Sequence[Adapter]) -> dict[str, Slot | None]:
    """Of adapters that are added to a parameter or looked up, lora_B by the names of lora_A; None if not blind."""
    return {a.down.name: a.up if a in blind else None for a in adapters if a.is_heard}


@contextlib.contextmanager
def listening(blind: Sequence[Adapter], listener: Listener) -> Iterator[None]:
    """Tells of the calls of the layers beside which an adapter is."""
    handles = []
    try:
        for adapter in blind:
            if not adapter.is_heard:
                call = _Calls(adapter, listener)
                handles.append(adapter.module.register_forward_pre_hook(call.before, with_kwargs=True))
                handles.append(adapter.module.register_forward_hook(call.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls:
    def __init__(self, adapter: Adapter, listener: Listener):
        self._adapter, self._listener = adapter, listener
        self._heard: Any = None

    def before(self, module, args, kwargs):
        if not torch.is_grad_enabled():
            return None
        x, keyword = _input(module, args, kwargs)
        tapped, self._heard = self._listener.before(x, (), self._adapter.parts(x))
        return (args, {**kwargs, keyword: tapped}) if keyword else ((tapped, *args[1:]), kwargs)

    def after(self, module, args, y):
        if isinstance(y, Tensor) and y.requires_grad:
            self._listener.after(self._heard, y)
        self._heard = None


def _input(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, str]:
    """The input of a call, and its keyword, empty if it was given by position."""
    if args:
        return args[0], ""
    name = next(iter(inspect.signature(module.forward).parameters))
    return kwargs[name], name
