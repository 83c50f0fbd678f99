"""What the ranks of a group have gathered, added up: which ranks those are, and sums in an order that all of them
have."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.nullspace.basis import regroup
from gradproj.nullspace.gather import Gather, several_biases
from gradproj.nullspace.matrices import Slot, at_address
from gradproj.rows.sharding import Sharding, all_reduce


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
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)
    if mesh is not None and mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh is not None and mesh.ndim == 1:
        return mesh.get_group()
    raise RuntimeError(
        f"NullSpace: {dist.get_world_size()} ranks run, and nothing says which of them hold this model and are to "
        "protect the same: capture through the DistributedDataParallel module, or pass NullSpace(group=): "
        "torch.distributed.group.WORLD if all do, the group of this stage or run if they hold several models"
    )


def sum_over_ranks(gather: Gather, slots: Sequence[Slot], reached: set[str], group: Any) -> None:
    """Sums what each rank has gathered from its own batches, in which it may have multiplied by some of the matrices,
    in any order. Afterwards all ranks have the same matrices in the same order.

    Matrices share a moment then if they do on every rank. A rank that never multiplied by a matrix adds zeros. One
    all_reduce for each moment, beside two small collectives.

    Args:
        reached: names of the parameters that a gradient has reached; afterwards on any rank.
    Raises:
        RuntimeError: the ranks have different layers. On every rank.
    """
    places = {slot.name: i for i, slot in enumerate(slots)}
    if group is None or dist.get_world_size(group) == 1:
        gather.order(sorted(range(len(gather.matrices)), key=lambda m: _place(gather.matrices[m].address(), places)))
        return
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    numbers = dict(zip((matrix.address() for matrix in gather.matrices), gather.moment_of, strict=True))
    shapes = [(slot.name, tuple(slot.get().shape)) for slot in slots]
    dist.all_gather_object(everywhere, (shapes, numbers, reached), group=group)
    shapes_of, numbers_of, reached_on = zip(*everywhere, strict=True)
    if any(theirs != shapes for theirs in shapes_of):
        raise RuntimeError(
            "NullSpace: the ranks that capture together have different layers: they hold several models, or parts of "
            "one; pass NullSpace(group=), the ranks that hold the same as this one"
        )
    reached.update(*reached_on)
    addresses = sorted({a for theirs in numbers_of for a in theirs}, key=lambda a: _place(a, places))
    found = [at_address("", address, {slot.name: slot for slot in slots}) for address in addresses]
    for one, other in pairwise(found):
        if one.key == other.key:
            raise several_biases(one.name)
    gather.order([gather.number(matrix) for matrix in found])
    keys = [tuple(theirs.get(address) for theirs in numbers_of) for address in addresses]
    regroup(gather, [key if any(n is not None for n in key) else None for key in keys])

    sums = [[float(m.tokens), float(m.trace)] for m in gather.moments]
    sums += [[float(n), float(q)] for n, q in zip(gather.tokens, gather.squares, strict=True)]
    totals = all_reduce(torch.tensor(sums, dtype=torch.float64), group).tolist()
    for moment, (tokens, trace) in zip(gather.moments, totals, strict=False):
        moment.sum = all_reduce(moment.whole_sum().double(), group).to(moment.sum.dtype)
        moment.tokens, moment.trace = int(tokens), moment.trace.new_tensor(trace)
    for m, (tokens, square) in enumerate(totals[len(gather.moments) :]):
        gather.tokens[m], gather.squares[m] = int(tokens), torch.tensor(square, dtype=torch.float64)


def _place(address: tuple, places: Mapping[str, int]) -> tuple:
    """Ascending as the parameters are in the model, and the slices in a parameter."""
    name, _, region, *_ = address
    return places[name], region
