"""The lists that one ``pin_`` takes for the layers of a null space."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradproj.nullspace.basis import Basis, local_bias, local_weight
from gradproj.nullspace.layers import Layer
from gradproj.rows import functional
from gradproj.rows.results import Pin
from gradproj.rows.sharding import Sharding, local_tensors


class PinLists:
    """Weights, bases, targets and biases, made once: they hold for as long as the parameters stay where they are."""

    def __init__(self, layers: Sequence[Layer], bases: Mapping[str, Basis]):
        self.covered = {id(p) for layer in layers for p in layer.parameters}  # identities
        self._seen: list[tuple[dict, str, Tensor, Tensor, int, bool]] = []
        for layer in layers:
            for module in dict.fromkeys((layer.owner, layer.consumer or layer.owner)):
                for name, p in module._parameters.items():
                    if p is not None:
                        local = local_tensors([p])[0]
                        self._seen.append((module._parameters, name, p, local, local.data_ptr(), p.requires_grad))
        moving = movable(layers, bases)
        self._names = tuple(layer.name for layer in moving)
        self._weights = [local_weight(layer, layer.weight.detach()) for layer in moving]
        self._bases = [bases[name].vectors for name in self._names]
        self._targets = [bases[name].target for name in self._names]
        self._biases = [local_bias(layer.bias) for layer in moving]

    def current(self) -> bool:
        """Whether no parameter was replaced, moved, frozen or freed since."""
        for parameters, name, p, local, address, trained in self._seen:
            if parameters[name] is not p or p.requires_grad != trained or local.data_ptr() != address:
                return False
        return True

    def pin(self) -> Pin:
        return Pin(self._names, functional.pin_(self._weights, self._bases, self._targets, self._biases))


def refuse_optimizers(layers: Sequence[Layer], optimizers: Sequence[Optimizer], sharding: Sharding | None) -> None:
    """Refuse optimizers that step none of the layers, and shards whose rows nothing tells."""
    stepped = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not any(id(layer.weight) in stepped for layer in layers):
        raise ValueError(
            "this NullSpace is of another model than the optimizer's: none of its layers' weights is among the "
            "optimizer's parameters; make both from the same model, the optimizer after adapters were added"
        )
    if sharding is not None and sharding.placement == "shard":
        raise NotImplementedError(
            'a NullSpace pins whole rows of weights, which Sharding(placement="shard") does not tell: shard with '
            "fully_shard (FSDP2), whose DTensors do; for pipeline stages make NullSpace(stage, group=) of each stage's "
            "own ranks"
        )


def movable(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> list[Layer]:
    """The layers that have a basis and train. Refused if one trains other parameters than those that were captured."""
    found = []
    for layer in layers:
        basis, frozen = bases[layer.name], not layer.weight.requires_grad
        if frozen and layer.bias is None:
            continue
        if frozen or basis.vectors.shape[0] != layer.shape[1]:
            raise RuntimeError(
                f"NullSpace: layer {layer.name} does not train what it trained when it was captured: its weight or "
                "bias was frozen or freed since, or has another size; capture again"
            )
        if basis.rank:
            found.append(layer)
    return found


@torch.no_grad()
def project_gradients(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> Pin:
    """G <- G - (G U) U^T on the gradients of the layers that have one."""
    moving = movable([layer for layer in layers if layer.weight.grad is not None], bases)
    gradients = [local_weight(layer, layer.weight.grad) for layer in moving]  # type: ignore[arg-type]
    biases = [None if layer.bias is None else local_bias(layer.bias.grad) for layer in moving]
    spans = [bases[layer.name].vectors for layer in moving]
    for l, layer in enumerate(moving):
        if layer.bias is not None and biases[l] is None:
            spans[l] = spans[l][:-1]  # such a bias does not move: it is no input
    return Pin(tuple(layer.name for layer in moving), functional.pin_(gradients, spans, None, biases))
