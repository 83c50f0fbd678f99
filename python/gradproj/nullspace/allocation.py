"""Where the rank of a null space goes, and how fast each layer may still learn: pure functions of curvature."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NoDecay = Callable[[str, Tensor], bool]
STEPS = 16  # different learning rates at most: an optimizer's foreach and fused paths take one group at a time


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


def check(share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"NullSpace: share must be between 0 and 1, got {share}")


def ranks(layers: Sequence[Curvature], share: float) -> list[int]:
    """How many eigenvectors each layer keeps: those of the largest curvature over all layers.

    An eigenvector of a layer fixes as many weights as the layer has outputs. They are taken in descending order of
    curvature until the next one would fix more than ``share`` of all weights.
    """
    if not layers:
        return []
    curvature = torch.cat([layer.scale * layer.values.double().cpu() for layer in layers])
    owner = torch.cat([torch.full((len(layer.values),), l) for l, layer in enumerate(layers)]).long()
    cost = torch.tensor([layer.outputs for layer in layers])[owner]
    order = curvature.argsort(descending=True, stable=True)
    order = order[curvature[order] > 0]
    budget = share * sum(layer.outputs * layer.inputs for layer in layers)
    kept = owner[order[cost[order].cumsum(0) <= budget]]
    return torch.bincount(kept, minlength=len(layers)).tolist()


def rates(left: Sequence[float], weights: Sequence[int], damping: float) -> list[float]:
    """Factors of the layers' learning rates: m_l = 1 / (1 + left_l / c), with c such that 1 - m_l is ``damping`` in the
    mean over the weights that have any curvature left. At most 16 different ones, in (0, 1]; their mean is exact.

    ``left`` is the curvature that each layer's kept directions leave, ``weights`` how many weights it has.
    """
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping must be in [0, 1), got {damping}")
    if damping == 0.0 or not any(left):
        return [1.0] * len(left)
    curved = sum(w for x, w in zip(left, weights, strict=True) if x > 0)
    low, high = math.log(min(x for x in left if x > 0)) - 40, math.log(max(left)) + 40
    for _ in range(200):  # bisection of log c
        middle = (low + high) / 2
        c = math.exp(middle)
        slowed = sum(w * x / (x + c) for x, w in zip(left, weights, strict=True)) / curved
        low, high = (middle, high) if slowed > damping else (low, middle)
    c = math.exp((low + high) / 2)
    return _grouped([c / (x + c) for x in left], weights)


def factors(matrices: Sequence[Any], bases: Mapping[str, Any], damping: float) -> dict[int, float]:
    """Of the learning rate, by the identities of the matrices' parameters. Slices of one parameter learn at one rate,
    by the mean of what is left in them."""
    left: dict[str, float] = {}
    weights: dict[str, int] = {}
    for matrix in matrices:
        name = matrix.slot.name
        weights[name] = weights.get(name, 0) + matrix.numel
        left[name] = left.get(name, 0.0) + matrix.numel * bases[matrix.name].left
    means = [left[name] / weights[name] for name in left]
    rate_of = dict(zip(left, rates(means, list(weights.values()), damping), strict=True))
    return {id(p): rate_of[matrix.slot.name] for matrix in matrices for p in matrix.parameters}


def _grouped(factors: list[float], weights: Sequence[int]) -> list[float]:
    """Each factor becomes the mean of its bin, of STEPS bins of equal width in the logarithm."""
    logs = [math.log(f) for f in factors]
    low, width = min(logs), (max(logs) - min(logs)) / STEPS
    bins = [min(STEPS - 1, int((x - low) / width)) if width else 0 for x in logs]
    means = {}
    for b in set(bins):
        mine = [l for l, of in enumerate(bins) if of == b]
        means[b] = sum(factors[l] * weights[l] for l in mine) / sum(weights[l] for l in mine)
    return [means[b] for b in bins]


def groups(
    named: Sequence[tuple[str, Tensor]], factors: Mapping[int, float], lr: float, decay: float | None, no_decay: NoDecay
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each learning rate and weight decay. ``factors`` of ``lr`` are by
    identity, 1 for what is absent."""
    found: dict[tuple, dict[str, Any]] = {}
    for name, p in named:
        settings = {"lr": lr * factors.get(id(p), 1.0)}
        if decay is not None:
            settings["weight_decay"] = 0.0 if no_decay(name, p) else decay
        found.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(p)
    return list(found.values())


def is_vector(name: str, p: Tensor) -> bool:
    return p.dim() < 2
