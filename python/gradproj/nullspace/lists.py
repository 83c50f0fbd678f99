"""The lists that one ``pin_`` takes for the layers of a null space."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradproj.nullspace.basis import Basis, local_weight
from gradproj.nullspace.layers import Layer, matrix
from gradproj.rows import functional
from gradproj.rows.results import Pin
from gradproj.rows.sharding import local_tensors


class PinLists:
    """Weights, bases, targets and biases, made once: they hold for as long as the parameters stay where they are.

    Attributes:
        covered: identities of the parameters of the layers.
    Raises:
        RuntimeError: a layer trains other parameters than those that were captured.
    """

    def __init__(self, layers: Sequence[Layer], bases: Mapping[str, Basis]):
        self.covered = {id(p) for layer in layers for p in layer.parameters}
        self._names: list[str] = []
        self._weights: list[Tensor] = []
        self._bases: list[Tensor] = []
        self._targets: list[Tensor | None] = []
        self._biases: list[Tensor | None] = []
        self._seen: list[tuple[dict, str, Tensor, Tensor, int, bool]] = []
        for layer in layers:
            basis = bases[layer.name]
            for module in dict.fromkeys((layer.owner, layer.consumer or layer.owner)):
                for name, p in module._parameters.items():
                    if p is not None:
                        local = local_tensors([p])[0]
                        self._seen.append((module._parameters, name, p, local, local.data_ptr(), p.requires_grad))
            if not trains(layer, basis) or not basis.rank:
                continue
            self._names.append(layer.name)
            self._weights.append(matrix(layer.owner, local_weight(layer, layer.weight.detach())))
            self._bases.append(basis.vectors)
            self._targets.append(basis.target)
            self._biases.append(None if layer.bias is None else local_tensors([layer.bias.detach()])[0])

    def current(self) -> bool:
        """Whether no parameter was replaced, moved, frozen or freed since."""
        for parameters, name, p, local, address, trained in self._seen:
            if parameters[name] is not p or p.requires_grad != trained or local.data_ptr() != address:
                return False
        return True

    def pin(self) -> Pin:
        moved = functional.pin_(self._weights, self._bases, self._targets, self._biases)
        return Pin(tuple(self._names), moved)


def trains(layer: Layer, basis: Basis) -> bool:
    """Whether a layer may have moved.

    Raises:
        RuntimeError: it trains other parameters than those that were captured.
    """
    frozen = not layer.weight.requires_grad
    if frozen and layer.bias is None:
        return False
    if frozen or basis.vectors.shape[0] != layer.shape[1]:
        raise RuntimeError(
            f"NullSpace: layer {layer.name} does not train what it trained when it was captured: its weight or bias was "
            f"frozen or freed since, or has another size; capture again"
        )
    return True


@torch.no_grad()
def project_gradients(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> Pin:
    """G <- G - (G U) U^T on the gradients of the layers that have one."""
    names, gradients, spans, biases = [], [], [], []
    for layer in layers:
        basis, gradient = bases[layer.name], layer.weight.grad
        if gradient is None or not trains(layer, basis) or not basis.rank:
            continue
        of_bias = None if layer.bias is None else layer.bias.grad
        names.append(layer.name)
        gradients.append(matrix(layer.owner, local_weight(layer, gradient)))
        # A bias without a gradient beside a weight that has one would be a frozen one; then it is no input.
        spans.append(basis.vectors if layer.bias is None or of_bias is not None else basis.vectors[:-1])
        biases.append(None if of_bias is None else local_tensors([of_bias])[0])
    return Pin(tuple(names), functional.pin_(gradients, spans, None, biases))
