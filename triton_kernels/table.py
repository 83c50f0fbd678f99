"""From lists of tensors to tables of addresses that a kernel walks: the host's part, in Python.

A column holds one tensor of every row; a segment is a run of elements that every row of it has. Dense neighbours that
touch in memory in every row are one segment, within a part. A dense segment that is off a 16-byte boundary by the same
number of elements in every row is cut into a head and an aligned rest. Columns without a common dense order keep sizes
and strides.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from gradproj.kernels import validate
from gradproj.triton_kernels.cache import keep, upload
from gradproj.triton_kernels.op import Refused, refusing

# Of more rows, a Gram's sums take so many registers that only two programs of half the size fit a multiprocessor.
FEW_ROWS = 5
IN_FLIGHT = 1 << 16  # bytes per multiprocessor, enough for 8 TB/s
MAX_PROGRAMS = 2048  # of an op: their sums, 45 doubles each at most, stay under 768 KiB
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Instance(NamedTuple):
    """What the kernels that walk rows are compiled for.

    Attributes:
        ndim: dimensions of a segment; 0 if it is dense.
        compute: type of products and coefficients: float64 as soon as a row is, else float32.
        threads: of a program.
        chunk: elements that a program takes at a time: 16 bytes a thread of the narrowest row.
    """

    ndim: int
    compute: tl.dtype
    threads: int
    chunk: int


class Launch(NamedTuple):
    """One launch of a kernel: columns with the same rows in them, of the same dtypes and as many dimensions.

    Attributes:
        rows: which are there, ascending; the position of a row is its index here.
        dtypes: triton types of those.
        segments: [S + 1, width] int64, ascending by part: first chunk, numel, whether every row starts on a 16-byte
            boundary, ``ndim`` sizes, and of every row the address and ``ndim`` strides. The last entry has the number
            of chunks only.
        programs: [n + 1, 4] int64: first chunk, the segment that holds it, the part, and the slot for a Gram's sums.
            All chunks of a program, up to the next one's first, are of one part.
    """

    rows: tuple[int, ...]
    dtypes: tuple[tl.dtype, ...]
    instance: Instance
    segments: Tensor
    programs: Tensor

    @property
    def grid(self) -> int:
        return len(self.programs) - 1

    @property
    def warps(self) -> int:
        return max(1, self.instance.threads // 32)

    @property
    def arguments(self) -> tuple:
        """What the kernels take first."""
        return self.segments, self.segments.shape[1], self.programs

    def dtype(self, row: int) -> tl.dtype | None:
        return self.dtypes[self.rows.index(row)] if row in self.rows else None

    def position(self, row: int) -> int:
        """Index of the first present row >= ``row``."""
        return sum(r < row for r in self.rows)


class Table(NamedTuple):
    """What one op walks.

    Attributes:
        num_parts: 0 if all columns are one part, and results have no leading dimension.
        bounds: [parts + 1] int64: the slots of part p, of all launches, are bounds[p] .. bounds[p + 1].
        slots: how many there are.
        memory: what all tensors here are views of, on the device.
        ready: event recorded after its upload; None on the CPU.
    """

    num_rows: int
    num_parts: int
    device: torch.device
    launches: list[Launch]
    bounds: Tensor
    slots: int
    memory: Tensor
    ready: torch.cuda.Event | None

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of Gram and weights."""
        return (self.num_parts,) if self.num_parts else ()

    @staticmethod
    def to_write(grads, directions, parts, num_parts: int) -> "Table":
        """Of an op that writes ``grads``."""
        if not grads or len(directions) % len(grads):
            raise Refused("gradproj: rows of different length")
        return Table.of([*grads, *directions], 1 + len(directions) // len(grads), parts, num_parts, written=True)

    @staticmethod
    def of(
        rows: list[Tensor | None],
        num_rows: int,
        parts: Sequence[int],
        num_parts: int,
        written: bool,
        threads: int | None = None,
    ) -> "Table":
        """The table of one op's buffers; see ``gradproj.kernels.ops``. On the device when the current stream comes to
        use it.

        Args:
            written: whether row 0 will be.
            threads: of a program; tests take few. None: 256, or 128 for more than ``FEW_ROWS``.
        Raises:
            Refused: what the kernels do not take, saying what and where.
        """
        threads = threads or (256 if num_rows <= FEW_ROWS else 128)
        present = [t for t in rows if t is not None]
        if not present:
            raise Refused("gradproj: no tensor among the buffers")
        absent = tuple(i for i, t in enumerate(rows) if t is None) if len(present) < len(rows) else ()
        device = present[0].device
        key = (device, num_rows, num_parts, tuple(parts), written, threads, absent, validate.signature(present))
        return keep(key, device, lambda: _build(rows, num_rows, parts, num_parts, written, threads))


def check_small(t: Tensor | None, shape: tuple[int, ...], table: Table, name: str) -> None:
    """Refuse what the kernels would misread: ``t`` is a small float64 argument, ``shape`` that of one part's."""
    shape = (*table.lead, *shape)
    if t is not None and (
        t.dtype != torch.float64 or t.device != table.device or t.shape != shape or not t.is_contiguous()
    ):
        raise Refused(
            f"gradproj: {name} must be a contiguous float64 tensor of shape {shape} on {table.device}, got "
            f"{tuple(t.shape)}, {t.dtype}, {t.device}"
        )


def _programs_for(device: torch.device, num_rows: int, threads: int) -> int:
    """Programs whose loads, 16 bytes a thread and row, keep ``IN_FLIGHT`` bytes of a multiprocessor on their way; a
    number of its own for a device, so that sums are in the same order."""
    if device.type == "cpu":
        return 4  # interpreted
    each = min(8, max(2, IN_FLIGHT // (16 * threads * num_rows))) if num_rows <= FEW_ROWS else 2
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def _build(rows, num_rows: int, parts: Sequence[int], num_parts: int, written: bool, threads: int) -> Table:
    with refusing():
        device = _check(rows, num_rows, parts, num_parts, written)
    found = _columns(rows, num_rows, parts)
    most = max(1, min(_programs_for(device, num_rows, threads), MAX_PROGRAMS // max(1, len(found))))
    facts, segments, programs = [], [], []
    for (present, torch_dtypes, ndim), columns in found.items():
        widths = np.array([d.itemsize for d in torch_dtypes])
        compute = tl.float64 if torch.float64 in torch_dtypes else tl.float32
        instance = Instance(ndim, compute, threads, threads * 16 // int(widths.min()))
        facts.append((present, tuple(_TYPES[d] for d in torch_dtypes), instance))
        part, own = _segments(np.array(columns, dtype=np.int64), instance, widths)
        segments.append(own)
        programs.append(_programs(part, own, most, max(1, num_parts)))
    bounds = _number_slots(programs, max(1, num_parts))
    memory, views, ready = upload([bounds, *segments, *programs], device)
    launches = [Launch(*f, *v) for f, *v in zip(facts, views[1 : 1 + len(facts)], views[1 + len(facts) :], strict=True)]
    return Table(num_rows, num_parts, device, launches, views[0], int(bounds[-1]), memory, ready)


def _check(rows, num_rows: int, parts: Sequence[int], num_parts: int, written: bool) -> torch.device:
    """The device of all buffers."""
    count = len(rows) // num_rows
    if len(rows) != count * num_rows:
        raise ValueError("gradproj: rows of different length")
    if bool(num_parts) != bool(parts) or len(parts) not in (0, count):
        raise ValueError("gradproj: parts: one number per buffer, and num_parts")
    if any(not 0 <= part < num_parts for part in parts):
        raise ValueError("gradproj: parts: a number is not below the number of parts")
    lists = [rows[r * count : (r + 1) * count] for r in range(num_rows)]
    validate.check("gradproj", lists, [f"row {r}: buffer" for r in range(num_rows)], range(count), written, "triton")
    devices = {t.device for t in rows if t is not None}
    if len(devices) > 1:
        raise ValueError(f"gradproj: buffers on {len(devices)} devices")
    return devices.pop()


def _columns(rows, num_rows: int, parts: Sequence[int]) -> dict[tuple, list[list[int]]]:
    """By rows that are there, their dtypes and dimensions (0 if dense): of every column the part, then what a segment
    has from its numel on. Ascending by part, without columns that are empty."""
    found: dict[tuple, list[list[int]]] = {}
    count = len(rows) // num_rows
    for i in sorted(range(count), key=parts.__getitem__) if parts else range(count):
        column = {r: t for r, t in enumerate(rows[i::count]) if t is not None}
        tensors = list(column.values())
        if not tensors or not tensors[0].numel():
            continue
        sizes, strides = validate.coalesce(tensors)
        dense = len(sizes) == 1 and all(s == [1] for s in strides)
        if dense:
            sizes, strides = [], [[]] * len(tensors)
        entry = [parts[i] if parts else 0, tensors[0].numel(), 0, *sizes]
        for t, s in zip(tensors, strides, strict=True):
            entry += [t.data_ptr(), *s]
        found.setdefault((tuple(column), tuple(t.dtype for t in tensors), len(sizes)), []).append(entry)
    return found


def _segments(columns: np.ndarray, instance: Instance, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Part of every segment, and the segments as a launch has them."""
    if instance.ndim == 0:
        columns = _cut(_merge(columns, widths), widths)
    part, segments = columns[:, 0].copy(), np.append(columns, np.zeros_like(columns[:1]), axis=0)
    segments[0, 0], segments[1:, 0] = 0, np.cumsum(-(-columns[:, 1] // instance.chunk))
    segments[:-1, 2] = (columns[:, 3 + instance.ndim :: 1 + instance.ndim] % 16 == 0).all(axis=1)
    return part, segments


def _merge(columns: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Neighbours that touch in memory in every row, within a part, become one."""
    part, numel, address = columns[:, 0], columns[:, 1], columns[:, 3:]
    touches = (address[:-1] + numel[:-1, None] * widths == address[1:]).all(axis=1) & (part[:-1] == part[1:])
    first = np.flatnonzero(np.append(True, ~touches))
    merged = columns[first]
    merged[:, 1] = np.add.reduceat(numel, first)
    return merged


def _cut(columns: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """A head is cut off so that the rest is aligned in every row, where one cut does that for all rows."""
    heads = -columns[:, 3:] % 16 // widths
    head = heads[:, 0]
    cut = (heads == head[:, None]).all(axis=1) & (head > 0) & (head < columns[:, 1])
    of = np.repeat(np.arange(len(columns)), 1 + cut)
    rest = np.append(False, of[1:] == of[:-1])
    result, head = columns[of], np.where(cut, head, columns[:, 1])[of]
    result[:, 1] = np.where(rest, result[:, 1] - head, head)
    result[:, 3:] += np.where(rest, head, 0)[:, None] * widths
    return result


def _programs(part: np.ndarray, segments: np.ndarray, most: int, num_parts: int) -> np.ndarray:
    """Programs with as many chunks each, but for the last one of a part; about ``most``."""
    starts = segments[:, 0]
    each = -(-starts[-1] // most)
    of_part = starts[np.searchsorted(part, np.arange(num_parts + 1))]
    first = np.concatenate([np.arange(a, b, each) for a, b in pairwise(of_part)])
    programs = np.zeros((len(first) + 1, 4), dtype=np.int64)
    programs[:, 0] = np.append(first, starts[-1])
    programs[:, 1] = np.searchsorted(starts, programs[:, 0], side="right") - 1
    programs[:-1, 2] = part[programs[:-1, 1]]
    return programs


def _number_slots(programs: list[np.ndarray], num_parts: int) -> np.ndarray:
    """Numbers the slots of all programs so that those of a part are neighbours; where each part's begin, and the
    end."""
    part = np.concatenate([np.zeros(0, dtype=np.int64), *(p[:-1, 2] for p in programs)])
    slots = np.argsort(np.argsort(part, kind="stable"))
    for p in programs:
        p[:-1, 3], slots = slots[: len(p) - 1], slots[len(p) - 1 :]
    return np.searchsorted(np.sort(part), np.arange(num_parts + 1))
