"""What a null space holds of a layer, and how that is made of what a capture gathered."""

from collections.abc import Callable, Hashable, Mapping, Sequence
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
        curvature: what the rank was chosen by.
        tokens: how many were captured.
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

    @property
    def left(self) -> float:
        """The mean curvature of what is not kept."""
        trace = max(0.0, self.curvature.trace - float(self.curvature.values[: self.rank].sum()))
        return self.curvature.scale * trace / max(1, self.curvature.inputs - self.rank)

    @property
    def memory(self) -> tuple[int, int, int]:
        """Equal for layers whose vectors are leading columns of one matrix. Vectors of rank 0 have no memory: there the
        eigenvalues tell layers apart."""
        vectors, values = self.vectors.untyped_storage(), self.curvature.values.untyped_storage()
        return vectors.data_ptr(), values.data_ptr(), self.vectors.shape[0]


def regroup(gather: Gather, layers: Sequence[Layer], keys: Sequence[Hashable]) -> None:
    """Make exactly the layers of the same key share a moment. A layer whose key is None has none."""
    moments: list[Moment] = []
    new: dict[Hashable, int] = {}
    used: set[int] = set()
    for l, key in enumerate(keys):
        if key is None:
            continue
        old = gather.moment_of[l]
        if key not in new:
            new[key] = len(moments)
            if old is None:
                moments.append(gather.new_moment(l, layers[l].weight.device, layers[l].weight.dtype))
            else:
                moments.append(gather.moments[old].copy() if old in used else gather.moments[old])
                used.add(old)
        gather.moment_of[l] = new[key]
    gather.moments = moments


def add_earlier(gather: Gather, layers: Sequence[Layer], bases: Mapping[str, Basis]) -> None:
    """Add the kept eigenpairs of an earlier capture, which are what was protected.

    Layers that share a moment now, but had bases of their own, part: each goes on with what it had.
    """
    earlier = {l: basis for l, layer in enumerate(layers) if (basis := bases.get(layer.name)) and basis.tokens}
    keys: list[Hashable] = list(gather.moment_of)
    for l, basis in earlier.items():
        keys[l] = gather.moment_of[l], basis.memory
        gather.squares[l] = gather.squares[l] + basis.curvature.scale * basis.tokens
        gather.tokens[l] += basis.tokens
    regroup(gather, layers, keys)
    widest: dict[int | None, Basis] = {}
    for l, basis in earlier.items():
        number = gather.moment_of[l]
        widest[number] = max(widest.get(number, basis), basis, key=lambda basis: basis.rank)
    for number, basis in widest.items():
        moment = gather.moments[number]  # type: ignore[index]
        moment.add_eigen(basis.curvature.values[: basis.rank], basis.vectors, basis.tokens)


@torch.no_grad()
def make_bases(
    gather: Gather, layers: Sequence[Layer], share: float, most: Callable[[Layer], int | None]
) -> dict[str, Basis]:
    """The bases of layers, of rank 0 where no token has reached a layer; ``most`` is the largest rank of a layer, None
    for any.

    Moments are taken one at a time and freed, and of the eigenvectors no more are held than the share allows so far:
    beside the bases this holds twice one moment.
    """
    numbers = [number if gather.tokens[l] else None for l, number in enumerate(gather.moment_of)]
    for l, number in enumerate(numbers):
        if number is not None and not (gather.moments[number].sum.isfinite().all() and gather.squares[l].isfinite()):
            raise RuntimeError(
                f"NullSpace: inputs or gradients of layer {layers[l].name} were not finite in the capture"
            )
    curvatures = [Curvature(0.0, torch.zeros(0, dtype=torch.float64), 0.0, *layer.shape) for layer in layers]
    vectors: dict[int, Tensor] = {}  # by the moment's number: its layers use the leading columns
    ranks = [0] * len(layers)
    for number in sorted({n for n in numbers if n is not None}):
        moment = gather.moments[number]
        values, found = moment.eigen()
        values, trace = values.cpu(), float(moment.trace) / max(1, moment.tokens)
        vectors[number] = spaced(found.to(moment.sum.dtype))
        moment.sum = moment.sum.new_empty(0)
        for l in (l for l, n in enumerate(numbers) if n == number):
            scale = float(gather.squares[l]) / gather.tokens[l]
            curvatures[l] = Curvature(scale, values[: most(layers[l])], trace, *layers[l].shape)
        ranks = allocation.ranks(curvatures, share)  # a later moment only lowers them
        for n, held in vectors.items():
            widest = max(rank for rank, of in zip(ranks, numbers, strict=True) if of == n)
            if widest < held.shape[1]:
                vectors[n] = spaced(held[:, :widest])
    bases = {}
    for layer, number, rank, curvature in zip(layers, numbers, ranks, curvatures, strict=True):
        if number is None:
            basis, tokens = torch.zeros(layer.shape[1], 0, device=layer.weight.device), 0
        else:
            basis, tokens = vectors[number][:, :rank], gather.moments[number].tokens
        target = None if layer.to_zero else _product(layer, basis)
        bases[layer.name] = Basis(basis, target, curvature, tokens)
    return bases


def spaced(vectors: Tensor) -> Tensor:
    """A copy of [inputs, r], column after column in memory, so that leading columns lie as a matrix of their own would;
    each starts on a 16-byte boundary."""
    inputs, rank = vectors.shape
    memory = vectors.new_zeros(rank, -(-inputs // 4) * 4)[:, :inputs].T
    return memory.copy_(vectors)


def local_weight(layer: Layer, weight: Tensor) -> Tensor:
    """[outputs, inputs] view of this rank's rows of a weight or its gradient. Refused if it is sharded over its inputs:
    then W U would be a sum over ranks."""
    outputs = 1 if is_conv1d(layer.owner) else 0
    for placement in getattr(weight, "placements", ()):
        if placement.is_partial() or (placement.is_shard() and placement.dim != outputs):
            raise NotImplementedError(
                f"NullSpace: the weight of {layer.name} is {placement} of a DTensor, that is, sharded over its inputs; "
                "shard it over its outputs, or leave it out with modules="
            )
    return matrix(layer.owner, local_tensors([weight])[0])


def local_bias(bias: Tensor | None) -> Tensor | None:
    """This rank's part of a bias, or of its gradient."""
    return None if bias is None else local_tensors([bias.detach()])[0]


def _product(layer: Layer, basis: Tensor) -> Tensor:
    """W U of this rank's rows, with the bias's column: in float64, which neither TF32 nor autocast touches."""
    weight, bias = local_weight(layer, layer.weight.detach()), local_bias(layer.bias)
    wide = basis.double()
    product = weight.to(wide) @ wide[: weight.shape[1]]
    if bias is not None:
        product.addr_(bias.to(wide), wide[-1])
    return product.to(basis)
