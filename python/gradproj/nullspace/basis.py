"""What a null space holds of a layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj.nullspace import allocation
from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.layers import Layer, is_conv1d, matrix
from gradproj.nullspace.moments import Gather, Moment
from gradproj.rows.sharding import local_tensors


class Basis(NamedTuple):
    """What a layer keeps.

    Attributes:
        vectors: U [inputs, r], orthonormal; with a bias the last input is its 1. Layers with the same inputs share
            memory.
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


def add_earlier(gather: Gather, layers: Sequence[Layer], bases: Mapping[str, Basis]) -> None:
    """Of an earlier capture its eigenpairs, which is what was protected.

    Layers that share a moment now, but had bases of their own, part: each goes on with what it had.
    """
    groups: dict[tuple[int | None, int | None], list[int]] = {}  # by the moment, and the memory of the earlier vectors
    for l, layer in enumerate(layers):
        basis = bases.get(layer.name)
        memory = basis.vectors.untyped_storage().data_ptr() if basis is not None and basis.tokens else None
        groups.setdefault((gather.moment_of[l], memory), []).append(l)
        if basis is not None:
            gather.squares[l] = gather.squares[l] + basis.curvature.scale * basis.tokens
            gather.tokens[l] += basis.tokens
    moments: list[Moment] = []
    for (number, memory), mine in groups.items():
        if number is None and memory is None:  # reached by no token, now or earlier
            continue
        for l in mine:
            gather.moment_of[l] = len(moments)
        if number is None:
            vectors = bases[layers[mine[0]].name].vectors
            moments.append(gather.new_moment(mine[0], vectors.device, vectors.dtype))
        else:
            taken = any(moment is gather.moments[number] for moment in moments)
            moments.append(gather.moments[number].copy() if taken else gather.moments[number])
    gather.moments = moments
    for (_, memory), mine in groups.items():
        if memory is not None:
            widest = max((bases[layers[l].name] for l in mine), key=lambda basis: basis.rank)
            moment = moments[gather.moment_of[mine[0]]]  # type: ignore[index]
            moment.add_eigen(widest.curvature.values[: widest.rank], widest.vectors, widest.tokens)


@torch.no_grad()
def make_bases(
    gather: Gather, layers: Sequence[Layer], share: float, most: Callable[[Layer], int | None]
) -> dict[str, Basis]:
    """Moments and output gradients of layers become their bases. A layer that no token has reached gets one of rank 0.

    One moment at a time, which is freed, and of its eigenvectors no more are kept than the share allows so far: beside
    the bases this holds the double of one moment.

    Args:
        share: of all weights' dimensions that bases may fix.
        most: layer -> the largest rank that it may have; None for any.
    Raises:
        RuntimeError: inputs or gradients of a layer were not finite.
        NotImplementedError: a weight that is sharded over its inputs.
    """
    numbers = [number if gather.tokens[l] else None for l, number in enumerate(gather.moment_of)]
    for l, number in enumerate(numbers):
        if number is not None and not (gather.moments[number].sum.isfinite().all() and gather.squares[l].isfinite()):
            raise RuntimeError(
                f"NullSpace: inputs or gradients of layer {layers[l].name} were not finite in the capture"
            )
    curvatures = [Curvature(0.0, torch.zeros(0, dtype=torch.float64), 0.0, *layer.shape) for layer in layers]
    vectors: dict[int, Tensor] = {}  # per moment: its layers use the leading columns of one matrix
    ranks = [0] * len(layers)
    for number in sorted({n for n in numbers if n is not None}):
        moment = gather.moments[number]
        values, found = moment.eigen()
        values, trace = values.cpu(), float(moment.trace) / max(1, moment.tokens)
        vectors[number] = found.to(moment.sum.dtype)
        moment.sum = moment.sum.new_empty(0)
        for l in (l for l, n in enumerate(numbers) if n == number):
            scale = float(gather.squares[l]) / gather.tokens[l]
            curvatures[l] = Curvature(scale, values[: most(layers[l])], trace, *layers[l].shape)
        ranks = allocation.ranks(curvatures, share)  # later moments only take from these
        for n, held in vectors.items():
            widest = max(rank for rank, of in zip(ranks, numbers, strict=True) if of == n)
            if widest < held.shape[1]:
                vectors[n] = held[:, :widest].clone()
    vectors = {n: spaced(held) for n, held in vectors.items()}
    bases = {}
    for layer, number, rank, curvature in zip(layers, numbers, ranks, curvatures, strict=True):
        if number is None:
            device = layer.weight.device
            basis, tokens = torch.zeros(layer.shape[1], 0, device=device), 0
        else:
            basis, tokens = vectors[number][:, :rank], gather.moments[number].tokens
        target = None if layer.to_zero else _product(layer, basis)
        bases[layer.name] = Basis(basis, target, curvature, tokens)
    return bases


def spaced(vectors: Tensor) -> Tensor:
    """Columns [inputs, r] one after the other in memory, so that the leading ones of a shared matrix lie as a matrix of
    their own does, each from a 16-byte boundary on: with a bias, inputs are odd."""
    inputs, rank = vectors.shape
    memory = vectors.new_zeros(rank, -(-inputs // 4) * 4)[:, :inputs].T
    return memory.copy_(vectors)


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
    """W U of this rank's rows, the bias's column included: in float64, so that no TF32 or autocast comes into it."""
    weight = matrix(layer.owner, local_weight(layer, layer.weight.detach()))
    wide = basis.double() if weight.device.type != "mps" else basis.cpu().double()
    product = weight.to(wide) @ wide[: weight.shape[1]]
    if layer.bias is not None:
        product.addr_(local_tensors([layer.bias.detach()])[0].to(wide), wide[-1])
    return product.to(basis)


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
        kept = f"{basis.kept:.1%}" if basis.tokens else "no captured token reached it"
        lines.append(f"| {layer.name} | {outputs} x {inputs} | {basis.rank} | {kept} | {mine:,} |")
    weights = sum(layer.numel for layer in layers)
    fixed = sum(bases[layer.name].rank * layer.shape[0] for layer in layers)
    lines.append(
        f"\n{len(layers)} layers, {fixed / weights:.1%} of {weights:,} weights' dimensions fixed, {total / 2**20:.1f} MiB of bases"
    )
    return "\n".join(lines)
