"""What DTensors say: how a tensor lies over the ranks, and so how much of this rank's inner products counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

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
    """Kernels work on the sum, ``value``; afterwards ``local``, this rank's memory, holds it, or zeros."""

    local: Tensor
    value: Tensor
    holds_result: bool


@dataclass(eq=False)
class _Layout:
    """How a tensor lies over the ranks; hashed by identity."""

    mesh: "DeviceMesh | None" = None  # of a plain tensor
    placements: "tuple[Placement, ...]" = ()  # with Replicate for Partial
    partial: bool = False  # whether it was

    def is_like(self, other: "_Layout") -> bool:
        return self is other or (self.mesh == other.mesh and self.placements == other.placements)


_PLAIN = _Layout()


class Layouts:
    """How the columns of a call lie over the ranks.

    Raises:
        ValueError: the tensors of a column do not lie alike.
    """

    def __init__(self, call: "Call", kinds: set[type]):
        self._call, self._kinds = call, kinds
        self._found: dict[tuple, _Layout] = {}
        self._partial: list[tuple[int, int]] = []  # row, column
        columns = zip(*call.rows, strict=True)
        if kinds:
            self._columns = [self._common(c, column) for c, column in enumerate(columns)]
        else:
            self._columns = [_PLAIN if any(t is not None for t in column) else None for column in columns]

    @property
    def meshes(self) -> "list[DeviceMesh]":
        return [layout.mesh for layout in self._found.values() if layout.mesh is not None]

    def weights(self, group, placement: str | None) -> list[float]:
        """Per column, the weight of this rank's inner products."""
        weight: dict[_Layout | None, float] = {None: 0.0}
        for c, layout in enumerate(self._columns):
            if layout is not None and layout not in weight:
                name = self._name(next(r for r, row in enumerate(self._call.rows) if row[c] is not None), c)
                weight[layout] = 1.0 if group is None else _weight(self._call.op, name, layout, group, placement)
        return [weight[layout] for layout in self._columns]

    def reduce_partial(self, local: list[list[Tensor | None]]) -> list[PartialGradient]:
        """Put the sums of Partial tensors into ``local``; of gradients that will be written, what brings them back."""
        op, rows, written = self._call.op, self._call.rows, self._call.written
        of_gradient = [c for r, c in self._partial if r == 0 and written]
        holds = {c: _holds_result(op, self._name(0, c), cast("DTensor", rows[0][c])) for c in of_gradient}
        gradients = []
        for r, c in self._partial:
            t = cast("DTensor", rows[r][c])
            local[r][c] = value = local_tensor(cast("DTensor", summed(t)))
            if r == 0 and written:
                gradients.append(PartialGradient(local_tensor(t), value, holds[c]))
        return gradients

    def _name(self, row: int, column: int) -> str:
        return f"{self._call.names[row]}[{self._call.indices[column]}]"

    def _common(self, c: int, column: Sequence[Tensor | None]) -> _Layout | None:
        common, first = None, 0
        for r, t in enumerate(column):
            if t is None:
                continue
            layout = self._layout(t)
            if layout.partial:
                self._partial.append((r, c))
            if common is None:
                common, first = layout, r
            elif not layout.is_like(common):
                raise ValueError(
                    f"{self._call.op}: {self._name(r, c)} and {self._name(first, c)} are not laid out alike over the ranks; pass "
                    f"both as DTensors with the same mesh and placements (redistribute one of them), or both as local tensors"
                )
        return common

    def _layout(self, t: Any) -> _Layout:
        if type(t) not in self._kinds:
            return _PLAIN
        key = id(t.device_mesh), t.placements
        layout = self._found.get(key)
        if layout is None:
            placements = _without_partial(t)
            layout = self._found[key] = _Layout(t.device_mesh, placements, placements != t.placements)
        return layout


def _weight(op: str, name: str, layout: _Layout, group, placement: str | None) -> float:
    """1 / how many ranks of the group hold each element of this rank's tensor."""
    if layout.mesh is None:
        return _plain_weight(op, name, "is a plain tensor", 1, group, placement)
    mesh, ranks = layout.mesh, set(dist.get_process_group_ranks(group))
    replicated = [p.is_replicate() for p in layout.placements]
    mesh_ranks = mesh.mesh.flatten().tolist()
    inside = len(ranks.intersection(mesh_ranks))
    if inside == len(mesh_ranks):
        holders = prod(mesh.size(d) for d, r in enumerate(replicated) if r)
    else:
        here = mesh.get_coordinate()
        if here is None:  # outside of the mesh, where there is nothing to count
            return 1.0
        shards = mesh.mesh[tuple(at if r else slice(None) for r, at in zip(replicated, here, strict=True))]
        if not ranks.issuperset(shards.flatten().tolist()):
            raise ValueError(
                f"{op}: {name} has shards on ranks {shards.flatten().tolist()}, but group has ranks {sorted(ranks)} only; pass "
                f"a group that has them all, such as torch.distributed.group.WORLD"
            )
        copies = mesh.mesh[tuple(slice(None) if r else at for r, at in zip(replicated, here, strict=True))]
        holders = len(ranks.intersection(copies.flatten().tolist()))
    if inside == len(ranks):
        return 1.0 / holders
    why = f"is on a mesh with {inside} of the {len(ranks)} ranks of the group"
    return _plain_weight(op, name, why, inside, group, placement) / holders


def _plain_weight(op: str, name: str, why: str, inside: int, group, placement: str | None) -> float:
    """Weight of a tensor whose placement is known on ``inside`` ranks of the group only, as declared by
    ``placement``."""
    if inside == dist.get_world_size(group):
        return 1.0
    if placement is None:
        raise ValueError(
            f"{op}: {name} {why}, and only the caller knows what the other ranks hold: pass "
            f'Sharding(group, placement="replicate") if they hold the same (DDP, parameters left out of FSDP or of tensor '
            f'parallelism), or placement="shard" if they hold other elements (FSDP1, ZeRO, pipeline stages)'
        )
    return 1.0 if placement == "shard" else inside / dist.get_world_size(group)


def infer_group(op: str, meshes: "Sequence[DeviceMesh]"):
    """The world, where one mesh covers it. The ranks outside of a smaller one may hold copies, or the rest of the
    model."""
    largest, world = max(mesh.size() for mesh in meshes), dist.get_world_size()
    if largest == world:
        return dist.group.WORLD
    raise ValueError(
        f"{op}: the largest mesh of a DTensor has {largest} of {world} ranks: pass Sharding(group=), the ranks that hold one "
        f"gradient together (torch.distributed.group.WORLD if the other ranks hold other parameters of the same model, "
        f"mesh.get_group() of a 1-D mesh if they hold copies of these)"
    )


def _holds_result(op: str, name: str, t: "DTensor") -> bool:
    """Whether this rank's memory of a Partial gradient is where the reduced value goes."""
    from torch.distributed.tensor import Partial

    holds = True
    for p, at in zip(t.placements, t.device_mesh.get_coordinate() or [0] * t.device_mesh.ndim, strict=True):
        if not p.is_partial():
            continue
        if p not in (Partial("sum"), Partial("avg")):
            raise NotImplementedError(
                f"{op}: {name} is {p}, which cannot be written in place; replace it first: p.grad = p.grad.redistribute("
                f"placements={list(_without_partial(t))})"
            )
        holds &= at == 0 or p == Partial("avg")
    return holds


def dtensor_types(tensors: Iterable[Tensor | None]) -> set[type]:
    """Which of the tensors' types are DTensors, without a look at every tensor."""
    kinds = set(map(type, tensors)) - PLAIN_TYPES
    if not kinds or not dist.is_available():
        return set()
    from torch.distributed.tensor import DTensor  # slow to import, and who holds one has done it

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
    """``t``, or its sum if it is a Partial DTensor: who will read it often reduces it once."""
    if not is_dtensor(t) or t.placements == _without_partial(t):
        return t
    with torch.no_grad():
        return t.redistribute(placements=_without_partial(t))
