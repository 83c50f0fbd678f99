"""Sharded rows: what this rank holds of them, how many ranks hold the same, and the one collective of a projection.

Kernels run on local shards and nothing is gathered. A buffer that several ranks hold is counted by each of them with weight
1 / holders, so that the sum over the group counts it once.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Rows = Sequence[Sequence[Tensor | None]]
Plain = Literal["replicated", "sharded"]

PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}
_NO_FLOAT64 = ("mps", "hpu", "npu")  # devices whose collectives do not take it


class Spread(NamedTuple):
    """How rows are spread over ranks, as far as their tensors do not say it. See :func:`gradproj.project_`."""

    group: Any = None
    plain: Plain | None = None
    counted: Sequence[bool] | None = None

    def of_columns(self, op: str, columns: int, kept: Sequence[int] | None = None) -> "Spread":
        """The same with ``counted`` checked, and cut to the columns that are kept, if not all are."""
        if self.counted is None:
            return self
        if len(self.counted) != columns:
            raise ValueError(
                f"{op}: counted has {len(self.counted)} entries for {columns} buffers; pass one bool for each"
            )
        return self if kept is None else self._replace(counted=[self.counted[i] for i in kept])


class _Reduced(NamedTuple):
    """A Partial gradient. Kernels work on the sum, ``value``; this rank's ``local`` carries it, or zeros, afterwards."""

    local: Tensor
    value: Tensor
    carries: bool


class Shards:
    """This rank's part of the rows of a call.

    Attributes:
        rows: the rows as plain tensors in this rank's memory.
        weights: per column, the weight of this rank's inner products; 0 leaves the column out of them.
        group: the ranks over which inner products are summed; None if no rank but this one takes part.
    """

    def __init__(
        self, rows: list[list[Tensor | None]], weights: list[float], group, written: list, reduced: list[_Reduced]
    ):
        self.rows, self.weights, self.group = rows, weights, group
        self._written, self._reduced = written, reduced

    def gram(
        self,
        part: Callable[[list[int], Tensor | None], Tensor],
        known: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Gram of the whole rows. Every rank of the group must call it, one that owns nothing included.

        Args:
            part: the Gram over some columns of ``rows``, given ``known``.
            known: Gram of the whole rows 1.., if it is known already.
            shape: [R, R] or [P, R, R], of the result and of what ``part`` returns.
        One collective of P R (R + 1) / 2 float64 numbers, or of P R with ``known``.
        """
        some = next((t for t in chain(*self.rows) if t is not None), None)
        device = some.device if some is not None else torch.device("cpu") if self.group is None else _device(self.group)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        known = None if known is None else known.to(device, torch.float64).contiguous()
        by_weight: dict[float, list[int]] = {}
        for i, weight in enumerate(self.weights):
            if weight and any(row[i] is not None for row in self.rows):
                by_weight.setdefault(weight, []).append(i)
        for weight, columns in by_weight.items():
            total += weight * part(columns, known)
        if known is not None:
            row = total[..., 0, :].clone()
            total[..., 0, :] = total[..., 0] = row if self.group is None else all_reduce(row, self.group)
            total[..., 1:, 1:] = known
        elif self.group is not None:
            i, j = torch.triu_indices(shape[-1], shape[-1], device=device)
            total[..., i, j] = total[..., j, i] = all_reduce(total[..., i, j], self.group)
        return total

    def written(self, weights: Tensor) -> None:
        """To call after ``rows[0]`` was combined with ``weights``: brings the result to the caller's own tensors.

        The first rank of a reduction gets the sum and the others zeros (all of them get it where the reduction is an
        average): the gradient stays Partial and stands for the projected one, without another rounding.
        """
        untouched = (weights[..., 0] == 1).all() & ~(weights[..., 1:] != 0).any()
        for local, value, carries in self._reduced:
            local.copy_(torch.where(untouched.to(local.device), local, value if carries else torch.zeros_like(value)))
        torch.autograd.graph.increment_version(self._written)


def shards(
    op: str,
    rows: Rows,
    names: Sequence[str],
    indices: Sequence[int],
    written: bool,
    spread: Spread | None,
    scaled: Sequence[bool] = (),
) -> Shards | None:
    """This rank's part of ``rows``; None if nothing says that they are distributed.

    Args:
        op: the public function's name, for messages.
        rows: lists of the same length.
        names: how the user knows each row.
        indices: the user's index of each column.
        written: row 0 is going to be modified.
        spread: ``counted`` has an entry per column of ``rows``. None if there will be no inner products.
        scaled: which rows are float8 codes: always of this rank's shards.
    Raises:
        ValueError, NotImplementedError, RuntimeError: naming row and index. Nothing is written.
    Communicates only to reduce Partial buffers: one all_reduce each.
    """
    group, plain, counted = spread or Spread()
    if plain not in (None, "replicated", "sharded"):
        raise ValueError(f'{op}: plain must be "replicated" or "sharded", got {plain!r}')
    found = meshes(rows)
    if group is None and counted is None and not found:
        return None
    if group is not None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: group= was given but torch.distributed is not initialised; call init_process_group() first"
        )
    if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: rank {dist.get_rank()} is not in group; call it on the ranks of the group only")
    if group is None and found and spread is not None:
        group = _infer_group(op, found)

    reader = _Reader(op, names, written, group, plain, scaled)
    held: list[list[Tensor | None]] = [[] for _ in rows]
    weights = []
    for c, (i, column) in enumerate(zip(indices, zip(*rows, strict=True), strict=True)):
        tensors, weight = reader.read(i, column)
        for row, t in zip(held, tensors, strict=True):
            row.append(t)
        weights.append(weight if counted is None or counted[c] else 0.0)
    return Shards(held, weights, group, [t for t in rows[0] if _is_dtensor(t)] if written else [], reader.reduced)


class _Reader:
    """Turns columns of the caller's tensors into plain tensors and weights."""

    def __init__(
        self, op: str, names: Sequence[str], written: bool, group, plain: Plain | None, scaled: Sequence[bool]
    ):
        self.scaled = scaled
        self.op, self.names, self.written, self.group, self.plain = op, names, written, group, plain
        self.reduced: list[_Reduced] = []
        self._weights: dict[tuple, float] = {}  # of a mesh and placements

    def read(self, i: int, column: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], float]:
        first = next((r for r, t in enumerate(column) if t is not None), None)
        if first is None:
            return column, 0.0
        name, like = f"{self.names[first]}[{i}]", column[first]
        if not _is_dtensor(like):
            for r, t in enumerate(column):
                if _is_dtensor(t):
                    raise ValueError(self._unlike(f"{self.names[r]}[{i}]", name))
            return column, 1.0 if self.group is None else self._share(name, "is a plain tensor", 1)
        mesh, target = like.device_mesh, _reduced(like)
        tensors: list[Tensor | None] = []
        for r, t in enumerate(column):
            if t is None or (r < len(self.scaled) and self.scaled[r]):
                tensors.append(t)
            elif _is_dtensor(t) and t.device_mesh == mesh and _reduced(t) == target:
                tensors.append(_local(t) if t.placements == target else self._sum(t, r, i, target))
            else:
                raise ValueError(self._unlike(f"{self.names[r]}[{i}]", name))
        if self.group is None:
            return tensors, 1.0
        if (mesh, target) not in self._weights:
            self._weights[mesh, target] = self._weight(mesh, target, name)
        return tensors, self._weights[mesh, target]

    def _sum(self, t: "DTensor", row: int, i: int, target: "tuple[Placement, ...]") -> Tensor:
        """A Partial buffer, reduced; if it is the gradient, with a note on how to write it."""
        from torch.distributed.tensor import Partial

        value = _local(cast("DTensor", settled(t)))
        if row == 0 and self.written:
            coordinate = t.device_mesh.get_coordinate() or [0] * len(target)
            carries = True
            for p, at in zip(t.placements, coordinate, strict=True):
                if not p.is_partial():
                    continue
                if p not in (Partial("sum"), Partial("avg")):
                    raise NotImplementedError(
                        f"{self.op}: {self.names[0]}[{i}] is {p}, which cannot be written in place; replace it first: "
                        f"p.grad = p.grad.redistribute(placements={list(target)})"
                    )
                carries &= at == 0 or p == Partial("avg")
            self.reduced.append(_Reduced(_local(t), value, carries))
        return value

    def _weight(self, mesh: "DeviceMesh", placements: "tuple[Placement, ...]", name: str) -> float:
        """1 / how many ranks of the group hold each element of this rank's shard."""
        group_ranks = set(dist.get_process_group_ranks(self.group))
        mesh_ranks = mesh.mesh.flatten().tolist()
        replicated = [p.is_replicate() for p in placements]
        inside = len(group_ranks.intersection(mesh_ranks))
        if inside == len(mesh_ranks):
            holders = prod(mesh.size(d) for d, r in enumerate(replicated) if r)
        else:
            here = mesh.get_coordinate()
            if here is None:  # outside of the mesh, where there is nothing to count
                return 1.0
            shards = mesh.mesh[tuple(at if r else slice(None) for r, at in zip(replicated, here, strict=True))]
            if not group_ranks.issuperset(shards.flatten().tolist()):
                raise ValueError(
                    f"{self.op}: {name} has shards on ranks {shards.flatten().tolist()}, but group has ranks "
                    f"{sorted(group_ranks)} only; pass a group that has them all, such as torch.distributed.group.WORLD"
                )
            copies = mesh.mesh[tuple(slice(None) if r else at for r, at in zip(replicated, here, strict=True))]
            holders = len(group_ranks.intersection(copies.flatten().tolist()))
        if inside == len(group_ranks):
            return 1.0 / holders
        return (
            self._share(name, f"is on a mesh with {inside} of the {len(group_ranks)} ranks of the group", inside)
            / holders
        )

    def _share(self, name: str, why: str, inside: int) -> float:
        """What ``plain`` says of a buffer that tells nothing of any but ``inside`` ranks of the group."""
        if self.plain is None:
            raise ValueError(
                f"{self.op}: {name} {why}, and only the caller knows what the other ranks hold: pass "
                f'plain="replicated" if they hold the same (DDP, parameters left out of FSDP or of tensor parallelism), or '
                f'plain="sharded" if they hold other parts (FSDP1, ZeRO, pipeline stages)'
            )
        return 1.0 if self.plain == "sharded" else inside / dist.get_world_size(self.group)

    def _unlike(self, name: str, other: str) -> str:
        return (
            f"{self.op}: {name} and {other} are not laid out alike over the ranks; pass both as DTensors with the same mesh and "
            f"placements (redistribute one of them), or both as local tensors"
        )


def _infer_group(op: str, meshes: "Sequence[DeviceMesh]"):
    """The world, where one mesh covers it. The ranks outside of a smaller one may hold copies, or the rest of the model."""
    if any(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD
    raise ValueError(
        f"{op}: the mesh of a DTensor has {meshes[0].size()} of {dist.get_world_size()} ranks: pass group=, the ranks over which "
        f"one gradient is spread (torch.distributed.group.WORLD if the other ranks hold other parameters of the same "
        f"model, mesh.get_group() of a 1-D mesh if they hold copies of these)"
    )


def meshes(rows: Rows) -> "list[DeviceMesh]":
    """The meshes of the DTensors among ``rows``."""
    if set(map(type, chain(*rows))) <= PLAIN_TYPES:
        return []
    return list(dict.fromkeys(t.device_mesh for t in chain(*rows) if _is_dtensor(t)))


def settled(t: Tensor) -> Tensor:
    """``t``, or its sum if it is a Partial DTensor: who will read it often reduces it once."""
    if not _is_dtensor(t) or t.placements == _reduced(t):
        return t
    with torch.no_grad():
        return t.redistribute(placements=_reduced(t))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, DTensors as this rank's memory."""
    return [_local(t) if _is_dtensor(t) else t for t in tensors]


def _is_dtensor(t) -> "TypeGuard[DTensor]":
    if type(t) in PLAIN_TYPES or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and who holds one has done it

    return isinstance(t, DTensor)


def _reduced(t: "DTensor") -> "tuple[Placement, ...]":
    """Its placements, with Replicate for Partial."""
    if not any(p.is_partial() for p in t.placements):
        return t.placements
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in t.placements)


@torch.no_grad()  # then to_local() is the DTensor's own memory
def _local(t: "DTensor") -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    local = t.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def all_reduce(numbers: Tensor, group) -> Tensor:
    """Sum of a float64 tensor of n numbers over ``group``, on the device of ``numbers``: one collective, of 8 n bytes.

    The numbers travel on a device that the group communicates on, if theirs is not. A device without float64 carries their
    bits, 8 n bytes per rank, and every rank adds them up in the same order.
    """
    device = _device(group, numbers.device)
    if _carries_float64(device):
        total = numbers.to(device, copy=True)
        dist.all_reduce(total, group=group)
        return total.to(numbers.device)
    bits = numbers.reshape(-1).view(torch.int32).to(device)
    gathered = bits.new_empty(dist.get_world_size(group) * len(bits))
    dist.all_gather_into_tensor(gathered, bits, group=group)
    return gathered.to(numbers.device).view(torch.float64).view(-1, *numbers.shape).sum(0)


def _device(group, preferred: torch.device | None = None) -> torch.device:
    """The device on which ``group`` communicates, ``preferred`` if it can."""
    types = dist.distributed_c10d._device_capability(group)
    if preferred is not None and preferred.type in types:
        return preferred
    return torch.device("cpu" if "cpu" in types else types[0])


def _carries_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in _NO_FLOAT64
