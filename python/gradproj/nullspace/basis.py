"""What a null space holds of a matrix, and how that is made of what a capture gathered."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj.nullspace import allocation
from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.matrices import Matrix
from gradproj.nullspace.moments import Moment
from gradproj.nullspace.progress import progress


class Basis(NamedTuple):
    """What a matrix keeps.

    Attributes:
        vectors: U [inputs, r], orthonormal; with a bias the last input is its 1. Matrices with the same inputs
            share memory.
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
        """The part of the matrix's curvature that is kept, between 0 and 1."""
        return float(self.curvature.values[: self.rank].sum()) / self.curvature.trace if self.curvature.trace else 0.0

    @property
    def left(self) -> float:
        """The mean curvature of what is not kept; 0 below rounding."""
        trace = self.curvature.trace - float(self.curvature.values[: self.rank].sum())
        if trace < 1e-6 * self.curvature.trace:
            return 0.0
        return self.curvature.scale * trace / max(1, self.curvature.inputs - self.rank)

    @property
    def memory(self) -> tuple[int, int, int]:
        """Equal if vectors are leading columns of the same ones. Those of rank 0 have no memory: then the eigenvalues
        tell them apart."""
        vectors, values = self.vectors.untyped_storage(), self.curvature.values.untyped_storage()
        return vectors.data_ptr(), values.data_ptr(), self.vectors.shape[0]


def regroup(gather: Gather, keys: Sequence[Hashable]) -> None:
    """Matrices of the same key share a moment, and no others do. A matrix whose key is None has none."""
    moments: list[Moment] = []
    new: dict[Hashable, int] = {}
    used: set[int] = set()
    for m, key in enumerate(keys):
        if key is None:
            continue
        old = gather.moment_of[m]
        if key not in new:
            new[key] = len(moments)
            if old is None:
                weight = gather.matrices[m].weight
                moments.append(gather.new_moment(m, weight.device, weight.dtype))
            else:
                moments.append(gather.moments[old].copy() if old in used else gather.moments[old])
                used.add(old)
        gather.moment_of[m] = new[key]
    gather.moments = moments


def add_earlier(gather: Gather, bases: Mapping[str, Basis]) -> None:
    """Add the kept eigenpairs of an earlier capture, which are what was protected.

    Matrices that share a moment now, but had bases of their own, part: each goes on with what it had.
    """
    earlier = {m: b for m, matrix in enumerate(gather.matrices) if (b := bases.get(matrix.name)) and b.tokens}
    keys: list[Hashable] = list(gather.moment_of)
    for m, basis in earlier.items():
        keys[m] = gather.moment_of[m], basis.memory
        gather.squares[m] = gather.squares[m] + basis.curvature.scale * basis.tokens
        gather.tokens[m] += basis.tokens
    regroup(gather, keys)
    widest: dict[int | None, Basis] = {}
    for m, basis in earlier.items():
        number = gather.moment_of[m]
        widest[number] = max(widest.get(number, basis), basis, key=lambda basis: basis.rank)
    for number, basis in widest.items():
        moment = gather.moments[number]  # type: ignore[index]
        moment.add_eigen(basis.curvature.values[: basis.rank], basis.vectors, basis.tokens)


@torch.no_grad()
def make_bases(gather: Gather, share: float, most: Callable[[Matrix], int | None]) -> dict[str, Basis]:
    """Moments and output gradients become the matrices' bases. A matrix that no token has reached gets one of rank 0.

    Only leading eigenpairs are computed: as many as the share would be, and more where what is left would be kept too,
    going by how they fall. Moments are taken one at a time, so that beside them and the bases this holds twice one.

    Args:
        share: of all weights' dimensions that bases may fix.
        most: matrix -> the largest rank that it may have; None for any.
    Raises:
        RuntimeError: inputs or gradients of a matrix were not finite.
        NotImplementedError: a weight that is sharded over its inputs.
    """
    numbers = [number if gather.tokens[m] else None for m, number in enumerate(gather.moment_of)]
    for matrix, number, squares in zip(gather.matrices, numbers, gather.squares, strict=True):
        if number is not None and not (gather.moments[number].is_finite() and squares.isfinite()):
            raise RuntimeError(f"NullSpace: inputs or gradients of layer {matrix.name} were not finite in the capture")
    users: dict[int, list[int]] = {}
    for m, number in enumerate(numbers):
        if number is not None:
            users.setdefault(number, []).append(m)
    curvatures = [Curvature(0.0, torch.zeros(0, dtype=torch.float64), 0.0, *matrix.shape) for matrix in gather.matrices]
    counts = {number: max(16, math.ceil(share * gather.moments[number].width)) for number in users}
    again = set(users)
    while again:
        expected = list(curvatures)
        with progress("eigenvalues", "moments", len(again)) as tick:
            for number in again:
                gather.moments[number].eigenvalues(counts[number])
                tick()
        for number, mine in users.items():
            moment = gather.moments[number]
            for m in mine:
                scale, (outputs, inputs) = float(gather.squares[m]) / gather.tokens[m], gather.matrices[m].shape
                largest = most(gather.matrices[m])
                values = moment.values[:largest]
                curvatures[m] = Curvature(scale, values, moment.mean_trace, outputs, inputs)
                expected[m] = curvatures[m]._replace(values=moment.expected_values()[:largest])
        ranks = _allocated(gather.matrices, expected, share)
        needed = {number: max(ranks[m] for m in mine) for number, mine in users.items()}
        again = {n for n, rank in needed.items() if rank >= counts[n] and gather.moments[n].has_more}
        for number in again:
            counts[number] = needed[number] + needed[number] // 4 + 8
    vectors = {n: spaced(gather.moments[n].eigenvectors(rank)) for n, rank in needed.items()}
    bases = {}
    for matrix, number, rank, curvature in zip(gather.matrices, numbers, ranks, curvatures, strict=True):
        if number is None:
            basis, tokens = torch.zeros(matrix.shape[1], 0, device=matrix.weight.device), 0
        else:
            basis, tokens = vectors[number][:, :rank], gather.moments[number].tokens
        bases[matrix.name] = Basis(basis, None if matrix.to_zero else _product(matrix, basis), curvature, tokens)
    return bases


def _allocated(matrices: Sequence[Matrix], curvatures: Sequence[Curvature], share: float) -> list[int]:
    """The matrices' ranks; of what is looked up all."""
    ranks = [len(curvature.values) for curvature in curvatures]
    others = [m for m, matrix in enumerate(matrices) if not matrix.is_looked_up]
    for m, rank in zip(others, allocation.ranks([curvatures[m] for m in others], share), strict=True):
        ranks[m] = rank
    return ranks


def spaced(vectors: Tensor) -> Tensor:
    """A copy of [inputs, r] with the columns one after the other in memory, each from a 16-byte boundary on (inputs are
    odd with a bias): so the leading columns of a shared matrix lie as a matrix of their own would."""
    inputs, rank = vectors.shape
    memory = vectors.new_zeros(rank, -(-inputs // 4) * 4)[:, :inputs].T
    return memory.copy_(vectors)


def _product(matrix: Matrix, basis: Tensor) -> Tensor:
    """W U of this rank's rows, the bias's column included: in float64, which neither TF32 nor autocast touches."""
    weight, bias = matrix.rows().part, matrix.bias_rows()
    wide = basis.double()
    product = weight.to(wide) @ wide[: weight.shape[1]]
    if bias is not None:
        product.addr_(bias.to(wide), wide[-1])
    return product.to(basis)
