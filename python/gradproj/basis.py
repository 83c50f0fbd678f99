"""What a null space holds of a layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import allocation
from gradproj.allocation import Curvature
from gradproj.layers import Layer, is_conv1d, matrix
from gradproj.moments import Gather
from gradproj.sharding import all_reduce, local_tensors


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


def add_earlier(gather: Gather, layers: Sequence[Layer], bases: Mapping[str, Basis], group) -> None:
    """What the other ranks of ``group`` gathered, and of an earlier capture its eigenpairs, which is what was protected."""
    _sum_over_ranks(gather, group)
    added = set()
    for l, layer in enumerate(layers):
        number, basis = gather.moment_of[l], bases.get(layer.name)
        if number is None or basis is None:
            continue
        if number not in added:
            added.add(number)
            gather.moments[number].add_eigen(basis.curvature.values[: basis.rank], basis.vectors, basis.tokens)
        gather.squares[l] = gather.squares[l] + basis.curvature.scale * basis.tokens
        gather.tokens[l] += basis.tokens


@torch.no_grad()
def make_bases(
    gather: Gather, layers: Sequence[Layer], share: float, most: Callable[[Layer], int | None]
) -> dict[str, Basis]:
    """Moments and output gradients of layers become their bases.

    Args:
        share: of all weights' dimensions that bases may fix.
        most: layer -> the largest rank that it may have; None for any.
    Raises:
        RuntimeError: a layer without a gradient, or whose inputs or gradients were not finite.
        NotImplementedError: a weight that is sharded over its inputs.
    """
    numbers = [_checked(gather, l, layer) for l, layer in enumerate(layers)]
    pairs = [moment.eigen() for moment in gather.moments]
    curvatures = []
    for l, (layer, number) in enumerate(zip(layers, numbers, strict=True)):
        moment, scale = gather.moments[number], float(gather.squares[l]) / gather.tokens[l]
        values = pairs[number][0][: most(layer)]
        curvatures.append(Curvature(scale, values, float(moment.trace) / max(1, moment.tokens), *layer.shape))
    ranks = allocation.ranks(curvatures, share)
    widest: dict[int, int] = {}  # per moment: its layers use the leading columns of one matrix
    for number, rank in zip(numbers, ranks, strict=True):
        widest[number] = max(rank, widest.get(number, 0))
    vectors = {n: spaced(pairs[n][1][:, :rank].to(gather.moments[n].sum.dtype)) for n, rank in widest.items()}
    bases = {}
    for layer, number, rank, curvature in zip(layers, numbers, ranks, curvatures, strict=True):
        basis = vectors[number][:, :rank]
        target = None if layer.to_zero else _product(layer, basis)
        bases[layer.name] = Basis(basis, target, curvature, gather.moments[number].tokens)
    return bases


def spaced(vectors: Tensor) -> Tensor:
    """Columns [inputs, r] one after the other in memory, so that the leading ones of a shared matrix lie as a matrix of their
    own does, each from a 16-byte boundary on: with a bias, inputs are odd."""
    inputs, rank = vectors.shape
    memory = vectors.new_zeros(rank, -(-inputs // 4) * 4)[:, :inputs].T
    return memory.copy_(vectors)


def _checked(gather: Gather, l: int, layer: Layer) -> int:
    """The number of a layer's moment."""
    number = gather.moment_of[l]
    if number is None or not gather.tokens[l]:
        raise RuntimeError(
            f"NullSpace: layer {layer.name} got no gradient in the capture: give it batches that use it, or leave it out with "
            f"modules="
        )
    if not (gather.moments[number].sum.isfinite().all() and gather.squares[l].isfinite()):
        raise RuntimeError(f"NullSpace: inputs or gradients of layer {layer.name} were not finite in the capture")
    return number


def local_weight(layer: Layer, weight: Tensor) -> Tensor:
    """This rank's memory of a weight.

    Raises:
        NotImplementedError: it is sharded over its inputs, so that W U would be a sum over ranks.
    """
    for placement in getattr(weight, "placements", ()):
        outputs = 1 if is_conv1d(layer.owner) else 0
        if placement.is_partial() or (placement.is_shard() and placement.dim != outputs):
            raise NotImplementedError(
                f"NullSpace: the weight of {layer.name} is {placement} of a DTensor, that is, sharded over its inputs; shard it over its "
                f"outputs, or leave it out with modules="
            )
    return local_tensors([weight])[0]


def _product(layer: Layer, basis: Tensor) -> Tensor:
    """W U of this rank's rows, the bias's column included."""
    weight = matrix(layer.owner, local_weight(layer, layer.weight.detach())).to(basis.dtype)
    if layer.bias is None:
        return weight @ basis
    bias = local_tensors([layer.bias.detach()])[0].to(basis.dtype)
    return torch.addmm(torch.outer(bias, basis[-1]), weight, basis[:-1])


def _sum_over_ranks(gather: Gather, group) -> None:
    """Every rank has seen its own batches: one all_reduce per moment, one for the rest."""
    if group is None:
        return
    numbers = [torch.tensor([float(m.tokens), float(m.trace)]) for m in gather.moments]
    numbers += [torch.tensor([float(n), float(q)]) for n, q in zip(gather.tokens, gather.squares, strict=True)]
    totals = all_reduce(torch.stack(numbers).double(), group).tolist()
    for moment, (tokens, trace) in zip(gather.moments, totals, strict=False):
        moment.sum = all_reduce(moment.sum.double(), group).to(moment.sum.dtype)
        moment.tokens, moment.trace = int(tokens), moment.trace.new_tensor(trace)
    for l, (tokens, square) in enumerate(totals[len(gather.moments) :]):
        gather.tokens[l], gather.squares[l] = int(tokens), torch.tensor(square, dtype=torch.float64)


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
