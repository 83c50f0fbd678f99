"""How much of a model a null space covers, and what it says about that."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from gradproj.nullspace.basis import Basis
from gradproj.nullspace.layers import Layer, without_wrappers

MUCH = 0.1  # of what trains, held without having been expected


class Coverage(NamedTuple):
    """Numbers of weights that train; their sum is all that do.

    Attributes:
        covered: in layers that are pinned, or will be after a capture.
        held: in no layer: they stand still with ``rest="hold"``, and train freely with ``rest="train"``.
        unused: in layers that no captured token reached, so that nothing of them is pinned; 0 before a capture.
        largest: of what is held, the parameters' names and numbers of weights, the largest first, eight at most.
    """

    covered: int
    held: int
    unused: int
    largest: tuple[tuple[str, int], ...]


def coverage(model: nn.Module, layers: Sequence[Layer], bases: Mapping[str, Basis]) -> Coverage:
    covered = unused = 0
    for layer in layers:
        size = sum(p.numel() for p in layer.parameters if p.requires_grad)
        if layer.name in bases and not bases[layer.name].tokens:
            unused += size
        else:
            covered += size
    held = _held(model, layers, ())
    return Coverage(covered, sum(size for _, size in held), unused, tuple(held[:8]))


def report(layers: Sequence[Layer], bases: Mapping[str, Basis], found: Coverage, rest: str) -> str:
    """A table in markdown, totals, and the coverage. Memory that layers share is counted once."""
    lines = ["| layer | outputs x inputs | rank | curvature kept | bytes |", "| --- | ---: | ---: | ---: | ---: |"]
    shared: set[int] = set()
    total = fixed = 0
    for layer in layers:
        basis, (outputs, inputs) = bases[layer.name], layer.shape
        storage = basis.vectors.untyped_storage()
        size = 0 if storage.data_ptr() in shared else storage.nbytes()
        size += 0 if basis.target is None else basis.target.nbytes
        shared.add(storage.data_ptr())
        total, fixed = total + size, fixed + basis.rank * outputs
        kept = f"{basis.kept:.1%}" if basis.tokens else "no captured token reached it"
        lines.append(f"| {layer.name} | {outputs} x {inputs} | {basis.rank} | {kept} | {size:,} |")
    weights = sum(layer.numel for layer in layers)
    held = "held" if rest == "hold" else "neither covered nor held"
    lines.append(
        f"\n{len(layers)} layers, {fixed / weights:.1%} of {weights:,} weights' dimensions fixed, "
        f"{total / 2**20:.1f} MiB of bases\n{found.covered:,} weights are covered, {found.unused:,} were reached by no "
        f"captured token, {found.held:,} are {held}{': ' if found.largest else ''}{_counts(found.largest)}"
    )
    return "\n".join(lines)


def silent(layers: Sequence[Layer], rest: str) -> str:
    """The warning about layers that could not be heard."""
    return (
        f"NullSpace: layer {', '.join(layer.name for layer in layers)}: its forward returns a tuple, or something else "
        "than the product with its weight, so that it cannot be heard: it is "
        f"{'held' if rest == 'hold' else 'not protected'}"
    )


def warning(model: nn.Module, layers: Sequence[Layer]) -> str:
    """The warning if more is held than a user expects, embeddings and vectors (norms, biases) being expected; else
    nothing."""
    expected = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    expected |= {id(p) for p in model.parameters() if p.dim() < 2}
    held = _held(model, layers, expected)
    size = sum(size for _, size in held)
    trained = size + coverage(model, layers, {}).covered
    if size <= MUCH * trained:
        return ""
    return (
        f"NullSpace covers no layer for {size / trained:.0%} of the weights that train, embeddings and norms apart, so "
        f"they stand still: {_counts(held[:3])}{', ..' if len(held) > 3 else ''}. Covered are the weights of "
        "nn.Linear, Conv1D, nn.Conv2d (groups=1) and LoRA; not so matrices without a module of their own (experts as "
        "one parameter, attention's in_proj_weight), weights that are computed (weight_norm), and what modules= leaves "
        'out. rest="train" lets them go unprotected; see .coverage'
    )


def _held(model: nn.Module, layers: Sequence[Layer], expected: Collection[int]) -> list[tuple[str, int]]:
    """Names and sizes of the parameters that train, are in no layer and not expected there, the largest first."""
    others = {id(p) for layer in layers for p in layer.parameters}.union(expected)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in others]
    return sorted(((without_wrappers(name), p.numel()) for name, p in named), key=lambda item: -item[1])


def _counts(sizes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({size:,})" for name, size in sizes)
