"""The ranks that capture together, and the sums of what they have gathered, in an order that all of them have."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.nullspace.basis import regroup
from gradproj.nullspace.layers import Layer
from gradproj.nullspace.moments import Gather
from gradproj.rows.sharding import Sharding, all_reduce


def group_of(model: nn.Module, given: Any, sharding: Sharding | None, ddp: nn.Module | None) -> Any:
    """The ranks whose batches count together, because they hold the same model; None if it is this rank alone.

    ``given`` is the user's, ``sharding`` the optimizer wrapper's, ``ddp`` the module that the capture went through.
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


def sum_over_ranks(gather: Gather, layers: Sequence[Layer], silent: set[int], group: Any) -> None:
    """Sums what each rank has gathered from its own batches, in which it may have called some of the layers, in any
    order. A layer that is silent on one rank becomes so on all.

    Layers share a moment afterwards if they do on every rank. Moments are numbered by their first layers; a rank that
    never called a layer adds zeros. One all_reduce for each moment, beside two small collectives. If the ranks have
    different layers, all of them raise.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    mine = [(layer.name, layer.shape) for layer in layers], gather.moment_of, silent
    dist.all_gather_object(everywhere, mine, group=group)
    names, numbers, unheard = zip(*everywhere, strict=True)
    if any(theirs != names[0] for theirs in names):
        raise RuntimeError(
            "NullSpace: the ranks that capture together have different layers: they hold several models, or parts of "
            "one; pass NullSpace(group=), the ranks that hold the same as this one"
        )
    silent.update(*unheard)
    keys = list(zip(*numbers, strict=True))  # per layer, the number of its moment on each rank
    regroup(gather, layers, [key if any(n is not None for n in key) else None for key in keys])

    sums = [[float(m.tokens), float(m.trace)] for m in gather.moments]
    sums += [[float(n), float(q)] for n, q in zip(gather.tokens, gather.squares, strict=True)]
    totals = all_reduce(torch.tensor(sums, dtype=torch.float64), group).tolist()
    for moment, (tokens, trace) in zip(gather.moments, totals, strict=False):
        moment.sum = all_reduce(moment.sum.double(), group).to(moment.sum.dtype)
        moment.tokens, moment.trace = int(tokens), moment.trace.new_tensor(trace)
    for l, (tokens, square) in enumerate(totals[len(gather.moments) :]):
        gather.tokens[l], gather.squares[l] = int(tokens), torch.tensor(square, dtype=torch.float64)
