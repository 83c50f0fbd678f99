"""What DTensors say: how a tensor lies over the ranks, and so how much of this rank's inner products counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from gradproj.rows.call import Call

PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}


class PartialGradient(NamedTuple):
    """After a projection ``local``, this rank's memory, gets ``value``, which the kernels wrote; None means zeros."""

    local: Tensor
    value: Tensor | None


@dataclass(eq=False)
class _Layout:
    """How a tensor lies over the ranks. Hashed by identity: within a call, tensors that lie alike share one."""

    mesh: "DeviceMesh | None" = None  # None for a plain tensor
    placements: "tuple[Placement, ...]" = ()  # with Replicate for Partial


_PLAIN = _Layout()


class Layouts:
    """How the columns of a call lie over the ranks.

    Raises:
        ValueError: the tensors of a column do not lie alike.
    """

    def __init__(self, call: "Call", kinds: set[type]):
        self._call, self._kinds = call, kinds
        self._known: dict[tuple, _Layout] = {}  # by the mesh's id, which is faster to hash than the mesh
        self._distinct: dict[tuple, _Layout] = {}
        self._any_partial = False
        self._columns = [self._common(c, column) for c, column in enumerate(zip(*call.rows, strict=True))]

    @property
    def meshes(self) -> "list[DeviceMesh]":
        return [mesh for mesh, _ in self._distinct]

    def weights(self, group, placement: str | None) -> list[float]:
        """Per column, the weight of this rank's inner products."""
        weight: dict[_Layout | None, float] = {None: 0.0}
        for c, layout in enumerate(self._columns):
            if layout is not None and layout not in weight:
                name = self._name(next(r for r, row in enumerate(self._call.rows) if row[c] is not None), c)
                weight[layout] = _weight(self._call.op, name, layout, group, placement)
        return [weight[layout] for layout in self._columns]

    def reduce_partial(self, local: list[list[Tensor | None]]) -> list[PartialGradient]:
        """Put the sums of Partial tensors into ``local``. Returns what :func:`finish` needs to write gradients back."""
        if not self._any_partial:
            return []
        partial = [
            (r, c, cast("DTensor", t))
            for r, row in enumerate(self._call.rows)
            for c, (t, layout) in enumerate(zip(row, self._columns, strict=True))
            if type(t) in self._kinds and t.placements != layout.placements  # type: ignore[union-attr]
        ]
        written = [(c, t) for r, c, t in partial if r == 0 and self._call.written]
        holds = {c: _holds_result(self._call.op, self._name(0, c), t) for c, t in written}
        for r, c, t in partial:
            local[r][c] = local_tensor(cast("DTensor", summed(t)))
        return [PartialGradient(local_tensor(t), local[0][c] if holds[c] else None) for c, t in written]

    def _name(self, row: int, column: int) -> str:
        return f"{self._call.names[row]}[{self._call.indices[column]}]"

    def _common(self, c: int, column: Sequence[Tensor | None]) -> _Layout | None:
        common = None
        for r, t in enumerate(column):
            if t is None:
                continue
            layout = self._layout(cast("DTensor", t)) if type(t) in self._kinds else _PLAIN
            if common is None:
                common, first = layout, r
            elif layout is not common:
                raise ValueError(
                    f"{self._call.op}: {self._name(r, c)} and {self._name(first, c)} are not laid out alike over the "
                    f"ranks; pass both as DTensors with the same mesh and placements (redistribute one of them), or "
                    f"both as local tensors"
                )
        return common

    def _layout(self, t: "DTensor") -> _Layout:
        key = id(t.device_mesh), t.placements
        if key not in self._known:
            placements = _without_partial(t)
            self._any_partial |= placements != t.placements
            layout = _Layout(t.device_mesh, placements)
            self._known[key] = self._distinct.setdefault((t.device_mesh, placements), layout)
        return self._known[key]


def _weight(op: str, name: str, layout: _Layout, group, placement: str | None) -> float:
    """1 / how many ranks of the group hold each element of this rank's tensor."""
    if layout.mesh is None:
        return _declared_weight(op, name, "is a plain tensor", 1, group, placement)
    mesh, ranks = layout.mesh.mesh, set(dist.get_process_group_ranks(group))
    inside = len(ranks.intersection(mesh.flatten().tolist()))
    why = f"is on a mesh with {inside} of the {len(ranks)} ranks of the group"
    beyond = _declared_weight(op, name, why, inside, group, placement)
    here = layout.mesh.get_coordinate()
    if here is None:  # outside of the mesh there is nothing to count
        return 1.0
    dims = [(p.is_replicate(), at) for p, at in zip(layout.placements, here, strict=True)]
    shards = mesh[tuple(at if replicated else slice(None) for replicated, at in dims)].flatten().tolist()
    copies = mesh[tuple(slice(None) if replicated else at for replicated, at in dims)].flatten().tolist()
    if not ranks.issuperset(shards):
        raise ValueError(
            f"{op}: {name} has shards on ranks {shards}, but group has ranks {sorted(ranks)} only; pass a group that "
            f"has them all, such as torch.distributed.group.WORLD"
        )
    return beyond / len(ranks.intersection(copies))


def _declared_weight(op: str, name: str, why: str, inside: int, group, placement: str | None) -> float:
    """Weight of a tensor placed on ``inside`` ranks of the group; ``placement`` says what the others hold."""
    if inside == dist.get_world_size(group):
        return 1.0
    if placement is None:
        raise ValueError(
            f"{op}: {name} {why}, and only the caller knows what the other ranks hold: pass "
            f'Sharding(group, placement="replicate") if they hold the same (DDP, parameters left out of FSDP or of '
            f'tensor parallelism), or placement="shard" if they hold other elements (FSDP1, ZeRO, pipeline stages)'
        )
    return 1.0 if placement == "shard" else inside / dist.get_world_size(group)


def _holds_result(op: str, name: str, t: "DTensor") -> bool:
    """Whether this rank's memory of a Partial gradient is where the reduced value goes."""
    from torch.distributed.tensor import Partial

    for p in t.placements:
        if p.is_partial() and p not in (Partial("sum"), Partial("avg")):
            raise NotImplementedError(
                f"{op}: {name} is {p}, which cannot be written in place; replace it first: p.grad = "
                f"p.grad.redistribute(placements={list(_without_partial(t))})"
            )
    here = t.device_mesh.get_coordinate() or [0] * t.device_mesh.ndim
    return all(at == 0 for p, at in zip(t.placements, here, strict=True) if p == Partial("sum"))


def dtensor_types(tensors: Iterable[Tensor | None]) -> set[type]:
    """Which of the tensors' types are DTensors, without a look at every tensor."""
    kinds = set(map(type, tensors)) - PLAIN_TYPES
    if not kinds or not dist.is_available():
        return set()
    from torch.distributed.tensor import DTensor  # slow to import; whoever holds a DTensor has imported it

    return {kind for kind in kinds if issubclass(kind, DTensor)}


def is_dtensor(t) -> "TypeGuard[DTensor]":
    return bool(dtensor_types([t]))


def _without_partial(t: "DTensor") -> "tuple[Placement, ...]":
    """Its placements, with Replicate for Partial."""
    if not any(p.is_partial() for p in t.placements):
        return t.placements
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in t.placements)


def local_tensor(t: "DTensor") -> Tensor:
    """This rank's memory. Not ``to_local()``, which makes a view through autograd."""
    memory = t._local_tensor
    if type(memory) is Tensor:
        return memory
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return memory.wait() if isinstance(memory, AsyncCollectiveTensor) else memory


def summed(t: Tensor) -> Tensor:
    """``t``, or its sum if it is a Partial DTensor: whoever reads it often reduces it only once."""
    if not is_dtensor(t) or t.placements == _without_partial(t):
        return t
    with torch.no_grad():
        return t.redistribute(placements=_without_partial(t))
