"""Parts of parameters that are read as matrices: where they lie in memory, and what of them a rank holds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradproj.rows.sharding import local_tensors


class Region(NamedTuple):
    """A part of a parameter, read as a matrix [outputs, inputs] or as a vector.

    Attributes:
        ranges: (begin, end) per dimension of the parameter.
        outputs, inputs: the dimensions that count as outputs and as inputs, the slowest first; others have one element.
    """

    ranges: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self._count(self.outputs), self._count(self.inputs)

    def _count(self, dims: Sequence[int]) -> int:
        return math.prod(self.ranges[d][1] - self.ranges[d][0] for d in dims)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a tensor that has the parameter's shape, in the parameter's own dimensions."""
        for d, (begin, end) in enumerate(self.ranges):
            if end - begin < whole.shape[d]:
                whole = whole.narrow(d, begin, end - begin)
        return whole

    def matrix(self, whole: Tensor) -> Tensor:
        """[outputs, inputs] view of what has the parameter's shape; a vector [outputs] without inputs."""
        used = self.outputs + self.inputs
        others = [d for d in range(whole.dim()) if d not in used]
        part = self.cut(whole).permute(*others, *used)
        return part.view(self.shape if self.inputs else self.shape[:1])

    def overlaps(self, other: "Region") -> bool:
        return all(a < d and c < b for (a, b), (c, d) in zip(self.ranges, other.ranges, strict=True))

    def label(self, shape: Sequence[int]) -> str:
        """``"[3]"``, ``"[0:64]"``; empty for the whole parameter."""
        shown = [
            ":" if (a, b) == (0, n) and n > 1 or n == 1 and d in self.outputs + self.inputs
            else f"{a}" if d not in self.outputs + self.inputs else f"{a}:{b}"
            for d, ((a, b), n) in enumerate(zip(self.ranges, shape, strict=True))
        ]  # fmt: skip
        while shown and shown[-1] == ":":
            shown.pop()
        return f"[{','.join(shown)}]" if shown else ""


def whole(shape: Sequence[int]) -> Region:
    """All of a parameter, its first dimension the outputs."""
    return Region(tuple((0, n) for n in shape), (0,), tuple(range(1, len(shape))))


def locate(base: Tensor, part: Tensor, outputs: Sequence[int], inputs: Sequence[int] = ()) -> Region | None:
    """Where a view lies in the tensor that it is of; None if its dimensions are not whole steps along its.

    Args:
        outputs, inputs: the dimensions of ``part`` that are read as such.
    """
    offset = part.storage_offset() - base.storage_offset()
    if offset < 0 or part.numel() == 0:
        return None
    if part.shape == base.shape and part.stride() == base.stride():
        return Region(tuple((0, n) for n in base.shape), tuple(outputs), tuple(inputs))
    where: dict[int, int] = {}  # dimension of part -> of base
    for d in sorted(range(part.dim()), key=lambda d: part.shape[d] == 1):  # those of one element take what is left
        fits = [b for b in range(base.dim()) if b not in where.values()]
        if part.shape[d] == 1:
            fits.sort(key=lambda b: base.shape[b] != 1)
        else:
            fits = [b for b in fits if base.shape[b] > 1 and base.stride(b) == part.stride(d)]
        if not fits:
            return None
        where[d] = fits[0]
    ranges = [(0, 1)] * base.dim()
    lengths = {b: part.shape[d] for d, b in where.items()}
    for b in sorted(range(base.dim()), key=base.stride, reverse=True):
        if base.shape[b] == 1:
            continue
        begin, offset = divmod(int(offset), base.stride(b))
        ranges[b] = begin, begin + lengths.get(b, 1)
        if ranges[b][1] > base.shape[b]:
            return None
    if offset:
        return None
    return Region(tuple(ranges), tuple(where[d] for d in outputs), tuple(where[d] for d in inputs))


class Rows(NamedTuple):
    """What this rank holds of a matrix.

    Attributes:
        part: [rows, inputs], or [rows] of a vector; a view. Of a matrix that is on other ranks, without rows.
        begin, end: which of the outputs these are.
    """

    part: Tensor
    begin: int
    end: int


def on_rank(region: Region, t: Tensor, name: str) -> Rows:
    """This rank's rows of a matrix.

    Args:
        t: the parameter or its gradient, perhaps a DTensor.
        name: for errors.
    Raises:
        NotImplementedError: it is sharded over its inputs, so that W U would be a sum over ranks, or not contiguous.
    """
    placements = getattr(t, "placements", ())
    local = local_tensors([t])[0]
    offsets = _offsets(t) if placements else (0,) * t.dim()
    ranges = [
        (max(a, offset) - offset, min(b, offset + length) - offset)
        for (a, b), offset, length in zip(region.ranges, offsets, local.shape, strict=True)
    ]
    if any(low >= high for low, high in ranges):
        return Rows(local.new_empty(0, *region.shape[1:] if region.inputs else ()), 0, 0)
    begin, end = 0, region.shape[0]
    for d, ((a, b), (low, high), offset) in enumerate(zip(region.ranges, ranges, offsets, strict=True)):
        if high - low == b - a:
            continue
        if d != region.outputs[0]:
            raise NotImplementedError(
                f"NullSpace: the weight of {name} is {placements} of a DTensor, that is, sharded over its inputs; "
                "shard it over its outputs, or leave it out with modules="
            )
        each = region.shape[0] // (b - a)
        begin, end = (low + offset - a) * each, (high + offset - a) * each
    try:
        return Rows(region._replace(ranges=tuple(ranges)).matrix(local), begin, end)
    except RuntimeError as error:
        raise NotImplementedError(
            f"NullSpace: the weight of {name} with shape {tuple(t.shape)} and strides {t.stride()} is no matrix in "
            "memory, so that it cannot be pinned in place: make it contiguous "
            "(model.to(memory_format=torch.contiguous_format)), or leave it out with modules="
        ) from error


def _offsets(t: Any) -> Sequence[int]:
    """Where this rank's shard begins, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(p.is_partial() for p in t.placements):
        raise NotImplementedError("NullSpace: a Partial DTensor has no rows yet: reduce it first")
    return compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1]
