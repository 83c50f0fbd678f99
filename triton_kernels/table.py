"""From lists of tensors to tables of addresses that a kernel walks: the host's part, in Python.

A launch covers all columns of one form: which rows are there, of which dtypes, in how many dimensions. Its table is int64, a
line per segment (see ``Launch``). Dense neighbours that touch in memory in every row are one segment, within a part, and where
the scale blocks of float8 rows line up. A dense segment that is off a 16-byte boundary by the same number of elements in every
row is split into a head and an aligned rest. Columns without a common dense order keep their sizes and strides.

Tables are kept, so that a training loop checks its buffers and builds once: under the addresses, shapes, strides and dtypes of
all buffers on one device, the newest of them, up to ``CACHE_BYTES``. Their memory outlives every reader: a stream that uses a
table is recorded on it, the copy's pinned source is held by torch until the copy is done, and what a CUDA graph has captured
stays for ever, because the graph reads it at every replay.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from gradproj import validate
from gradproj.float8 import BLOCK as SCALE_BLOCK

CACHE_BYTES = 1 << 20
BLOCK = 2048  # elements
MAX_PROGRAMS = 1024  # of a pass: their sums, 45 doubles each at most, stay under 512 KiB
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        ids: which of the wanted rows are there, by position.
        dtypes: triton types of those rows, and of the base. uint8: float8 that the target has to decode from its bits.
        base: whether there is a base, behind the other rows.
        parts: whether lines carry the number of a part.
        ndim: 0 if dense.
    """

    ids: tuple[int, ...]
    dtypes: tuple[tl.dtype, ...]
    base: bool
    parts: bool
    ndim: int

    @property
    def scaled(self) -> bool:
        """Whether any row is float8."""
        return tl.uint8 in self.dtypes or tl.float8e4nv in self.dtypes


class Launch(NamedTuple):
    """One kernel launch over the lines of ``table``, ascending by part. With n = len(form.dtypes) a line is

        n addresses, numel, cumulative number of blocks, whether every row starts on a 16-byte boundary,
        [the part], [n addresses of scales, 0 where a row has none], [ndim sizes, then ndim strides of every row].

    Attributes:
        programs: of a Gram, each with sums of its own; those of program p and part q are in slot ``slot + p + q`` of the pass.
    """

    table: Tensor
    blocks: int
    form: Form
    programs: int
    slot: int

    @property
    def arguments(self) -> tuple:
        """What the kernels take first."""
        return self.table, self.table.shape[0], self.blocks


class Pass(NamedTuple):
    """The launches that walk some of the rows once.

    Attributes:
        spans: [parts, launches, 2] int64 on the device: the first and past the last slot that holds sums of a part.
        slots: how many there are.
        memory: what tables and spans are views of, on the device.
        ready: recorded behind its upload; None on the CPU.
    """

    launches: list[Launch]
    spans: Tensor
    slots: int
    memory: Tensor
    ready: torch.cuda.Event | None


class _Entry:
    """What is kept of one set of buffers."""

    def __init__(self) -> None:
        self.passes: dict[tuple[int, ...], Pass] = {}
        self.writable = False

    @property
    def bytes(self) -> int:
        return sum(p.memory.nbytes for p in self.passes.values())


_cache: OrderedDict[tuple, _Entry] = OrderedDict()
_captured: dict[int, Pass] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Rows:
    """The buffers of one op call, as ``gradproj.ops`` describes them.

    Args:
        scales: one entry per buffer of ``rows``.
        written: whether row 0 will be.
    Raises:
        RuntimeError: what the kernels do not take, saying what and where.
    """

    def __init__(self, rows, num_rows: int, base, scales, parts, num_parts: int, written: bool, block: int = BLOCK):
        self.rows, self.num_rows, self.base, self.scales = rows, num_rows, base, scales
        self.parts, self.num_parts, self.block = parts, num_parts, block
        everything = [*rows, *(base or ()), *(scales or ())]
        present = [t for t in everything if t is not None]
        if not present:
            raise RuntimeError("gradproj: no tensor among the buffers")
        self.device = present[0].device
        dtypes = tuple(map(attrgetter("dtype"), present))
        self.compute = tl.float64 if torch.float64 in dtypes else tl.float32
        absent = tuple(i for i, t in enumerate(everything) if t is None) if len(present) < len(everything) else ()
        # An address is one device's: the first buffer's is enough.
        self._key = (
            self.device, num_rows, base is None, scales is None, num_parts, block, tuple(parts), absent, dtypes,
            tuple(map(Tensor.data_ptr, present)), tuple(map(attrgetter("shape"), present)),
            tuple(map(Tensor.stride, present)),
        )  # fmt: skip
        entry = _cache.get(self._key)
        if entry is None or (written and not entry.writable):
            self._check(written)
        if entry is None:
            entry = _Entry()
        else:
            _cache.move_to_end(self._key)
        entry.writable = entry.writable or written
        self._entry = entry

    @classmethod
    def to_write(cls, grads, directions, base, scales, parts, num_parts: int, block: int = BLOCK) -> "Rows":
        """Of an op that writes ``grads``; ``scales``: one entry per buffer of ``directions``."""
        if not grads or len(directions) % len(grads):
            raise RuntimeError("gradproj: rows of different length")
        rows = [*grads, *directions]
        if scales is not None:
            scales = [None] * len(grads) + scales
        return cls(rows, len(rows) // len(grads), base, scales, parts, num_parts, written=True, block=block)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of Gram and weights."""
        return (self.num_parts,) if self.num_parts else ()

    def walk(self, wanted: tuple[int, ...]) -> Pass:
        """The launches for the rows ``wanted``, uploaded if they are not there yet."""
        found = self._entry.passes.get(wanted)
        capturing = _capturing(self.device)
        if found is None:
            if capturing:
                raise RuntimeError(
                    "gradproj: these buffers are new to the Triton backend, and a table cannot be copied to the device while a "
                    "CUDA graph is captured; run one step with the same buffers before the capture"
                )
            found = self._entry.passes[wanted] = self._build(wanted)
            _cache[self._key] = self._entry
            while len(_cache) > 1 and sum(entry.bytes for entry in _cache.values()) > CACHE_BYTES:
                _cache.popitem(last=False)
        if capturing:  # the capture began with a synchronisation, so that the upload is done
            _captured[id(found)] = found
        elif found.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(found.ready)
            found.memory.record_stream(stream)
        return found

    def _check(self, written: bool) -> None:
        try:
            self._refuse(written)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RuntimeError(str(error)) from error

    def _refuse(self, written: bool) -> None:
        count = len(self.rows) // self.num_rows
        names = [*(f"row {r}: buffer" for r in range(self.num_rows)), "base"]

        def split(flat):
            return [flat[k : k + count] for k in range(0, len(flat), count or 1)]

        lists = split(self.rows)
        if len(self.rows) != count * self.num_rows or len(self.base or ()) not in (0, count):
            raise ValueError("gradproj: rows of different length")
        if self.scales is not None and len(self.scales) != len(self.rows):
            raise ValueError("gradproj: scales: one entry per buffer")
        if bool(self.num_parts) != bool(self.parts) or len(self.parts) not in (0, count):
            raise ValueError("gradproj: parts: one number per buffer, and num_parts")
        if any(not 0 <= part < self.num_parts for part in self.parts):
            raise ValueError("gradproj: parts: a number is not below the number of parts")
        scales = [] if self.scales is None else split(self.scales)
        scaled = [any(s is not None for s in row) for row in scales]
        all_lists = lists if self.base is None else [*lists, self.base]
        validate.check("gradproj", all_lists, names, range(count), written, scaled, "triton")
        if scales:
            validate.check_scales("gradproj", lists, scales, names, range(count))
        for row, name in zip(all_lists, names, strict=False):
            for i, t in enumerate(row):
                if t is not None and t.device != self.device:
                    raise ValueError(f"gradproj: {name}[{i}] is on {t.device}, another device than {self.device}")
        for i, b in enumerate(self.base or ()):
            if (b is None) != (lists[0][i] is None):
                raise ValueError(f"gradproj: base[{i}] is absent where row 0 is not, or the other way round")

    def _build(self, wanted: tuple[int, ...]) -> Pass:
        segments: dict[Form, list[_Segment]] = {}
        for form, segment in self._columns(wanted):
            of_form = segments.setdefault(form, [])
            if not (of_form and form.ndim == 0 and of_form[-1].takes(segment)):
                of_form.append(segment)

        parts = max(1, self.num_parts)
        spans = np.zeros((parts, len(segments), 2), dtype=np.int64)
        pieces, facts, slot = [spans], [], 0
        most = max(1, min(programs_for(self.device), MAX_PROGRAMS // max(1, len(segments))))
        for k, (form, found) in enumerate(segments.items()):
            if form.ndim == 0 and not form.scaled:
                found = [cut for segment in found for cut in segment.split()]
            ends = np.cumsum([-(-segment.numel // self.block) for segment in found])
            lines = [s.line(form, int(end)) for s, end in zip(found, ends, strict=True)]
            programs = min(most, int(ends[-1]))
            bounds = np.append(0, ends)[np.searchsorted([s.part for s in found], range(parts + 1))]
            # A program's blocks are [p blocks / programs, (p + 1) blocks / programs): the one that holds block b.
            holders = ((np.stack([bounds[:-1], bounds[1:] - 1], axis=1) + 1) * programs - 1) // ends[-1]
            there = bounds[1:] > bounds[:-1]
            spans[there, k] = (slot + np.arange(parts)[:, None] + holders + [0, 1])[there]
            pieces.append(np.array(lines, dtype=np.int64))
            facts.append((int(ends[-1]), form, programs, slot))
            slot += programs + parts - 1
        memory, views, ready = _upload(pieces, self.device)
        launches = [Launch(table, *rest) for table, rest in zip(views[1:], facts, strict=True)]
        return Pass(launches, views[0], slot, memory, ready)

    def _columns(self, wanted: tuple[int, ...]):
        """Form and segment of every column that has something to walk, ascending by part."""
        count = len(self.rows) // self.num_rows
        types = {**_TYPES, torch.float8_e4m3fn: float8_type(self.device)}
        for i in sorted(range(count), key=self.parts.__getitem__) if self.parts else range(count):
            places = [(k, r * count + i) for k, r in enumerate(wanted) if self.rows[r * count + i] is not None]
            tensors = [self.rows[place] for _, place in places]
            if not tensors or tensors[0].numel() == 0:
                continue
            if wanted[0] > 0 and places[0][0] > 0:
                continue  # a pass of one direction against others: nothing to multiply where it is absent
            scales = [None if self.scales is None else self.scales[place] for _, place in places]
            base = self.base is not None and wanted[places[0][0]] == 0
            if base:
                tensors.append(self.base[i])
                scales.append(None)
            sizes, strides = coalesce(tensors)
            dense = len(sizes) == 1 and all(s == [1] for s in strides)
            form = Form(
                ids=tuple(k for k, _ in places),
                dtypes=tuple(types[t.dtype] for t in tensors),
                base=base,
                parts=self.num_parts > 1,
                ndim=0 if dense else len(sizes),
            )
            segment = _Segment(
                numel=tensors[0].numel(),
                part=self.parts[i] if self.parts else 0,
                addresses=[t.data_ptr() for t in tensors],
                widths=[t.element_size() for t in tensors],
                scales=[0 if s is None else s.data_ptr() for s in scales] if form.scaled else [],
                shape=[] if dense else [*sizes, *(n for s in strides for n in s)],
            )
            yield form, segment


@dataclasses.dataclass
class _Segment:
    """A line of a table; ``widths``: bytes per element of every row."""

    numel: int
    part: int
    addresses: list[int]
    widths: list[int]
    scales: list[int]
    shape: list[int]

    def takes(self, other: "_Segment") -> bool:
        """Become longer by a dense segment that starts where this one ends, in every row."""
        n = self.numel
        touches = (
            other.part == self.part
            and all(a + n * w == b for a, w, b in zip(self.addresses, self.widths, other.addresses, strict=True))
            and (not self.scales or n % SCALE_BLOCK == 0)
            and all(not a or a + n // SCALE_BLOCK * 4 == b for a, b in zip(self.scales, other.scales, strict=True))
        )
        if touches:
            self.numel += other.numel
        return touches

    def split(self) -> list["_Segment"]:
        """Cut off a head so that the rest is aligned in every row, where one cut does that for all rows."""
        heads = {(-address % 16) // width for address, width in zip(self.addresses, self.widths, strict=True)}
        head = heads.pop()
        if heads or head == 0 or head >= self.numel:
            return [self]
        rest = [address + head * width for address, width in zip(self.addresses, self.widths, strict=True)]
        return [
            dataclasses.replace(self, numel=head),
            dataclasses.replace(self, numel=self.numel - head, addresses=rest),
        ]

    def line(self, form: Form, blocks: int) -> list[int]:
        aligned = all(address % 16 == 0 for address in self.addresses)
        part = [self.part] if form.parts else []
        return [*self.addresses, self.numel, blocks, int(aligned), *part, *self.scales, *self.shape]


def _upload(pieces: list[np.ndarray], device: torch.device) -> tuple[Tensor, list[Tensor], torch.cuda.Event | None]:
    """The arrays one after the other on the device, each from a 16-byte boundary on, in one copy."""
    starts = np.cumsum([0, *(piece.size + piece.size % 2 for piece in pieces)]).tolist()
    host = torch.zeros(max(2, starts[-1]), dtype=torch.int64, pin_memory=device.type == "cuda")
    for start, piece in zip(starts, pieces, strict=False):
        host[start : start + piece.size] = torch.from_numpy(piece.reshape(-1))
    ready = None
    if device.type == "cuda":
        with torch.cuda.device(device):
            memory = host.to(device, non_blocking=True)
            ready = torch.cuda.current_stream(device).record_event()
    else:
        memory = host
    return memory, [memory[s : s + p.size].view(p.shape) for s, p in zip(starts, pieces, strict=False)], ready


def small(t: Tensor | None, shape: tuple[int, ...], rows: Rows, name: str) -> Tensor | None:
    """A small float64 argument as the kernels read it."""
    if t is not None and (
        t.dtype != torch.float64 or t.device != rows.device or t.shape != shape or not t.is_contiguous()
    ):
        raise RuntimeError(
            f"gradproj: {name} must be a contiguous float64 tensor of shape {shape} on {rows.device}, got "
            f"{tuple(t.shape)}, {t.dtype}, {t.device}"
        )
    return t


def programs_for(device: torch.device) -> int:
    """A grid that fills the device; fixed for a device, so that sums are."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # interpreted


def float8_type(device: torch.device) -> tl.dtype:
    """How kernels load e4m3fn codes: as such where the target converts them, else as bytes."""
    has_type = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return tl.float8e4nv if has_type else tl.uint8


def coalesce(tensors: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of a column with mergeable dimensions merged, outermost first in the first tensor's order."""
    first = tensors[0]
    if all(map(Tensor.is_contiguous, tensors)):
        return [first.numel()], [[1]] * len(tensors)
    order = sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=lambda d: -first.stride(d))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d in order:
        size = first.shape[d]
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, tensors, strict=True)):
            sizes[-1] *= size
            for s, t in zip(strides, tensors, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, tensors, strict=True):
                s.append(t.stride(d))
    return (sizes, strides) if sizes else ([1], [[1]] * len(tensors))
