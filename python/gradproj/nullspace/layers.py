"""Which weight matrices of a model a null space covers, and how each reads its inputs."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Wanted = Callable[[str, nn.Module], bool]
# What wrappers put into the names of modules.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)(?=\.|$)")


class Layer:
    """A weight matrix W [outputs, inputs] that trains, and its bias as one more input, which is always 1.

    Attributes:
        name: of the module, without what wrappers add to it.
        owner: the module that has the trained ``weight`` (and ``bias``).
        taps: the modules whose inputs and output gradients say what to protect: itself, more of them if several share
            the weight, or the layer that an adapter adapts.
        consumer: of an adapter, lora_B, the only consumer of lora_A's output: products with protected inputs are to be
            zero, not what they are, and then it may train freely.
    """

    def __init__(self, name: str, owner: nn.Module, taps: list[nn.Module], consumer: nn.Module | None = None):
        self.name, self.owner, self.taps, self.consumer = name, owner, taps, consumer

    @property
    def to_zero(self) -> bool:
        return self.consumer is not None

    @property
    def products(self) -> list[nn.Module]:
        """The modules that multiply by the weight when they are called."""
        return [self.owner] if self.to_zero else self.taps

    # Asked for anew each time: fully_shard() and others replace parameters.
    @property
    def weight(self) -> nn.Parameter:
        return self.owner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        bias = getattr(self.owner, "bias", None)
        return bias if isinstance(bias, Tensor) and bias.requires_grad and not self.to_zero else None  # type: ignore[return-value]

    @property
    def parameters(self) -> list[Tensor]:
        """What may train without harm to what is protected: not lora_B's bias, which is added to every output."""
        mine: list[Tensor] = [self.weight] if self.bias is None else [self.weight, self.bias]
        return mine if self.consumer is None else [*mine, self.consumer.weight]  # type: ignore[list-item]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; the bias counts as an input."""
        outputs, inputs = matrix(self.owner, self.weight).shape
        return outputs, inputs + (self.bias is not None)

    @property
    def outputs(self) -> int | None:
        """Of one call of a tap; None if ranks share them."""
        made_by = self.consumer or self.owner
        weight: Any = made_by.weight
        return None if hasattr(weight, "device_mesh") else matrix(made_by, weight).shape[0]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """The class of the module that has the weight, or ``"LoRA"``."""
        return "LoRA" if self.to_zero else type(self.owner).__name__

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.shape[0]} x {self.shape[1]})"


def find(model: nn.Module, wanted: Wanted | None = None) -> list[Layer]:
    """The layers of ``model`` that can be protected: ``nn.Linear``, transformers' ``Conv1D``, ``nn.Conv2d`` with
    groups=1, and PEFT's LoRA adapters, of those whose weight trains.

    None is a head that is tied to an embedding; a weight that is computed (weight_norm and other parametrizations); and
    the ``out_proj`` of ``nn.MultiheadAttention``, which is multiplied by inside of a function.

    Args:
        wanted: name and module -> whether to take it; None takes all.
    Raises:
        ValueError: there is none.
        NotImplementedError: an adapter that does more than add B A x, as DoRA does; FSDP1; DeepSpeed.
    """
    _refuse_flat_weights(model)
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, Layer] = {}
    adapted: list[Any] = [m for m in model.modules() if is_adapted(m)]
    elsewhere = {id(a) for m in adapted for a in (*m.lora_A.values(), *m.lora_B.values())}
    elsewhere |= {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    computed = []
    for full_name, module in model.named_modules():
        name = without_wrappers(full_name)
        if wanted is not None and not wanted(name, module):
            continue
        if is_adapted(module):
            for layer in _adapters(name, module):
                found[id(layer.weight)] = layer
        elif is_matrix(module) and id(module) not in elsewhere:
            if "weight" not in module._parameters:
                computed.append(name or type(module).__name__)
                continue
            weight: Any = module.weight
            if not weight.requires_grad or id(weight) in tied:
                continue
            if id(weight) in found:
                found[id(weight)].taps.append(module)
            else:
                found[id(weight)] = Layer(name, module, [module])
    if not found:
        why = (
            f"; the weight of {', '.join(computed[:3])} is computed (weight_norm, a parametrization): remove that first"
        )
        raise ValueError(
            f"NullSpace: {type(model).__name__} has no layer to protect: no nn.Linear, Conv1D, nn.Conv2d (groups=1) or LoRA "
            f"adapter whose weight requires a gradient and which modules= takes{why if computed else ''}"
        )
    return list(found.values())


def running_statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, with their names, whose statistics a forward pass in training mode moves."""
    found = [
        (without_wrappers(name), m)
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    return [(name, m) for name, m in found if m.track_running_stats and m.running_mean is not None]


def without_wrappers(name: str) -> str:
    return _WRAPPERS.sub("", name).lstrip(".")


def _refuse_flat_weights(model: nn.Module) -> None:
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise NotImplementedError(
            "NullSpace: FSDP1 hands out flat pieces of weights, of which no product can be pinned; shard with fully_shard (FSDP2)"
        )
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()):
        raise NotImplementedError(
            "NullSpace: DeepSpeed partitions weights and steps copies of them; capture before deepspeed.initialize(), and use "
            "gradproj.integrations.deepspeed.protect(), or shard with fully_shard (FSDP2)"
        )


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies its inputs by one weight matrix."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_adapted(module: nn.Module) -> bool:
    """A layer under PEFT's LoRA: a frozen base layer and pairs of adapters."""
    parts = (getattr(module, name, None) for name in ("base_layer", "lora_A", "lora_B"))
    return all(isinstance(part, nn.Module) for part in parts)


def _adapters(name: str, module: Any) -> list[Layer]:
    layers = []
    for adapter, down in module.lora_A.items():
        if not is_matrix(down) or not down.weight.requires_grad or not is_matrix(module.base_layer):
            continue
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or adapter in getattr(module, "lora_magnitude_vector", ()):
            kind = "DoRA" if adapter in module.lora_magnitude_vector else type(variant).__name__
            raise NotImplementedError(
                f"NullSpace: {name}: the adapter {adapter!r} is a {kind}, which does more than add B A x, so that a blind lora_A would "
                f"still change what the layer makes of protected inputs: train a plain LoRA (for DoRA use_dora=False), or leave the "
                f"layer out with modules="
            )
        layers.append(Layer(f"{name}.lora_A.{adapter}", down, [module], module.lora_B[adapter]))
    return layers


def refuse_trained_adapters(layers: Sequence[Layer]) -> None:
    """To call before a capture, which makes adapters blind.

    Raises:
        NotImplementedError: an adapter whose lora_B is not zero.
    """
    for layer in layers:
        if layer.consumer is not None and layer.consumer.weight.detach().any():  # type: ignore[operator]
            raise NotImplementedError(
                f"NullSpace: the adapter {layer.name} has been trained already (its lora_B is not zero), so that it cannot be made "
                f"blind to protected inputs without changing the model: merge it first; to go on with what it was trained under, "
                f"load() that instead of capturing"
            )


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """[outputs, inputs] view of a weight, or of anything that has its shape."""
    if isinstance(module, nn.Conv2d):
        return weight.flatten(1)
    return weight.t() if is_conv1d(module) else weight


def call_input(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, str]:
    """The input of one call, and its keyword, empty if it was given by position."""
    if args:
        return args[0], ""
    name = next(iter(inspect.signature(module.forward).parameters))
    return kwargs[name], name


def is_product(module: nn.Module, outputs: int | None, y: Any) -> bool:
    """Whether what a call returned can be the product with a weight: one tensor, with so many outputs if that is
    known."""
    if not isinstance(y, Tensor) or not y.dim():
        return False
    return outputs is None or y.shape[1 if isinstance(_adapted(module), nn.Conv2d) else -1] == outputs


def _adapted(module: Any) -> nn.Module:
    return module.base_layer if is_adapted(module) else module


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """[tokens, inputs]: what the weight matrix is multiplied with, one row for each output position."""
    module = _adapted(module)
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise NotImplementedError(f"NullSpace: nn.Conv2d with padding={module.padding!r}; give it as numbers")
        unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return unfolded.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """[tokens, outputs] in the order of :func:`input_rows`."""
    module = _adapted(module)
    if isinstance(module, nn.Conv2d):
        return y.flatten(2).transpose(1, 2).flatten(0, 1)
    return y.reshape(-1, y.shape[-1])
