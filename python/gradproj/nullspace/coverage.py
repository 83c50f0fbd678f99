"""How much of a model a null space covers, and what it says about that."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from gradproj.nullspace.basis import Basis
from gradproj.nullspace.matrices import Matrix, Slot, without_wrappers

MUCH = 0.1  # of what trains, held without having been expected


class Coverage(NamedTuple):
    """Numbers of weights that train; their sum is all that do.

    Attributes:
        covered: in matrices that are pinned, or may be after a capture.
        held: in none: they stand still with ``rest="hold"``, and train freely with ``rest="train"``.
        unused: in matrices, and slices of parameters, that no captured token reached, so that nothing of them is pinned
            and they learn freely; 0 before a capture.
        largest: of what is held, the parameters' names and numbers of weights, the largest first, eight at most.
    """

    covered: int
    held: int
    unused: int
    largest: tuple[tuple[str, int], ...]


def coverage(
    model: nn.Module, matrices: Sequence[Matrix], bases: Mapping[str, Basis], expected: Sequence[Slot] = ()
) -> Coverage:
    """``expected``: parameters that are to be counted as covered if they have a matrix's shape."""
    total = {id(p): p.numel() for matrix in matrices for p in matrix.parameters}
    covered = dict.fromkeys(total, 0)
    for matrix in matrices:
        if bases[matrix.name].tokens:
            covered[id(matrix.weight)] += math.prod(matrix.region.shape)
            if matrix.bias_at is not None:
                covered[id(matrix.bias)] += matrix.shape[0]
            if matrix.consumer is not None:
                consumer = matrix.consumer.get()
                covered[id(consumer)] = consumer.numel()
    candidates = [slot.get() for slot in expected if slot.get().dim() > 1]
    held = _held(model, {*total, *map(id, candidates)})
    reached = sum(covered.values())
    unused = sum(total.values()) - reached
    return Coverage(
        reached + sum(p.numel() for p in candidates), sum(size for _, size in held), unused, tuple(held[:8])
    )


def report(matrices: Sequence[Matrix], bases: Mapping[str, Basis], found: Coverage, rest: str) -> str:
    """A table in markdown, totals, and the coverage. Memory that matrices share is counted once."""
    lines = ["| matrix | outputs x inputs | rank | curvature kept | bytes |", "| --- | ---: | ---: | ---: | ---: |"]
    shared: set[int] = set()
    looked_up: dict[str, int] = {}
    total = fixed = 0
    for matrix in matrices:
        basis, (outputs, inputs) = bases[matrix.name], matrix.shape
        storage = basis.vectors.untyped_storage()
        size = 0 if storage.data_ptr() in shared else storage.nbytes()
        size += 0 if basis.target is None else basis.target.nbytes
        shared.add(storage.data_ptr())
        total, fixed = total + size, fixed + basis.rank * outputs
        if matrix.is_looked_up:
            looked_up[matrix.slot.name] = looked_up.get(matrix.slot.name, 0) + basis.rank
            continue
        kept = f"{basis.kept:.1%}" if basis.tokens else "no captured token reached it"
        lines.append(f"| {matrix.name} | {outputs} x {inputs} | {basis.rank} | {kept} | {size:,} |")
    lines += [f"| {name} | columns of {tokens} tokens | | | |" for name, tokens in looked_up.items()]
    weights = sum(matrix.numel for matrix in matrices)
    held = "held" if rest == "hold" else "neither covered nor held"
    lines.append(
        f"\n{len(matrices)} matrices, {fixed / weights:.1%} of {weights:,} weights' dimensions fixed, "
        f"{total / 2**20:.1f} MiB of bases\n{found.covered:,} weights are covered, {found.unused:,} were reached by no "
        f"captured token, {found.held:,} are {held}{': ' if found.largest else ''}{_counts(found.largest)}"
    )
    return "\n".join(lines)


def warning(model: nn.Module, matrices: Sequence[Matrix]) -> str:
    """The warning if more is held than a user expects, embeddings and vectors (norms, biases) being expected; else
    nothing."""
    expected = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    expected |= {id(p) for p in model.parameters() if p.dim() < 2}
    covered = {id(p): p for matrix in matrices for p in matrix.parameters}
    held = _held(model, {*covered, *expected})
    size = sum(size for _, size in held)
    trained = size + sum(p.numel() for p in covered.values())
    if size <= MUCH * trained:
        return ""
    return (
        f"NullSpace: no product of an input with {size / trained:.0%} of the weights that train, embeddings and norms "
        "apart, was heard and had a gradient, so they stand still: "
        f"{_counts(held[:3])}{', ..' if len(held) > 3 else ''}. Heard are linear layers, matmul and its kin, einsum, "
        "convolutions and attention, on a parameter or a slice of one; not so weights that are computed "
        "(weight_norm), recurrent layers, fused operations, and what modules= leaves out. "
        'rest="train" lets them go unprotected; see .coverage'
    )


def _held(model: nn.Module, others: Collection[int]) -> list[tuple[str, int]]:
    """Names and sizes of the parameters that train and are not among ``others``, the largest first."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in others]
    return sorted(((without_wrappers(name), p.numel()) for name, p in named), key=lambda item: -item[1])


def _counts(sizes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sizes)
