"""From lists of tensors to tables of addresses that a kernel walks: the host's part.

A column holds one tensor of every row; a segment is a run of elements that every row of it has. Dense neighbours that
touch in memory in every row are one segment, within a part. A dense segment that is off a 16-byte boundary by the same
number of elements in every row is cut into a head and an aligned rest. Columns without a common dense order keep sizes
and strides.
"""

from collections import namedtuple
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from gradproj.kernels import validate
from gradproj.triton_kernels.cache import Fields, keep, upload
from gradproj.triton_kernels.op import Refused, Start, refusing

# Of more than FEW_ROWS rows, a Gram's sums fill the registers: two programs of half the size fit a multiprocessor.
FEW_ROWS, THREADS, THREADS_OF_MANY = 5, 256, 128
BYTES_IN_FLIGHT = 1 << 16  # per multiprocessor, enough for 8 TB/s
MAX_PROGRAMS = 2048  # of an op: their sums, 45 doubles each at most, stay under 768 KiB
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# How a segment begins; its sizes follow, then of every present row the address and the strides.
Segment = namedtuple("Segment", "first_chunk numel aligned")  # aligned: every row starts on a 16-byte boundary
# A program walks the chunks up to the next program's first; all are of one part. ``segment`` holds the first of them.
Program = namedtuple("Program", "first_chunk segment part slot")  # slot: for a Gram's sums
SEGMENT, PROGRAM = Fields(Segment), Fields(Program)


class Instance(NamedTuple):
    """What the kernels that walk rows are compiled for."""

    ndim: int  # dimensions of a segment; 0 if it is dense
    compute: tl.dtype  # of products and coefficients: float64 as soon as a row is, else float32
    threads: int  # of a program
    chunk: int  # elements that a program takes at a time: 16 bytes a thread of the narrowest row


class Launch(NamedTuple):
    """One launch of a kernel: columns with the same rows present, of the same dtypes and as many dimensions."""

    rows: tuple[int, ...]  # those present, ascending; a row's position is its index here
    dtypes: tuple[tl.dtype, ...]  # of these
    instance: Instance
    segments: Tensor  # [S + 1, width] int64, ascending by part; the last only has the number of chunks
    programs: Tensor  # [n + 1, 4] int64

    def start(self, kernel, form: tuple, *arguments) -> Start:
        """A launch of a kernel that takes these tables first and ``form`` last."""
        arguments = self.segments, self.segments.shape[1], self.programs, *arguments, *form
        return Start(kernel, form, len(self.programs) - 1, arguments, max(1, self.instance.threads // 32))


class Table(NamedTuple):
    """What one op walks; see :func:`cache.keep`."""

    num_rows: int
    lead: tuple[int, ...]  # leading dimensions of Gram and weights: (num_parts,), or () where all columns are one part
    launches: list[Launch]
    bounds: Tensor  # [P + 1] int64: part p has the slots bounds[p] .. bounds[p + 1] of all launches
    slots: int
    memory: Tensor
    ready: torch.cuda.Event | None

    @staticmethod
    def to_write(grads, directions, part, num_parts: int) -> "Table":
        """For an op that writes ``grads``."""
        if not grads or len(directions) % len(grads):
            raise Refused("gradproj: rows of different length")
        return Table.of([*grads, *directions], 1 + len(directions) // len(grads), part, num_parts, written=True)

    @staticmethod
    def of(rows: list[Tensor | None], num_rows: int, part: Sequence[int], num_parts: int, written: bool) -> "Table":
        """For an op with these buffers, as ``gradproj.kernels.ops`` describes them, which writes row 0 if ``written``.
        Raises :class:`Refused`."""
        threads = THREADS if num_rows <= FEW_ROWS else THREADS_OF_MANY
        present = [t for t in rows if t is not None]
        if not present:
            raise Refused("gradproj: no tensor among the buffers")
        absent = tuple(i for i, t in enumerate(rows) if t is None) if len(present) < len(rows) else ()
        device = present[0].device
        key = (device, num_rows, num_parts, tuple(part), written, threads, absent, validate.signature(present))
        return keep(key, device, lambda: _build(device, rows, num_rows, part, num_parts, written, threads))


def check_small(t: Tensor | None, shape: tuple[int, ...], table: Table, name: str) -> None:
    """Refuses a float64 argument, ``shape`` in every part, that the kernels would misread."""
    wanted = torch.float64, table.memory.device, (*table.lead, *shape)
    if t is not None and ((t.dtype, t.device, tuple(t.shape)) != wanted or not t.is_contiguous()):
        raise Refused(
            f"gradproj: {name} must be a contiguous float64 tensor of shape {wanted[2]} on {wanted[1]}, got "
            f"{tuple(t.shape)}, {t.dtype}, {t.device}"
        )


def _build(device, rows, num_rows: int, part: Sequence[int], num_parts: int, written: bool, threads: int) -> Table:
    refusing(_check, rows, num_rows, part, num_parts, written)
    found = _columns(rows, num_rows, part)
    most = 4  # interpreted
    if device.type == "cuda":  # so many that their loads, 16 bytes a thread and row, keep BYTES_IN_FLIGHT
        each = min(8, max(2, BYTES_IN_FLIGHT // (16 * threads * num_rows))) if num_rows <= FEW_ROWS else 2
        most = each * torch.cuda.get_device_properties(device).multi_processor_count
    most = max(1, min(most, MAX_PROGRAMS // max(1, len(found))))
    facts, segments, programs = [], [], []
    for (present, dtypes, ndim), columns in found.items():
        widths = np.array([d.itemsize for d in dtypes])
        compute = tl.float64 if torch.float64 in dtypes else tl.float32
        instance = Instance(ndim, compute, threads, threads * 16 // int(widths.min()))
        facts.append((present, tuple(DTYPES[d] for d in dtypes), instance))
        part, own = _segments(np.array(columns, dtype=np.int64), instance, widths)
        segments.append(own)
        programs.append(_programs(part, own[:, 0], most, max(1, num_parts)))
    bounds = _number_slots(programs, max(1, num_parts))
    memory, (on_device, *views), ready = upload([bounds, *segments, *map(np.column_stack, programs)], device)
    launches = [Launch(*f, *v) for f, *v in zip(facts, views[: len(facts)], views[len(facts) :], strict=True)]
    lead = (num_parts,) if num_parts else ()
    return Table(num_rows, lead, launches, on_device, int(bounds[-1]), memory, ready)


def _check(rows, num_rows: int, part: Sequence[int], num_parts: int, written: bool) -> None:
    count = len(rows) // num_rows
    if len(rows) != count * num_rows:
        raise ValueError("gradproj: rows of different length")
    if bool(num_parts) != bool(part) or len(part) not in (0, count):
        raise ValueError("gradproj: parts: one number per buffer, and num_parts")
    if any(not 0 <= number < num_parts for number in part):
        raise ValueError("gradproj: parts: a number is not below the number of parts")
    lists = [rows[r * count : (r + 1) * count] for r in range(num_rows)]
    validate.check("gradproj", lists, [f"row {r}: buffer" for r in range(num_rows)], range(count), written, "triton")
    devices = {t.device for t in rows if t is not None}
    if len(devices) > 1:
        raise ValueError(f"gradproj: buffers on {len(devices)} devices")


def _columns(rows, num_rows: int, part: Sequence[int]) -> dict[tuple, list[list[int]]]:
    """Columns grouped by the rows present, their dtypes and dimensions (0 if dense), ascending by part, without empty
    ones. A column is listed as its part and numel, then what follows a :class:`Segment`."""
    found: dict[tuple, list[list[int]]] = {}
    count = len(rows) // num_rows
    part = part or [0] * count
    for i in sorted(range(count), key=part.__getitem__):
        column = {r: t for r, t in enumerate(rows[i::count]) if t is not None}
        tensors = list(column.values())
        if not tensors or not tensors[0].numel():
            continue
        sizes, strides = validate.coalesce(tensors)
        if len(sizes) == 1 and all(s == [1] for s in strides):
            sizes, strides = [], [[]] * len(tensors)
        rows_at = [n for t, s in zip(tensors, strides, strict=True) for n in (t.data_ptr(), *s)]
        key = tuple(column), tuple(t.dtype for t in tensors), len(sizes)
        found.setdefault(key, []).append([part[i], tensors[0].numel(), *sizes, *rows_at])
    return found


def _segments(columns: np.ndarray, instance: Instance, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of every segment, and the segments as a launch has them."""
    part, numel, rest = columns[:, 0], columns[:, 1], columns[:, 2:]
    if instance.ndim == 0:
        part, numel, rest = _merge_and_cut(part, numel, rest, widths)
    aligned = (rest[:, instance.ndim :: 1 + instance.ndim] % 16 == 0).all(axis=1)
    segments = np.zeros((len(part) + 1, len(SEGMENT) + rest.shape[1]), dtype=np.int64)
    segments[1:, 0] = np.cumsum(-(-numel // instance.chunk))
    segments[:-1, 1:] = np.column_stack([numel, aligned, rest])
    return part, segments


def _merge_and_cut(part: np.ndarray, numel: np.ndarray, address: np.ndarray, widths: np.ndarray) -> tuple:
    """Neighbours become one segment, and an unaligned head one of its own, as described above."""
    touches = (address[:-1] + numel[:-1, None] * widths == address[1:]).all(axis=1) & (part[:-1] == part[1:])
    first = np.flatnonzero(np.append(True, ~touches))
    part, numel, address = part[first], np.add.reduceat(numel, first), address[first]

    heads = -address % 16 // widths
    cut = (heads == heads[:, :1]).all(axis=1) & (heads[:, 0] < numel)
    head = np.where(cut, heads[:, 0], 0)
    both = np.stack([head, numel - head], axis=1)  # a head of 0 elements is none
    addresses = np.stack([address, address + head[:, None] * widths], axis=1)
    return np.repeat(part, 2)[both.ravel() > 0], both[both > 0], addresses[both > 0]


def _programs(part: np.ndarray, starts: np.ndarray, most: int, num_parts: int) -> Program:
    """About ``most`` programs and an end, an array for each field. All take equally many chunks, except the last of a
    part."""
    each = -(-starts[-1] // most)
    of_part = starts[np.searchsorted(part, np.arange(num_parts + 1))]
    first = np.concatenate([*(np.arange(a, b, each) for a, b in pairwise(of_part)), starts[-1:]])
    segment = np.searchsorted(starts, first, side="right") - 1
    return Program(first, segment, np.append(part, 0)[segment], np.zeros_like(first))


def _number_slots(programs: list[Program], num_parts: int) -> np.ndarray:
    """Numbers the slots of all programs so that those of a part are neighbours. Returns each part's first slot, and the
    end."""
    part = np.concatenate([np.zeros(0, dtype=np.int64), *(p.part[:-1] for p in programs)])
    slots = np.argsort(np.argsort(part, kind="stable"))
    for p in programs:
        count = len(p.slot) - 1
        p.slot[:-1], slots = slots[:count], slots[count:]
    return np.searchsorted(np.sort(part), np.arange(num_parts + 1))
