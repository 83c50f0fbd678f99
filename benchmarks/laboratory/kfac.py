"""Two-sided K-FAC as a reference: what training changes is scaled down along the directions that the capability needs.

The curvature of a linear layer's weights is the Kronecker product of the second moments of its inputs (A) and of its
output gradients (G). In the eigenbases of both, a weight's curvature is the product of two eigenvalues; its update is
scaled by 1 / (1 + curvature / c); or, elastic, all that it has moved so far, after every step. Plain torch, full
bases, float64 eigenvalues: a yardstick, not a protection to use.

Source: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature";
Ritter et al. 2018, "Online structured Laplace approximations", for elastic weights, there by a penalty.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Kfac:
    """Backward passes inside ``capture()`` once, then ``scale()`` after every optimizer step."""

    def __init__(self, model: nn.Module, damping: float, elastic: bool = False):
        """
        Args:
            damping: in (0, 1): what changes lose at a step, in the mean over all trained weights of linear layers.
            elastic: scale the distance from the start, instead of that from the step before.
        """
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        self.damping, self.elastic = damping, elastic

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        inputs: dict[nn.Linear, Tensor] = {}
        outputs: dict[nn.Linear, Tensor] = {}

        def moment(into: dict[nn.Linear, Tensor], layer: nn.Linear, rows: Tensor) -> None:
            rows = rows.detach().flatten(0, -2).double()
            into[layer] = into.get(layer, 0.0) + rows.T @ rows

        def heard(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            moment(inputs, layer, _with_ones(args[0]) if layer.bias is not None else args[0])
            output.register_hook(functools.partial(moment, outputs, layer))

        handles = [layer.register_forward_hook(heard) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        a = {layer: torch.linalg.eigh(inputs[layer]) for layer in self.layers}
        g = {layer: torch.linalg.eigh(outputs[layer]) for layer in self.layers}
        curvatures = [torch.outer(g[layer][0].clamp(min=0), a[layer][0].clamp(min=0)) for layer in self.layers]
        kept = kept_shares(curvatures, self.damping)
        dtype = self.layers[0].weight.dtype
        self.bases = [(g[layer][1].to(dtype), a[layer][1].to(dtype)) for layer in self.layers]
        self.kept = [k.to(dtype) for k in kept]
        self.before = [_matrix(layer) for layer in self.layers]

    @torch.no_grad()
    def scale(self) -> None:
        """W <- W_before + Q_G (kept * (Q_G^T (W - W_before) Q_A)) Q_A^T, the bias being one more input column."""
        for i, (layer, (left, right), kept) in enumerate(zip(self.layers, self.bases, self.kept, strict=True)):
            update = left.T @ (_matrix(layer) - self.before[i]) @ right
            scaled = self.before[i] + left @ (kept * update) @ right.T
            layer.weight.copy_(scaled[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.copy_(scaled[:, -1])
            if not self.elastic:
                self.before[i] = scaled

    def nbytes(self) -> int:
        tensors = [t for pair in self.bases for t in pair] + self.kept + self.before
        return sum(t.nbytes for t in tensors)


def kept_shares(curvatures: list[Tensor], damping: float) -> list[Tensor]:
    """1 / (1 + curvature / c) of every weight, with c such that its mean over them is ``1 - damping``, by bisection."""
    every = torch.cat([c.flatten() for c in curvatures])
    if not 0.0 < damping < float((every > 0).double().mean()):
        raise ValueError(f"K-FAC: damping must be above 0 and below the share of weights with curvature, got {damping}")
    low, high = every[every > 0].min().log() - 50.0, every.max().log() + 50.0  # of log c; the mean rises with c
    for _ in range(100):
        middle = (low + high) / 2
        if (1 / (1 + every / middle.exp())).mean() < 1 - damping:
            low = middle
        else:
            high = middle
    return [1 / (1 + c / middle.exp()) for c in curvatures]


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _matrix(layer: nn.Linear) -> Tensor:
    weight = layer.weight.detach()
    return weight.clone() if layer.bias is None else torch.cat([weight, layer.bias.detach()[:, None]], 1)
