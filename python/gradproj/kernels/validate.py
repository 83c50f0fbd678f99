"""What a projection refuses, exactly and in words.

The native ops check the same things fast; when one refuses, this finds the precise error. The other backends call it
first. Nothing here reads or writes a buffer's contents.
"""

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_DIMS = {"cuda": 8, "triton": 8}  # what the kernels for strided buffers take, after merging
MAX_ROWS = {"cuda": 65}
CHECKED = 1 << 13  # tensors in the newest calls of pin_ that were found good


def _name(where: Sequence[str], row: int, index: int) -> str:
    return f"{where[row]}[{index}]"


def _what(t: Tensor) -> str:
    return f"(shape {tuple(t.shape)}, {t.dtype}, {t.device})"


def check_buffer(op: str, name: str, t: Tensor) -> None:
    """Refuse what no kernel takes: not a tensor, not strided, not of a floating dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; pass a tensor or None")
    if t.layout != torch.strided:
        raise NotImplementedError(f"{op}: {name} has layout {t.layout}; make it dense first (t.to_dense())")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} has dtype {t.dtype} {_what(t)}; supported: {', '.join(str(d) for d in FLOATS)}, complex"
        )


def check(
    op: str,
    rows: Sequence[Sequence[Tensor | None]],
    names: Sequence[str],
    indices: Sequence[int],
    written: bool,
    backend: str = "",
):
    """Raise the first error of ``rows``, or return.

    Args:
        op: the public function's name, for the message.
        rows: lists of the same length; None allowed, in row 0 too if not ``written``.
        names: how the user knows each row.
        indices: the user's index of each column.
        written: row 0 is modified, so it may overlap neither itself nor, in part, another row.
        backend: which one would run, for limits of its own.
    Raises:
        ValueError, TypeError, NotImplementedError: naming row, index, shape, dtype or device.
    """
    if len(rows) > MAX_ROWS.get(backend, len(rows)):
        raise ValueError(f"{op}: {len(rows) - 1} directions; backend {backend!r} takes up to {MAX_ROWS[backend] - 1}")
    for i, column in zip(indices, zip(*rows, strict=True), strict=True):
        first = None
        for row, t in enumerate(column):
            if t is None:
                continue
            check_buffer(op, _name(names, row, i), t)
            if first is None:
                first = row, t
                continue
            other, like = first
            if t.shape != like.shape:
                raise ValueError(
                    f"{op}: {_name(names, row, i)} has shape {tuple(t.shape)} but {_name(names, other, i)} has shape "
                    f"{tuple(like.shape)}; pass gradients of the same parameters in the same order"
                )
            if t.device != like.device:
                raise ValueError(
                    f"{op}: {_name(names, row, i)} is on {t.device} but {_name(names, other, i)} is on {like.device}; "
                    f"move it there first"
                )
        if first is not None and first[1].dim() > MAX_DIMS.get(backend, first[1].dim()):
            dims = len(coalesce([t for t in column if t is not None])[0])
            if dims > MAX_DIMS[backend]:
                raise NotImplementedError(
                    f"{op}: {_name(names, first[0], i)} {_what(first[1])} needs {dims} dimensions after merging; backend "
                    f"{backend!r} takes {MAX_DIMS[backend]}: make it contiguous"
                )
    if written:
        _check_overlap(op, rows, names, indices)


def coalesce(tensors: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of a column with mergeable dimensions merged, outermost first in the first tensor's order."""
    first = tensors[0]
    if all(map(Tensor.is_contiguous, tensors)):
        return [first.numel()], [[1]] * len(tensors)
    order = sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=first.stride, reverse=True)
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


def _span(t: Tensor) -> tuple[int, int]:
    """First and past-the-last byte."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.numel() * t.element_size()
    return start, start + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


class _Addresses:
    """A tensor's addresses in numpy's array interface, so that numpy can reason about them; nothing is dereferenced."""

    def __init__(self, t: Tensor):
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (t.data_ptr(), True),
            "shape": tuple(t.shape),
            "strides": tuple(s * size for s in t.stride()),
            "typestr": f"|V{size}",
        }


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Exactly, for any strides. Addresses of different devices are different; a meta tensor has none."""
    if a.device != b.device or a.device.type == "meta" or not a.numel() or not b.numel():
        return False
    return np.shares_memory(np.asarray(_Addresses(a)), np.asarray(_Addresses(b)))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory. Strides that do not nest count as overlapping."""
    if t.is_contiguous():
        return False
    extent = 1
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
        if stride < extent:
            return prod(t.shape) > 0
        extent += stride * (size - 1)
    return False


def _near(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs of positions whose spans of memory meet, in the order of addresses."""
    spans = sorted((*_span(t), k) for k, t in enumerate(tensors) if t.numel())
    for at, (_, stop, k) in enumerate(spans):
        for start, _, other in islice(spans, at + 1, None):
            if start >= stop:
                break
            yield k, other


def _check_overlap(op, rows, names, indices) -> None:
    entries = [
        (row, i, t) for row, tensors in enumerate(rows) for i, t in zip(indices, tensors, strict=True) if t is not None
    ]
    for row, i, t in entries:
        if row == 0 and overlaps_itself(t):
            raise ValueError(
                f"{op}: {_name(names, 0, i)} with shape {tuple(t.shape)} and strides {t.stride()} overlaps itself, so it "
                f"cannot be written; pass a contiguous tensor"
            )
    for one, two in _near([t for _, _, t in entries]):
        (row, i, t), (other_row, j, other) = entries[one], entries[two]
        if row and other_row:
            continue
        same = i == j and t.data_ptr() == other.data_ptr() and t.stride() == other.stride() and t.dtype == other.dtype
        if (same and row != other_row) or not shares_memory(t, other):
            continue
        a, b = _name(names, row, i), _name(names, other_row, j)
        raise ValueError(f"{op}: {a} and {b} share memory, and one of them is written; clone one of them")


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
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    biases: Sequence[Tensor],
    biased: Sequence[int],
) -> tuple:
    """:func:`signature` of the arguments of the op ``pin_``."""
    present = [t for t in targets if t is not None]
    absent = () if len(present) == len(targets) else tuple(k for k, t in enumerate(targets) if t is None)
    counts = len(weights), len(bases), len(targets)
    return weights[0].device, counts, absent, tuple(biased), signature([*weights, *bases, *present, *biases])


_checked: dict[tuple, int] = {}  # signature -> number of tensors, the newest last
_checked_lock = threading.Lock()


def check_pin_once(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> None:
    """:func:`check_pin`, unless tensors with the same signature have been found good before."""
    biased = [k for k, t in enumerate(biases) if t is not None]
    try:
        key = pin_signature(weights, bases, targets, [biases[k] for k in biased], biased)  # type: ignore[misc]
        if key in _checked:
            return
    except (AttributeError, IndexError, TypeError, RuntimeError):  # no weights, no tensor, or one without an address
        key = None
    check_pin(weights, bases, targets, biases)
    if key is None:
        return
    with _checked_lock:
        _checked[key] = 2 * len(weights) + len(targets) + len(biased)
        while len(_checked) > 1 and sum(_checked.values()) > CHECKED:
            del _checked[next(iter(_checked))]


def check_pin(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> None:
    """Raise the first error of the arguments of ``pin_``, or return."""
    for name, entries in (("bases", bases), ("targets", targets), ("biases", biases)):
        if len(entries) != len(weights):
            raise ValueError(
                f"pin_: {name} has {len(entries)} entries but weights has {len(weights)}; pass one for each"
            )
    for k, (w, u, b, c) in enumerate(zip(weights, bases, targets, biases, strict=True)):
        for name, t in (("weights", w), ("bases", u), ("targets", b), ("biases", c)):
            if t is None and name in ("targets", "biases"):
                continue
            check_buffer("pin_", f"{name}[{k}]", t)  # type: ignore[arg-type]
            if t.device != w.device:  # type: ignore[union-attr]
                raise ValueError(f"pin_: {name}[{k}] is on {t.device} but weights[{k}] is on {w.device}; move it there")  # type: ignore[union-attr]
        if w.dim() != 2:
            raise ValueError(f"pin_: weights[{k}] has shape {tuple(w.shape)}; pass a matrix, [outputs, inputs]")
        inputs = w.shape[1] + (c is not None)
        if u.dim() != 2 or u.shape[0] != inputs:
            with_bias = ", its bias counted as an input" if c is not None else ""
            raise ValueError(
                f"pin_: bases[{k}] has shape {tuple(u.shape)} but weights[{k}] has shape {tuple(w.shape)}{with_bias}: pass "
                f"[{inputs}, rank]"
            )
        if b is not None and b.shape != (w.shape[0], u.shape[1]):
            raise ValueError(
                f"pin_: targets[{k}] has shape {tuple(b.shape)}; weights[{k}] and bases[{k}] want {(w.shape[0], u.shape[1])}"
            )
        if c is not None and c.shape != (w.shape[0],):
            raise ValueError(f"pin_: biases[{k}] has shape {tuple(c.shape)}; weights[{k}] wants ({w.shape[0]},)")
        for name, t in (("weights", w), ("biases", c)):
            if t is not None and overlaps_itself(t):
                raise ValueError(
                    f"pin_: {name}[{k}] overlaps itself, so it cannot be written; pass a contiguous tensor"
                )
    if not torch.compiler.is_compiling():  # a traced tensor has no address
        _check_pin_overlap({"weights": weights, "biases": biases, "bases": bases, "targets": targets})


def _check_pin_overlap(lists: dict[str, Sequence[Tensor | None]]) -> None:
    written = ("weights", "biases")
    entries = [(name, k, t) for name, row in lists.items() for k, t in enumerate(row) if t is not None]
    for pair in _near([t for *_, t in entries]):
        (name, k, t), (other_name, j, other) = (entries[at] for at in sorted(pair))  # those that are written come first
        if name not in written or not shares_memory(t, other):
            continue
        advice = "pass each once" if other_name in written else f"clone {other_name}[{j}]"
        raise ValueError(f"pin_: {name}[{k}] is written and shares memory with {other_name}[{j}]; {advice}")
