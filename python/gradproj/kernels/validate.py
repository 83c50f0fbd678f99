"""Everything that a call refuses, and the error that names it.

The native ops check the same things fast; when one refuses, this finds the precise error. The other backends call it
first. Nothing here reads or writes a buffer's contents.
"""

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_DIMS = {"cuda": 8, "triton": 8}  # what the kernels for strided buffers take, after merging
MAX_ROWS = {"cuda": 65}
_META = torch.device("meta")  # its tensors have no addresses
CHECKED = 1 << 13  # pin_ remembers the newest calls that passed its checks, up to this many tensors

Row = Sequence[Tensor | None]


def _check_buffer(op: str, name: str, t: Any) -> None:
    """Refuse what no kernel takes: not a tensor, not strided, not of a floating dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; pass a tensor or None")
    if t.layout != torch.strided:
        raise NotImplementedError(f"{op}: {name} has layout {t.layout}; make it dense first (t.to_dense())")
    if t.dtype not in FLOATS:
        supported = ", ".join(map(str, FLOATS))
        what = f"(shape {tuple(t.shape)}, {t.dtype}, {t.device})"
        raise TypeError(f"{op}: {name} has dtype {t.dtype} {what}; supported: {supported}, complex")


def check(
    op: str, rows: Sequence[Row], names: Sequence[str], indices: Sequence[int], written: bool, backend: str = ""
) -> None:
    """Raise the first error of ``rows``, naming row, index, shape, dtype or device; or return.

    Args:
        rows: lists of the same length; None allowed, in row 0 too if not ``written``.
        names, indices: what the user calls each row and each column.
        written: row 0 is modified, so it may overlap neither itself nor, in part, another row.
        backend: the one that will run; it may have limits of its own.
    """
    if len(rows) > MAX_ROWS.get(backend, len(rows)):
        raise ValueError(f"{op}: {len(rows) - 1} directions; backend {backend!r} takes up to {MAX_ROWS[backend] - 1}")
    for i, column in zip(indices, zip(*rows, strict=True), strict=True):
        tensors: list[Tensor] = []
        for row, t in zip(names, column, strict=True):
            if t is None:
                continue
            name = f"{row}[{i}]"
            _check_buffer(op, name, t)
            if not tensors:
                first, first_name = t, name
            elif t.shape != first.shape:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(t.shape)} but {first_name} has shape {tuple(first.shape)}; pass "
                    f"gradients of the same parameters in the same order"
                )
            elif t.device != first.device:
                raise ValueError(
                    f"{op}: {name} is on {t.device} but {first_name} is on {first.device}; move it there first"
                )
            tensors.append(t)
        most = MAX_DIMS.get(backend)
        if most and tensors and first.dim() > most and (dims := len(coalesce(tensors)[0])) > most:
            raise NotImplementedError(
                f"{op}: {first_name} (shape {tuple(first.shape)}, {first.dtype}, {first.device}) needs {dims} "
                f"dimensions after merging; backend {backend!r} takes {most}: make it contiguous"
            )
    if written:
        _check_overlap(op, rows, names, indices)


def _check_overlap(op: str, rows: Sequence[Row], names: Sequence[str], indices: Sequence[int]) -> None:
    """Row 0 is written: it may not overlap itself, nor share memory with anything but an equal view in its column."""
    entries = [
        (f"{name}[{i}]", i, t)
        for name, row in zip(names, rows, strict=True)
        for i, t in zip(indices, row, strict=True)
        if t is not None
    ]
    written = sum(t is not None for t in rows[0])
    for name, _, t in entries[:written]:
        if overlaps_itself(t):
            raise ValueError(
                f"{op}: {name} with shape {tuple(t.shape)} and strides {t.stride()} overlaps itself, so it cannot be "
                f"written; pass a contiguous tensor"
            )
    for at, other_at in _overlaps([t for *_, t in entries], written):
        (name, i, t), (other_name, j, other) = entries[at], entries[other_at]
        if i != j or t.data_ptr() != other.data_ptr() or t.stride() != other.stride() or t.dtype != other.dtype:
            raise ValueError(
                f"{op}: {name} and {other_name} share memory, and one of them is written; clone one of them"
            )


def coalesce(tensors: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of a column with mergeable dimensions merged, outermost first in the first tensor's order."""
    first = tensors[0]
    if all(map(Tensor.is_contiguous, tensors)):
        return [first.numel()], [[1]] * len(tensors)
    merged: list[tuple[int, list[int]]] = []  # size, and every tensor's stride
    for d in sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=first.stride, reverse=True):
        size, strides = first.shape[d], [t.stride(d) for t in tensors]
        if merged and merged[-1][1] == [stride * size for stride in strides]:
            size *= merged.pop()[0]
        merged.append((size, strides))
    return [size for size, _ in merged], [list(of_one) for of_one in zip(*(s for _, s in merged), strict=True)]


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the byte past the last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _addresses(t: Tensor) -> np.ndarray:
    """A numpy array at the tensor's addresses, so that numpy can reason about them; nothing is dereferenced."""
    size, data = t.element_size(), (t.data_ptr(), True)
    strides = tuple(stride * size for stride in t.stride())
    interface = {"version": 3, "data": data, "shape": tuple(t.shape), "strides": strides, "typestr": f"|V{size}"}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory. Strides that do not nest count as overlapping."""
    if t.is_contiguous():
        return False
    extent = 1
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
        if stride < extent:
            return t.numel() > 0
        extent += stride * (size - 1)
    return False


def _overlaps(tensors: Sequence[Tensor], written: int) -> Iterator[tuple[int, int]]:
    """Positions of two tensors that share memory, ascending; the first is among the first ``written``."""
    spans = sorted((*_span(t), k) for k, t in enumerate(tensors) if t.numel())
    for at, (_, stop, k) in enumerate(spans):
        for start, _, other in islice(spans, at + 1, None):
            if start >= stop:
                break
            one, two = sorted((k, other))
            a, b = tensors[one], tensors[two]
            if one < written and a.device == b.device != _META and np.shares_memory(_addresses(a), _addresses(b)):
                yield one, two


def signature(tensors: Sequence[Tensor]) -> tuple:
    """What checks and tables depend on, of tensors on one device: addresses, shapes, strides and dtypes. It holds no
    tensor; another tensor with the same signature can take the place of the first."""
    return (
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(attrgetter("shape"), tensors)),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(attrgetter("dtype"), tensors)),
    )


def pin_signature(
    weights: Sequence[Tensor], bases: Sequence[Tensor], targets: Row, biases: Sequence[Tensor], biased: Sequence[int]
) -> tuple:
    """:func:`signature` of the arguments of the op ``pin_``."""
    present = [t for t in targets if t is not None]
    absent = () if len(present) == len(targets) else tuple(k for k, t in enumerate(targets) if t is None)
    counts = len(weights), len(bases), len(targets)
    return weights[0].device, counts, absent, tuple(biased), signature([*weights, *bases, *present, *biases])


_checked: dict[tuple, int] = {}  # signature -> number of tensors, the newest last
_checked_lock = threading.Lock()


def check_pin_once(weights: Sequence[Tensor], bases: Sequence[Tensor], targets: Row, biases: Row) -> None:
    """:func:`check_pin`, unless tensors with the same signature have passed it before. Traced ones have none."""
    if torch.compiler.is_compiling():
        return check_pin(weights, bases, targets, biases)
    biased = [k for k, t in enumerate(biases) if t is not None]
    try:
        key = pin_signature(weights, bases, targets, [biases[k] for k in biased], biased)  # type: ignore[misc]
    except (AttributeError, IndexError, TypeError, RuntimeError):  # no weights, no tensor, or one without an address
        key = None
    if key in _checked:
        return
    check_pin(weights, bases, targets, biases)
    if key is not None:
        with _checked_lock:
            _checked[key] = 2 * len(weights) + len(targets) + len(biased)
            while len(_checked) > 1 and sum(_checked.values()) > CHECKED:
                del _checked[next(iter(_checked))]


def check_pin(weights: Sequence[Tensor], bases: Sequence[Tensor], targets: Row, biases: Row) -> None:
    """Raise the first error of the arguments of ``pin_``, or return."""
    lists: dict[str, Row] = {"weights": weights, "biases": biases, "bases": bases, "targets": targets}
    for name, row in lists.items():
        if len(row) != len(weights):
            raise ValueError(f"pin_: {name} has {len(row)} entries but weights has {len(weights)}; pass one for each")
    for k, (w, u, b, c) in enumerate(zip(weights, bases, targets, biases, strict=True)):
        for name, t in (("weights", w), ("bases", u), ("targets", b), ("biases", c)):
            if t is None and name in ("targets", "biases"):
                continue
            _check_buffer("pin_", f"{name}[{k}]", t)
            assert isinstance(t, Tensor)
            if t.device != w.device:
                raise ValueError(f"pin_: {name}[{k}] is on {t.device} but weights[{k}] is on {w.device}; move it there")
        if w.dim() != 2:
            raise ValueError(f"pin_: weights[{k}] has shape {tuple(w.shape)}; pass a matrix, [outputs, inputs]")
        outputs, inputs = w.shape[0], w.shape[1] + (c is not None)
        pair = u.dim() == 3
        if pair and not u.dtype == w.dtype == torch.bfloat16:
            raise TypeError(
                f"pin_: bases[{k}] has shape {tuple(u.shape)} and dtype {u.dtype}, a pair of high and low parts; those "
                f"are bfloat16 and for bfloat16 weights, but weights[{k}] is {w.dtype}: pass the float32 basis "
                f"[{inputs}, rank]"
            )
        if not (u.dim() == 2 or pair and u.shape[0] == 2) or u.shape[-2] != inputs:
            with_bias = ", its bias counted as an input" if c is not None else ""
            raise ValueError(
                f"pin_: bases[{k}] has shape {tuple(u.shape)} but weights[{k}] has shape {tuple(w.shape)}{with_bias}: "
                f"pass [{inputs}, rank]"
            )
        if b is not None and b.shape != (outputs, u.shape[-1]):
            wanted = f"weights[{k}] and bases[{k}] want {(outputs, u.shape[-1])}"
            raise ValueError(f"pin_: targets[{k}] has shape {tuple(b.shape)}; {wanted}")
        if c is not None and c.shape != (outputs,):
            raise ValueError(f"pin_: biases[{k}] has shape {tuple(c.shape)}; weights[{k}] wants ({outputs},)")
        for name, t in (("weights", w), ("biases", c)):
            if t is not None and overlaps_itself(t):
                raise ValueError(
                    f"pin_: {name}[{k}] overlaps itself, so it cannot be written; pass a contiguous tensor"
                )
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return
    entries = [(name, k, t) for name, row in lists.items() for k, t in enumerate(row) if t is not None]
    written = len(weights) + sum(t is not None for t in biases)
    for at, other_at in _overlaps([t for *_, t in entries], written):
        (name, k, _), (other, j, _) = entries[at], entries[other_at]
        advice = "pass each once" if other_at < written else f"clone {other}[{j}]"
        raise ValueError(f"pin_: {name}[{k}] is written and shares memory with {other}[{j}]; {advice}")
