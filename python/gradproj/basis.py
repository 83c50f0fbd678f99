"""What a null space holds of a layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from gradproj.allocation import Curvature
from gradproj.layers import Layer


class Basis(NamedTuple):
    """What a layer keeps.

    Attributes:
        vectors: U [inputs, r], orthonormal; with a bias the last input is its 1. Layers with the same inputs share memory.
        target: B = W U [outputs, r] of this rank's rows of the weight; None for zeros.
        curvature: that the rank was chosen by.
        tokens: whose inputs it is made of.
    """

    vectors: Tensor
    target: Tensor | None
    curvature: Curvature
    tokens: int

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    @property
    def kept(self) -> float:
        """The part of the layer's curvature that is kept, between 0 and 1."""
        return float(self.curvature.values[: self.rank].sum()) / self.curvature.trace if self.curvature.trace else 0.0


def report(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> str:
    """A table in markdown, and a line of totals. Memory that layers share is counted once."""
    lines = ["| layer | outputs x inputs | rank | curvature kept | bytes |", "| --- | ---: | ---: | ---: | ---: |"]
    seen: set[int] = set()
    total = 0
    for layer in layers:
        basis = bases[layer.name]
        storage = basis.vectors.untyped_storage()
        mine = 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
        if basis.target is not None:
            mine += basis.target.numel() * basis.target.element_size()
        total += mine
        outputs, inputs = layer.shape
        lines.append(f"| {layer.name} | {outputs} x {inputs} | {basis.rank} | {basis.kept:.1%} | {mine:,} |")
    weights = sum(layer.numel for layer in layers)
    fixed = sum(bases[layer.name].rank * layer.shape[0] for layer in layers)
    lines.append(
        f"\n{len(layers)} layers, {fixed / weights:.1%} of {weights:,} weights' dimensions fixed, {total / 2**20:.1f} MiB of bases"
    )
    return "\n".join(lines)
