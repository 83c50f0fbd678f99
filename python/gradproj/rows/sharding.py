"""Sharded rows: what this rank holds of them, how much of it counts, and the one collective of a projection.

Kernels run on local shards and nothing is gathered. A tensor that several ranks hold is counted by each of them with
weight 1 / holders, so that the sum over the group counts it once.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradproj.rows.call import Call
from gradproj.rows.dtensors import Layouts, PartialGradient, dtensor_types, is_dtensor, local_tensor

_NO_FLOAT64 = ("mps", "hpu", "npu")  # devices whose collectives do not take it


class Sharding(NamedTuple):
    """What the other ranks hold, where the tensors do not say it. DTensors on a mesh that covers the world do.

    Attributes:
        group: process group whose ranks hold the rows together; every rank of it makes every call, one that owns
            nothing included. None: the world, if there are DTensors or a placement, else this rank alone.
        placement: what the other ranks of the group hold of a plain tensor: ``"replicate"``, the same (DDP), or
            ``"shard"``, other elements (FSDP1, ZeRO, pipeline stages). None: there are no plain tensors, or no other
            ranks.
        owned: one bool per parameter (per entry of the lists), False for what another rank counts already, such as a
            tied parameter on two pipeline stages: left out of the inner products, but written. None: all are owned.
    """

    group: Any = None
    placement: Literal["replicate", "shard"] | None = None
    owned: Sequence[bool] | None = None

    def __deepcopy__(self, memo: dict) -> "Sharding":
        return self  # a process group cannot be copied


def of_replicas(parameters: Iterable[Tensor]) -> Sharding | None:
    """The sharding of a model that every rank holds; None on one rank, or if DTensors say it."""
    if not is_distributed() or dist.get_world_size() < 2 or dtensor_types(parameters):
        return None
    return Sharding(placement="replicate")


class Local(NamedTuple):
    """What a call on this rank's memory must know of the other ranks."""

    weights: list[float]  # of this rank's inner products, per column; 0 leaves the column out of them
    group: Any = None  # the ranks over which inner products are summed; None if no rank but this one takes part
    dtensors: Sequence[Tensor] = ()  # the gradients that are DTensors, if they will be written
    partial: Sequence[PartialGradient] = ()  # the gradients that are Partial, if they will be written


def localize(call: Call, sharding: Sharding | None, products: bool = True) -> tuple[Call, Local]:
    """The call on plain tensors in this rank's memory. Reduces Partial tensors, one all_reduce each.

    Args:
        products: whether there will be inner products; if not, nothing is asked about other ranks.
    Raises:
        ValueError, NotImplementedError, RuntimeError: naming row and index. Nothing is written.
    """
    kinds, weights, group = dtensor_types(chain(*call.rows)), [1.0] * len(call.indices), None
    if sharding is None and not kinds:
        return call, Local(weights)
    sharding = sharding or Sharding()
    _check_sharding(call.op, sharding)
    layouts, owned = Layouts(call, kinds), sharding.owned
    if products:
        group = _group(call.op, sharding, layouts.meshes)
    if group is not None:
        weights = layouts.weights(group, sharding.placement)
    if owned is not None:
        if len(owned) != call.entries:
            entries = f"{len(owned)} entries for {call.entries} parameters"
            raise ValueError(f"{call.op}: Sharding.owned has {entries}; pass one bool for each")
        weights = [w if owned[i] else 0.0 for w, i in zip(weights, call.indices, strict=True)]
    rows = [[local_tensor(t) if type(t) in kinds else t for t in row] for row in call.rows]  # type: ignore[arg-type]
    partial = layouts.reduce_partial(rows)
    dtensors = [t for t in call.rows[0] if t is not None and type(t) in kinds] if call.written else []
    return call._replace(rows=rows), Local(weights, group, dtensors, partial)


def with_group(op: str, sharding: Sharding | None, tensors: Sequence[Tensor | None]) -> Sharding | None:
    """``sharding`` with the group that ``tensors`` imply, for rows that lie as they do but may lack some of them."""
    kinds = dtensor_types(tensors)
    if sharding is None and not kinds:
        return None
    sharding = sharding or Sharding()
    meshes = {id(t.device_mesh): t.device_mesh for t in tensors if type(t) in kinds}  # type: ignore[union-attr]
    return sharding._replace(group=_group(op, sharding, [*meshes.values()]))


def reduce(gram: Tensor, group) -> Tensor:
    """Sum of the ranks' [R, R] or [P, R, R] Grams: one collective of P R (R + 1) / 2 float64 numbers, in place."""
    if group is not None:
        i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], device=gram.device)
        gram[..., i, j] = gram[..., j, i] = all_reduce(gram[..., i, j], group)
    return gram


def finish(local: Local, weights: Tensor) -> None:
    """Bring row 0, after it was combined with ``weights``, to the caller's own tensors.

    A Partial gradient stays Partial, without another rounding: the first rank of a reduction gets the result and the
    others zeros; where the reduction is an average, all get it.
    """
    if local.partial:
        untouched = (weights[..., 0] == 1).all() & ~(weights[..., 1:] != 0).any()
        for memory, value in local.partial:
            memory.copy_(torch.where(untouched.to(memory.device), memory, 0.0 if value is None else value))
    if local.dtensors:
        torch.autograd.graph.increment_version(local.dtensors)


def device_of(group, preferred: torch.device | None = None) -> torch.device:
    """The device on which ``group`` communicates, ``preferred`` if it can."""
    types = dist.distributed_c10d._device_capability(group)
    if preferred is not None and preferred.type in types:
        return preferred
    return torch.device("cpu" if "cpu" in types else types[0])


def all_reduce(numbers: Tensor, group) -> Tensor:
    """Sum of n float64 numbers over ``group``, on the device of ``numbers``: one collective, of 8 n bytes.

    The numbers travel on a device that the group communicates on, if theirs is not. A device without float64 carries
    their bits, 8 n bytes per rank, and every rank adds them up in the same order.
    """
    device = device_of(group, numbers.device)
    if _carries_float64(device):
        total = numbers.to(device, copy=True)
        dist.all_reduce(total, group=group)
        return total.to(numbers.device)
    bits = numbers.reshape(-1).view(torch.int32).to(device)
    gathered = [torch.empty_like(bits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, bits, group=group)
    return torch.stack(gathered).to(numbers.device).view(torch.float64).view(-1, *numbers.shape).sum(0)


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, DTensors as this rank's memory."""
    return [local_tensor(t) if is_dtensor(t) else t for t in tensors]  # type: ignore[arg-type]


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group(op: str, sharding: Sharding, meshes: Sequence[Any]):
    """The group given; else the world, if one mesh covers it: ranks outside of a smaller mesh may hold copies, or the
    rest of the model."""
    if sharding.group is not None:
        return sharding.group
    largest = max((mesh.size() for mesh in meshes), default=0)
    if largest and largest < dist.get_world_size():
        raise ValueError(
            f"{op}: the largest mesh of a DTensor has {largest} of {dist.get_world_size()} ranks: pass "
            f"Sharding(group=), the ranks that hold one gradient together (torch.distributed.group.WORLD if the "
            f"other ranks hold other parameters of the same model, mesh.get_group() of a 1-D mesh if they hold "
            f"copies of these)"
        )
    return dist.group.WORLD if largest or (is_distributed() and sharding.placement is not None) else None


def _check_sharding(op: str, sharding: Sharding) -> None:
    if not isinstance(sharding, Sharding):
        raise TypeError(f"{op}: sharding must be a gradproj.Sharding, got {type(sharding).__name__}")
    if sharding.placement not in (None, "replicate", "shard"):
        raise ValueError(f'{op}: placement must be "replicate" or "shard", got {sharding.placement!r}')
    if sharding.group is None:
        return
    if not is_distributed():
        raise RuntimeError(
            f"{op}: Sharding has a group but torch.distributed is not initialised; call init_process_group() first"
        )
    if sharding.group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: rank {dist.get_rank()} is not in group; call it on the ranks of the group only")


def _carries_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in _NO_FLOAT64
