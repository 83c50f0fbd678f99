"""How much of a model a null space covers, and what it says about that."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

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


def coverage(model: nn.Module, layers: Sequence[Layer], unused: Collection[str]) -> Coverage:
    """``unused``: names of the layers that no captured token reached."""
    numbers = [0, 0]
    for layer in layers:
        numbers[layer.name in unused] += sum(p.numel() for p in layer.parameters if p.requires_grad)
    held = {name: p.numel() for name, p in _held(model, layers).items()}
    return Coverage(numbers[0], sum(held.values()), numbers[1], tuple(_largest(held, 8)))


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
    matrices = {name: p for name, p in _held(model, layers).items() if p.dim() > 1 and id(p) not in expected}
    held = {name: p.numel() for name, p in matrices.items()}
    count = sum(held.values())
    trained = count + coverage(model, layers, ()).covered
    if count <= MUCH * trained:
        return ""
    return (
        f"NullSpace covers no layer for {count / trained:.0%} of the weights that train, embeddings and norms apart, so "
        f"they stand still: {_counts(_largest(held, 3))}{', ..' if len(held) > 3 else ''}. Covered are the weights of "
        "nn.Linear, Conv1D, nn.Conv2d (groups=1) and LoRA; not so matrices without a module of their own (experts as one "
        "parameter, attention's in_proj_weight), weights that are computed (weight_norm), and what modules= leaves out. "
        'rest="train" lets them go unprotected; see .coverage'
    )


def _held(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The parameters that train and are in no layer."""
    covered = {id(p) for layer in layers for p in layer.parameters}
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered)
    return {without_wrappers(name): p for name, p in named}


def _largest(sizes: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])[:most]


def _counts(sizes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sizes)
