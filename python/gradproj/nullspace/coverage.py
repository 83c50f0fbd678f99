"""How much of a model a null space covers, and what stands still beside it."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

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
    numbers, held = [0, 0], {}
    of_layer = {id(p): layer.name in unused for layer in layers for p in layer.parameters}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) in of_layer:
            numbers[of_layer[id(p)]] += p.numel()
        elif p.requires_grad:
            held[without_wrappers(name)] = p.numel()
    largest = tuple(sorted(held.items(), key=lambda item: -item[1])[:8])
    return Coverage(numbers[0], sum(held.values()), numbers[1], largest)


def sentence(found: Coverage, rest: str) -> str:
    """For a report."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in found.largest)
    return (
        f"{found.covered:,} weights are covered, {found.unused:,} were reached by no captured token, {found.held:,} are "
        f"{'held' if rest == 'hold' else 'neither covered nor held'}{': ' + shown if shown else ''}"
    )


def silent(layers: Sequence[Layer], rest: str) -> str:
    """What to say of layers that could not be heard."""
    return (
        f"NullSpace: layer {', '.join(layer.name for layer in layers)}: its forward returns a tuple, or something else than the "
        f"product with its weight, so that it cannot be heard: it is {'held' if rest == 'hold' else 'not protected'}"
    )


def warning(model: nn.Module, layers: Sequence[Layer]) -> str:
    """What to say if more is held than a user expects, embeddings and vectors (norms, biases) being expected; else
    nothing."""
    expected = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    covered = {id(p) for layer in layers for p in layer.parameters}
    held, trained = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad and (id(p) in covered or (p.dim() > 1 and id(p) not in expected)):
            trained += p.numel()
            if id(p) not in covered:
                held[without_wrappers(name)] = p.numel()
    if sum(held.values()) <= MUCH * trained:
        return ""
    shown = ", ".join(f"{name} ({count:,})" for name, count in sorted(held.items(), key=lambda item: -item[1])[:3])
    return (
        f"NullSpace covers no layer for {sum(held.values()) / trained:.0%} of the weights that train, embeddings and norms apart, so they "
        f"stand still: {shown}{', ..' if len(held) > 3 else ''}. Covered are the weights of nn.Linear, Conv1D, nn.Conv2d (groups=1) and "
        f"LoRA; not so matrices without a module of their own (experts as one parameter, attention's in_proj_weight), weights that are "
        f'computed (weight_norm), and what modules= leaves out. rest="train" lets them go unprotected; see .coverage'
    )
