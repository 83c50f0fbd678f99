"""Sharded rows: what this rank holds of them, how many ranks hold the same, and the one collective of a projection.

Kernels run on local shards and nothing is gathered. A buffer that several ranks hold is counted by each of them with weight
1 / holders, so that the sum over the group counts it once.
"""

from collections.abc import Callable, Iterable, Sequence
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
Part = Callable[[list[int], Tensor | None], Tensor]

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


class Share(NamedTuple):
    """This rank's part of a Gram: the sum over the group is the Gram.

    Ranks may keep shares and compute them anew as each sees fit, since no collective comes of it.
    """

    gram: Tensor


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

    def gram(self, part: Part, known: Tensor | Share | None, shape: tuple[int, ...]) -> Tensor:
        """Gram of the whole rows. Every rank of the group must call it, one that owns nothing included.

        Args:
            part: the Gram over some columns of ``rows``, given that of rows 1.. if it is known.
            known: Gram of the whole rows 1.., or this rank's share of it, if it is known already.
            shape: [R, R] or [P, R, R], of the result and of what ``part`` returns.
        One collective of P R (R + 1) / 2 float64 numbers, or of P R if the Gram of the whole rows 1.. is known.
        """
        total = self.share(part, known.gram if isinstance(known, Share) else known, shape)
        if self.group is None:
            return total
        if isinstance(known, Tensor):
            total[..., 0, :] = total[..., 0] = all_reduce(total[..., 0, :], self.group)
        else:
            i, j = torch.triu_indices(shape[-1], shape[-1], device=total.device)
            total[..., i, j] = total[..., j, i] = all_reduce(total[..., i, j], self.group)
        return total

    def share(self, part: Part, known: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """This rank's part of that Gram, but for rows 1.. if that is ``known``. No collective."""
        some = next((t for t in chain(*self.rows) if t is not None), None)
        device = some.device if some is not None else torch.device("cpu") if self.group is None else _device(self.group)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        known = None if known is None else known.to(device, torch.float64).contiguous()
        by_weight: dict[float, list[int]] = {}
        for i, weight in enumerate(self.weights):
            by_weight.setdefault(weight, []).append(i)
        for weight, columns in by_weight.items():
            if weight and any(row[i] is not None for i in columns for row in self.rows):
                total += weight * part(columns, known)
        if known is not None:
            total[..., 1:, 1:] = known
        return total

    def written(self, weights: Tensor) -> None:
        """To call after ``rows[0]`` was combined with ``weights``: brings the result to the caller's own tensors.

        The first rank of a reduction gets the sum and the others zeros (all of them get it where the reduction is an
        average): the gradient stays Partial and stands for the projected one, without another rounding.
        """
        if self._reduced:
            untouched = ((weights[..., 0] == 1).all() & ~(weights[..., 1:] != 0).any()).to(
                self._reduced[0].local.device
            )
            for local, value, carries in self._reduced:
                local.copy_(torch.where(untouched, local, value if carries else torch.zeros_like(value)))
        torch.autograd.graph.increment_version(self._written)


def shards(
    op: str,
    rows: Rows,
    names: Sequence[str],
    indices: Sequence[int],
    written: bool,
    spread: Spread | None,
    scaled: Sequence[bool] = (),
    like: Sequence[Tensor | None] | None = None,
) -> Shards | None:
    """This rank's part of ``rows``; None if nothing says that they are distributed.

    Args:
        op: the public function's name, for messages.
        rows: lists of the same length.
        names: how the user knows each row.
        indices: the user's index of each column.
        written: row 0 is going to be modified.
        spread: ``counted`` has an entry per column of ``rows``. None if there will be no inner products.
        scaled: which rows are float8 codes: always of this rank's shards, and mute about how those lie.
        like: a list that lies over the ranks as the rows do, if they might all be mute.
    Raises:
        ValueError, NotImplementedError, RuntimeError: naming row and index. Nothing is written.
    Communicates only to reduce Partial buffers: one all_reduce each.
    """
    group, plain, counted = spread or Spread()
    if plain not in (None, "replicated", "sharded"):
        raise ValueError(f'{op}: plain must be "replicated" or "sharded", got {plain!r}')
    telling = rows if like is None else [*rows, like]
    kinds = _dtensor_types(chain(*telling))
    if group is None and counted is None and not kinds:
        return None
    if group is not None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: group= was given but torch.distributed is not initialised; call init_process_group() first"
        )
    if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: rank {dist.get_rank()} is not in group; call it on the ranks of the group only")

    reader = _Reader(op, telling, [*names[: len(rows)], "like"], indices, kinds, scaled)
    if group is None and kinds and spread is not None:
        group = _infer_group(op, reader.meshes)
    weights = reader.weights(group, plain, counted)
    held = [[_local(t) if type(t) in kinds else t for t in row] for row in rows]  # type: ignore[arg-type]
    reduced = reader.reduce_partial(held, written)
    return Shards(held, weights, group, [t for t in rows[0] if type(t) in kinds] if written else [], reduced)


class _Layout:
    """How a buffer lies over the ranks; compared by identity.

    Attributes:
        mesh: None for a plain tensor.
        placements: with Replicate for Partial.
        partial: whether it was Partial.
    """

    def __init__(
        self, mesh: "DeviceMesh | None" = None, placements: "tuple[Placement, ...]" = (), partial: bool = False
    ):
        self.mesh, self.placements, self.partial = mesh, placements, partial

    def is_like(self, other: "_Layout") -> bool:
        return self is other or (self.mesh == other.mesh and self.placements == other.placements)


_PLAIN = _Layout()


class _Reader:
    """Finds out how the columns of a call lie over the ranks.

    Raises:
        ValueError: the buffers of a column do not lie alike.
    """

    def __init__(
        self,
        op: str,
        rows: Rows,
        names: Sequence[str],
        indices: Sequence[int],
        kinds: set[type],
        scaled: Sequence[bool],
    ):
        self._op, self._rows, self._names, self._indices, self._kinds = op, rows, names, indices, kinds
        self._local = {r for r, codes in enumerate(scaled) if codes}
        self._layouts: dict[tuple, _Layout] = {}
        self._partial: list[tuple[int, int]] = []  # row, column
        columns = zip(*rows, strict=True)
        if kinds:
            self._columns = [self._common(c, column) for c, column in enumerate(columns)]
        else:
            self._columns = [_PLAIN if any(t is not None for t in column) else None for column in columns]

    @property
    def meshes(self) -> "list[DeviceMesh]":
        return [layout.mesh for layout in self._layouts.values() if layout.mesh is not None]

    def weights(self, group, plain: Plain | None, counted: Sequence[bool] | None) -> list[float]:
        """Per column, the weight of this rank's inner products."""
        known: dict[_Layout | None, float] = {None: 0.0}
        for c, layout in enumerate(self._columns):
            if layout is not None and layout not in known:
                name = self._name(next(r for r, row in enumerate(self._rows) if row[c] is not None), c)
                known[layout] = 1.0 if group is None else _weight(self._op, name, layout, group, plain)
        weights = [known[layout] for layout in self._columns]
        return weights if counted is None else [w if c else 0.0 for w, c in zip(weights, counted, strict=True)]

    def reduce_partial(self, held: list[list[Tensor | None]], written: bool) -> list[_Reduced]:
        """Put the sums of Partial buffers into ``held``; for gradients that will be ``written``, what brings them back."""
        carries = {
            c: _carries(self._op, self._name(r, c), cast("DTensor", self._rows[r][c]))
            for r, c in self._partial
            if r == 0 and written
        }
        back = []
        for r, c in self._partial:
            if r < len(held):  # not those of like
                t = cast("DTensor", self._rows[r][c])
                held[r][c] = value = _local(cast("DTensor", settled(t)))
                if r == 0 and written:
                    back.append(_Reduced(_local(t), value, carries[c]))
        return back

    def _name(self, row: int, column: int) -> str:
        return f"{self._names[row]}[{self._indices[column]}]"

    def _common(self, c: int, column: Sequence[Tensor | None]) -> _Layout | None:
        like, first, local = None, 0, None
        for r, t in enumerate(column):
            if t is None:
                continue
            if r in self._local:
                local = _PLAIN
                continue
            layout = self._layout(t)
            if layout.partial:
                self._partial.append((r, c))
            if like is None:
                like, first = layout, r
            elif not layout.is_like(like):
                raise ValueError(
                    f"{self._op}: {self._name(r, c)} and {self._name(first, c)} are not laid out alike over the ranks; pass "
                    f"both as DTensors with the same mesh and placements (redistribute one of them), or both as local tensors"
                )
        return like or local

    def _layout(self, t: Any) -> _Layout:
        if type(t) not in self._kinds:
            return _PLAIN
        key = id(t.device_mesh), t.placements
        layout = self._layouts.get(key)
        if layout is None:
            placements = _reduced(t)
            layout = self._layouts[key] = _Layout(t.device_mesh, placements, placements != t.placements)
        return layout


def _weight(op: str, name: str, layout: _Layout, group, plain: Plain | None) -> float:
    """1 / how many ranks of the group hold each element of this rank's buffer."""
    if layout.mesh is None:
        return _share(op, name, "is a plain tensor", 1, group, plain)
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
        pieces = mesh.mesh[tuple(at if r else slice(None) for r, at in zip(replicated, here, strict=True))]
        if not ranks.issuperset(pieces.flatten().tolist()):
            raise ValueError(
                f"{op}: {name} has shards on ranks {pieces.flatten().tolist()}, but group has ranks {sorted(ranks)} only; pass "
                f"a group that has them all, such as torch.distributed.group.WORLD"
            )
        copies = mesh.mesh[tuple(slice(None) if r else at for r, at in zip(replicated, here, strict=True))]
        holders = len(ranks.intersection(copies.flatten().tolist()))
    if inside == len(ranks):
        return 1.0 / holders
    why = f"is on a mesh with {inside} of the {len(ranks)} ranks of the group"
    return _share(op, name, why, inside, group, plain) / holders


def _share(op: str, name: str, why: str, inside: int, group, plain: Plain | None) -> float:
    """What ``plain`` says of a buffer that tells nothing of any but ``inside`` ranks of the group."""
    if plain is None:
        raise ValueError(
            f"{op}: {name} {why}, and only the caller knows what the other ranks hold: pass "
            f'plain="replicated" if they hold the same (DDP, parameters left out of FSDP or of tensor parallelism), or '
            f'plain="sharded" if they hold other parts (FSDP1, ZeRO, pipeline stages)'
        )
    return 1.0 if plain == "sharded" else inside / dist.get_world_size(group)


def _infer_group(op: str, meshes: "Sequence[DeviceMesh]"):
    """The world, where one mesh covers it. The ranks outside of a smaller one may hold copies, or the rest of the model."""
    largest, world = max(mesh.size() for mesh in meshes), dist.get_world_size()
    if largest == world:
        return dist.group.WORLD
    raise ValueError(
        f"{op}: the largest mesh of a DTensor has {largest} of {world} ranks: pass group=, the ranks over which one gradient is "
        f"spread (torch.distributed.group.WORLD if the other ranks hold other parameters of the same model, "
        f"mesh.get_group() of a 1-D mesh if they hold copies of these)"
    )


def _carries(op: str, name: str, t: "DTensor") -> bool:
    """Whether this rank's memory of a Partial gradient is where the reduced value goes."""
    from torch.distributed.tensor import Partial

    carries = True
    for p, at in zip(t.placements, t.device_mesh.get_coordinate() or [0] * t.device_mesh.ndim, strict=True):
        if not p.is_partial():
            continue
        if p not in (Partial("sum"), Partial("avg")):
            raise NotImplementedError(
                f"{op}: {name} is {p}, which cannot be written in place; replace it first: p.grad = p.grad.redistribute("
                f"placements={list(_reduced(t))})"
            )
        carries &= at == 0 or p == Partial("avg")
    return carries


def settled(t: Tensor) -> Tensor:
    """``t``, or its sum if it is a Partial DTensor: who will read it often reduces it once."""
    if not _is_dtensor(t) or t.placements == _reduced(t):
        return t
    with torch.no_grad():
        return t.redistribute(placements=_reduced(t))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, DTensors as this rank's memory."""
    return [_local(t) if _is_dtensor(t) else t for t in tensors]


def like_shard(shard: Tensor, like: Any) -> Tensor:
    """This rank's shard of something that lies over the ranks as the DTensor ``like`` does, as a DTensor."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _dtensor_types(tensors: Iterable[Tensor | None]) -> set[type]:
    """Which of the tensors' types are DTensors, without a look at every tensor."""
    kinds = set(map(type, tensors)) - PLAIN_TYPES
    if not kinds or not dist.is_available():
        return set()
    from torch.distributed.tensor import DTensor  # slow to import, and who holds one has done it

    return {kind for kind in kinds if issubclass(kind, DTensor)}


def _is_dtensor(t) -> "TypeGuard[DTensor]":
    return bool(_dtensor_types([t]))


def _reduced(t: "DTensor") -> "tuple[Placement, ...]":
    """Its placements, with Replicate for Partial."""
    if not any(p.is_partial() for p in t.placements):
        return t.placements
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in t.placements)


def _local(t: "DTensor") -> Tensor:
    """This rank's memory. Not ``to_local()``, which makes a view through autograd."""
    local = t._local_tensor
    if type(local) is Tensor:
        return local
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def all_reduce(numbers: Tensor, group) -> Tensor:
    """Sum of n float64 numbers over ``group``, on the device of ``numbers``: one collective, of 8 n bytes.

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
