"""Directions in host memory: brought to the gradients' device bucket by bucket, while a projection runs.

A bucket is a run of columns, or a part of a large one, of all rows together at most ``BUCKET_BYTES`` large. Two of them are on
the device at a time: one is computed with while the next one is copied on a stream of its own. Inner products add up over
buckets; then the buckets are walked a second time, last one first, to combine.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj.float8 import BLOCK, Float8Row, in_memory
from gradproj.validate import overlaps_itself

BUCKET_BYTES = 1 << 26
_ALIGNMENT = 512  # bytes


class HostRow(NamedTuple):
    """A direction that lies in host memory, pinned if it is to be copied while something else is computed.

    Goes wherever a direction goes. Attribute ``row``: a list of tensors or a :class:`gradproj.float8.Float8Row`.
    """

    row: Sequence[Tensor | None] | Float8Row


class Buffers(NamedTuple):
    """One list of a call. ``block``: how many elements of a row one entry of these buffers belongs to."""

    tensors: Sequence[Tensor | None]
    on_host: bool
    block: int = 1


class Cut(NamedTuple):
    """A column, or the elements ``start`` to ``stop`` of one whose buffers all lie in memory alike."""

    column: int
    start: int = 0
    stop: int | None = None

    def of(self, buffers: Buffers) -> Tensor | None:
        t = buffers.tensors[self.column]
        if t is None or self.stop is None:
            return t
        return in_memory(t.detach())[self.start // buffers.block : -(-self.stop // buffers.block)]


def to_host(t: Tensor) -> Tensor:
    """``t`` in host memory; pinned, and copied without waiting for it, if it comes from a CUDA device."""
    if t.device.type == "cpu":
        return t
    return torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t, non_blocking=t.is_cuda)


def walk(
    lists: Sequence[Buffers], device: torch.device, backwards: bool = False
) -> Iterator[tuple[list[Cut], list[list[Tensor | None]]]]:
    """The lists in buckets: what each takes of which column, and its buffers, those from the host copied to ``device``.

    A bucket's copies are overwritten when the one after the next is asked for.
    """
    buckets = _pack(lists)
    if backwards:
        buckets.reverse()
    room = max((sum(_host_bytes(lists, cut) for cut in bucket) for bucket in buckets), default=0)
    return zip(buckets, _bring(buckets, room, lists, device), strict=True)


def _pack(lists: Sequence[Buffers]) -> list[list[Cut]]:
    """Columns in their order, as many to a bucket as fit. Columns that do not lie in memory alike are not cut."""
    buckets: list[list[Cut]] = []
    room = 0
    for column in range(len(lists[0].tensors)):
        entries = (b.tensors[column] for b in lists if b.block == 1)
        present = [t for t in entries if t is not None]
        whole = Cut(column)
        size = _host_bytes(lists, whole)
        cuts = [whole]
        if size > BUCKET_BYTES and _alike(present):
            numel = present[0].numel()
            step = max(BLOCK, numel * BUCKET_BYTES // size // BLOCK * BLOCK)
            cuts = [Cut(column, start, min(start + step, numel)) for start in range(0, numel, step)]
        for cut in cuts:
            size = _host_bytes(lists, cut)
            if not buckets or size > room:
                buckets.append([])
                room = BUCKET_BYTES
            buckets[-1].append(cut)
            room -= size
    return buckets


def _alike(tensors: list[Tensor]) -> bool:
    """Whether all hold their elements gap-free and in the same order."""
    return all(t.stride() == tensors[0].stride() and _gap_free(t) for t in tensors)


def _gap_free(t: Tensor) -> bool:
    if t.is_contiguous():
        return True
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 == t.numel() and not overlaps_itself(
        t
    )


def _host_bytes(lists: Sequence[Buffers], cut: Cut) -> int:
    parts = (cut.of(b) for b in lists if b.on_host)
    return sum(_padded(t.numel() * t.element_size()) for t in parts if t is not None)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class _Slot:
    """Memory on the device for one bucket at a time."""

    def __init__(self, nbytes: int, device: torch.device):
        self._memory, self._used = torch.empty(nbytes, dtype=torch.uint8, device=device), 0

    def fill(self, lists: Sequence[Buffers], bucket: list[Cut]) -> list[list[Tensor | None]]:
        self._used = 0
        return [[self._copied(cut.of(b)) if b.on_host else cut.of(b) for cut in bucket] for b in lists]

    def _copied(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        source = t if _gap_free(t) else t.contiguous()
        nbytes = source.numel() * source.element_size()
        target = self._memory[self._used : self._used + nbytes].view(source.dtype)
        self._used += _padded(nbytes)
        return target.as_strided(source.shape, source.stride()).copy_(source, non_blocking=True)


def _bring(
    buckets: list[list[Cut]], room: int, lists: Sequence[Buffers], device: torch.device
) -> Iterator[list[list[Tensor | None]]]:
    if device.type != "cuda":
        slot = _Slot(room, device)
        yield from (slot.fill(lists, bucket) for bucket in buckets)
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    slots = [_Slot(room, device) for _ in range(2)]
    side.wait_stream(main)  # which wrote the rows, and whose memory the slots may have been

    def start(i: int) -> tuple[list[list[Tensor | None]], torch.cuda.Event]:
        with torch.cuda.stream(side):
            return slots[i % 2].fill(lists, buckets[i]), side.record_event()

    try:
        ahead = start(0) if buckets else None
        computed: torch.cuda.Event | None = None  # what was done with the bucket before this one
        for i in range(len(buckets)):
            current, copied = ahead  # type: ignore[misc]
            if computed is not None:
                side.wait_event(computed)  # it was in the slot that the next one goes to
            ahead = start(i + 1) if i + 1 < len(buckets) else None
            main.wait_event(copied)
            yield current
            computed = main.record_event()
    finally:
        main.wait_stream(side)  # the slots' memory goes back to the main stream
