"""What the ranks of a group have gathered, brought together: which ranks those are, and sums in an order that all of
them have."""

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.nullspace.layers import Layer
from gradproj.nullspace.moments import Gather, Moment
from gradproj.rows.sharding import Sharding, all_reduce, device_of


def group_of(model: nn.Module, given: Any, sharding: Sharding | None, ddp: nn.Module | None) -> Any:
    """The ranks whose batches count together, because they hold the same model; None if it is this rank alone.

    Args:
        given: by the user.
        sharding: of the optimizer's wrapper.
        ddp: the DistributedDataParallel module that the capture went through.
    Raises:
        RuntimeError: several ranks run, and nothing says which of them hold this model.
    """
    if given is not None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return given
    if sharding is not None and (sharding.group is not None or sharding.placement is not None):
        return sharding.group if sharding.group is not None else dist.group.WORLD
    wrapped: Any = ddp or next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapped is not None:
        return wrapped.process_group
    meshes = {id(p.device_mesh): p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")}
    mesh = max(meshes.values(), key=lambda mesh: mesh.size(), default=None)
    if mesh is not None and mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh is not None and mesh.ndim == 1:
        return mesh.get_group()
    raise RuntimeError(
        f"NullSpace: {dist.get_world_size()} ranks run, and nothing says which of them hold this model and are to protect the same: "
        f"capture through the DistributedDataParallel module, or pass NullSpace(group=): torch.distributed.group.WORLD if all "
        f"do, the group of this stage or run if they hold several models"
    )


def sum_over_ranks(gather: Gather, layers: Sequence[Layer], silent: set[int], group: Any) -> None:
    """Every rank has seen its own batches, and not all of them have called every layer, or in the same order.

    Layers share a moment afterwards if they do on every rank. Moments are numbered by their first layers; a rank that
    never called a layer adds nothing to its moment. One all_reduce per moment, one moment at a time; three small
    collectives.

    Raises:
        RuntimeError: the ranks have different layers. On every rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    names = [f"{layer.name} {layer.shape}" for layer in layers]
    if len({tuple(numbers) for numbers in _all_gather([len(names), zlib.crc32("|".join(names).encode())], group)}) > 1:
        raise RuntimeError(
            "NullSpace: the ranks that capture together have different layers: they hold several models, or parts of one; pass "
            "NullSpace(group=), the ranks that hold the same as this one"
        )
    mine = [-1 if number is None else number for number in gather.moment_of]
    everywhere = _all_gather([*mine, *(l in silent for l in range(len(layers)))], group)
    silent.update(l for l in range(len(layers)) if any(numbers[len(layers) + l] for numbers in everywhere))
    _renumber(gather, layers, list(zip(*(numbers[: len(layers)] for numbers in everywhere), strict=True)))

    numbers = [[float(m.tokens), float(m.trace)] for m in gather.moments]
    numbers += [[float(n), float(q)] for n, q in zip(gather.tokens, gather.squares, strict=True)]
    totals = all_reduce(torch.tensor(numbers, dtype=torch.float64), group).tolist()
    for moment, (tokens, trace) in zip(gather.moments, totals, strict=False):
        moment.sum = all_reduce(moment.sum.double(), group).to(moment.sum.dtype)
        moment.tokens, moment.trace = int(tokens), moment.trace.new_tensor(trace)
    for l, (tokens, square) in enumerate(totals[len(gather.moments) :]):
        gather.tokens[l], gather.squares[l] = int(tokens), torch.tensor(square, dtype=torch.float64)


def _renumber(gather: Gather, layers: Sequence[Layer], keys: Sequence[Sequence[int]]) -> None:
    """One moment for the layers of the same key, which is the numbers that a layer's moment has on all ranks."""
    moments: list[Moment] = []
    used: set[int] = set()
    new: dict[Sequence[int], int] = {}
    for l, key in enumerate(keys):
        if max(key) < 0:  # no rank has called it
            continue
        number = gather.moment_of[l]
        if key not in new:
            new[key] = len(moments)
            if number is None:
                moments.append(gather.new_moment(l, layers[l].weight.device, layers[l].weight.dtype))
            else:
                moments.append(gather.moments[number].copy() if number in used else gather.moments[number])
                used.add(number)
        gather.moment_of[l] = new[key]
    gather.moments = moments


def _all_gather(numbers: Collection[int], group: Any) -> list[list[int]]:
    """Of every rank, its numbers. Theirs are as many."""
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=device_of(group))
    everywhere: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, mine, group=group)
    return torch.stack(everywhere).tolist()
