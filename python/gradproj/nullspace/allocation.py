"""Where the rank of a null space goes, and how fast each layer may still learn: pure functions of curvature."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = 16  # different learning rates at most: foreach and fused paths of an optimizer stay whole


class Curvature(NamedTuple):
    """Of the loss, per unit of weight change along each eigenvector of a layer's inputs: ``scale * values``.

    Attributes:
        scale: s, mean squared output gradient.
        values: [k] eigenvalues of the mean of x x^T, descending, those above rounding.
        trace: of that mean.
        outputs, inputs: of the weight matrix.
    """

    scale: float
    values: Tensor
    trace: float
    outputs: int
    inputs: int


def ranks(layers: Sequence[Curvature], share: float) -> list[int]:
    """How many eigenvectors each layer keeps: those of the largest curvature over all layers.

    An eigenvector of a layer fixes as many weights as the layer has outputs; they are taken in descending order of
    curvature until the next would fix more than ``share`` of all weights.
    """
    curvature = torch.cat([layer.scale * layer.values.double().cpu() for layer in layers])
    owner = torch.cat([torch.full((len(layer.values),), l) for l, layer in enumerate(layers)]).long()
    cost = torch.tensor([layer.outputs for layer in layers])[owner]
    order = curvature.argsort(descending=True, stable=True)
    order = order[curvature[order] > 0]
    budget = share * sum(layer.outputs * layer.inputs for layer in layers)
    kept = owner[order[cost[order].cumsum(0) <= budget]]
    return torch.bincount(kept, minlength=len(layers)).tolist()


def rest(layer: Curvature, rank: int) -> float:
    """Curvature that is left: scale times the mean eigenvalue over the directions that are not kept."""
    left = max(0.0, layer.trace - float(layer.values[:rank].sum()))
    return layer.scale * left / max(1, layer.inputs - rank)


def rates(rests: Sequence[float], weights: Sequence[int], damping: float) -> list[float]:
    """Factors m_l of the layers' learning rates: 1 / (1 + rest_l / c), with c such that 1 - m_l is ``damping`` in the
    mean.

    Args:
        rests: per layer, the curvature that is left.
        weights: per layer, how many weights it has: what the mean is taken over.
        damping: in [0, 1); 0 gives 1 everywhere.
    Returns:
        at most 16 different factors in (0, 1]; their mean is exact.
    Raises:
        ValueError: damping out of range, or more than can be reached.
    """
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping must be in [0, 1), got {damping}")
    if damping == 0.0:
        return [1.0] * len(rests)
    curved = sum(w for r, w in zip(rests, weights, strict=True) if r > 0) / sum(weights)
    if damping >= curved:
        raise ValueError(f"damping={damping}, but only {curved:.3f} of the weights have any curvature left")

    def slowed(log_c: float) -> float:
        c = math.exp(log_c)
        return sum(w * r / (r + c) for r, w in zip(rests, weights, strict=True)) / sum(weights)

    low, high = math.log(min(r for r in rests if r > 0)) - 40, math.log(max(rests)) + 40
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slowed(middle) > damping else (low, middle)
    c = math.exp((low + high) / 2)
    return _grouped([c / (r + c) for r in rests], weights)


def groups(
    parameters: Sequence[Tensor], factors: Mapping[int, float], lr: float, decays: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each learning rate and weight decay.

    Args:
        factors: of the learning rate, by identity; 1 for what is absent.
        decays: per parameter its weight decay; None leaves it to the optimizer.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for p, decay in zip(parameters, decays, strict=True):
        factor = factors.get(id(p), 1.0)
        group = found.setdefault((factor, decay), {"params": [], "lr": lr * factor})
        group["params"].append(p)
        if decay is not None:
            group["weight_decay"] = decay
    return list(found.values())


def _grouped(factors: list[float], weights: Sequence[int]) -> list[float]:
    """Factors of one of STEPS bins of equal width in the logarithm become their mean."""
    logs = [math.log(f) for f in factors]
    low, width = min(logs), (max(logs) - min(logs)) / STEPS
    number = [min(STEPS - 1, int((x - low) / width)) if width else 0 for x in logs]
    result = list(factors)
    for b in set(number):
        mine = [i for i, n in enumerate(number) if n == b]
        mean = sum(factors[i] * weights[i] for i in mine) / sum(weights[i] for i in mine)
        for i in mine:
            result[i] = mean
    return result
