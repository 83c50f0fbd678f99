"""Executes one call of a public function: unpack, split by device, dispatch, raise precise errors.

Ops check their input themselves, so that a good call costs nothing per tensor here. An op that refuses has written
nothing; ``validate`` then finds the precise error.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj.kernels import validate
from gradproj.kernels.backends import Backend, select
from gradproj.rows.dtensors import Layouts, dtensor_types

Row = Sequence[Tensor | None]


class Call(NamedTuple):
    """The columns that take part in a call."""

    op: str  # the public function's name
    names: Sequence[str]  # what the user calls each row
    rows: list[list[Tensor | None]]  # R lists of the same length
    indices: Sequence[int]  # the user's index of each column
    written: bool  # whether row 0 is
    types: set[type]  # of the user's entries of row 0
    entries: int  # how many the user's lists have
    part: Sequence[int] = ()  # the number of each column's part; empty if there is only one
    num_parts: int = 0  # 0 if there is only one: results then have no leading dimension

    def columns(self, wanted: Sequence[int]) -> "Call":
        """The same call on some of the columns."""
        return self._replace(
            rows=[[row[i] for i in wanted] for row in self.rows],
            indices=[self.indices[i] for i in wanted],
            part=[self.part[i] for i in wanted] if self.part else (),
        )


def unpack(op: str, rows: Sequence[Row], part: Sequence[int] = (), num_parts: int = 0) -> Call:
    """A call on lists of the same length; where row 0 is written, without the columns in which it is None."""
    written = op in ("project_", "combine_")
    if op == "pin_":
        names = ["weights", "bases", "targets", "biases"]
    elif op == "gram":
        names = [f"rows[{r}]" for r in range(len(rows))]
    else:
        names = ["grads", *(f"directions[{k}]" for k in range(len(rows) - 1))]
    if len(rows) < 1 + written:
        raise ValueError(f"{op}: pass at least one {'direction' if written else 'list of tensors'}")
    lists: list[list[Tensor | None]] = []
    for row, name in zip(rows, names, strict=True):
        if isinstance(row, Tensor):
            raise TypeError(f"{op}: {name} is a tensor; pass a list of tensors, one per parameter")
        lists.append(list(row))
        if len(lists[-1]) != len(lists[0]):
            raise ValueError(
                f"{op}: {name} has {len(lists[-1])} entries but {names[0]} has {len(lists[0])}; pass gradients of the "
                f"same parameters in the same order, with None where there is no gradient"
            )
    types, entries = set(map(type, lists[0])), len(lists[0])
    call = Call(op, names, lists, range(entries), written, types, entries, part, num_parts)
    if written and type(None) in types:
        return call.columns([i for i, t in enumerate(lists[0]) if t is not None])
    return call


def run(call: Call, name: str, *arguments):
    """An op on all columns, which are on one device."""
    backend = select(first(call).device.type, name)
    if backend.name == "torch":  # it walks column by column: nothing may be refused once the first is written
        if name == "pin_":
            validate.check_pin_once(*call.rows)  # type: ignore[arg-type]
        else:
            _check(call, backend)
            call = _real(call)
    rows, written, inputs = call.rows, call.rows[0], [*arguments, call.part, call.num_parts]
    if name == "gram":
        written, inputs = [], [_flat(rows), len(rows), *inputs]
    elif name == "pin_":
        biased = [k for k, t in enumerate(rows[3]) if t is not None]
        biases = [rows[3][k] for k in biased]
        written, inputs = [*rows[0], *biases], [*rows[:3], biases, biased]
    else:
        inputs = [rows[0], _flat(rows[1:]), *inputs]
    try:
        with torch.no_grad():
            result = backend.op(name)(*inputs)
    except RuntimeError:
        _check(call, backend)
        real = _real(call)  # complex tensors are rare, and asking each would cost a tenth of a call
        if real is call:
            raise
        return run(real, name, *arguments)
    if written and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(written)  # type: ignore[arg-type]  # no None: unpack left them out
    return result


def gram(call: Call, weights: Sequence[float], gram_dd: Tensor | None, device: torch.device) -> Tensor:
    """[R, R] or [P, R, R]: this rank's inner products, column i counted ``weights[i]`` times; ``gram_dd`` is copied."""
    shape = (*([call.num_parts] if call.num_parts else []), len(call.rows), len(call.rows))
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for weight, columns in _alike(call, weights):
        if weight:
            total += weight * run(columns, "gram", _beside(columns, gram_dd)).to(device)
    if gram_dd is not None:
        total[..., 1:, 1:] = gram_dd
    return total


def combine(call: Call, weights: Tensor) -> None:
    """Row 0 <- weights times the rows, on every device."""
    for _, columns in _alike(call, [1.0] * len(call.indices)):
        run(columns, "combine_", _beside(columns, weights))


def pin(call: Call) -> Tensor:
    """Pins weights and biases; returns |W U - B|^2 before, of every column of the rows weights, bases, targets, biases.

    Of several devices the result is on the first that is not the CPU, and the host waits for no copy.
    """
    if not call.entries:
        return torch.zeros(0, dtype=torch.float64)
    if len({_device(t) for t in call.rows[0] if isinstance(t, Tensor)}) < 2:
        return run(call, "pin_")
    found: dict[int, Tensor] = {}
    for _, columns in _alike(call, [1.0] * len(call.indices)):
        found |= zip(columns.indices, run(columns, "pin_").unbind(), strict=True)
    home = next((t.device for t in found.values() if t.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([found[k].to(home, non_blocking=True) for k in range(call.entries)])


def first(call: Call) -> Tensor:
    """The first tensor of a call that has one."""
    found = next(t for t in chain(*call.rows) if t is not None)
    if not isinstance(found, Tensor):
        _check(call)
    return found


def spans_devices(call: Call) -> bool:
    """Whether gradients are on several devices. Without an accelerator there is only the CPU: nothing is asked."""
    return _has_accelerator() and len({t.device for t in call.rows[0] if t is not None}) > 1


def _alike(call: Call, weights: Sequence[float]) -> Iterator[tuple[float, Call]]:
    """The call on the columns of one weight and device at a time. If there are several, all are checked first."""
    where: dict[tuple, list[int]] = {}
    for i, weight in enumerate(weights):
        t = next((row[i] for row in call.rows if row[i] is not None), None)
        if t is None:
            continue
        if not isinstance(t, Tensor):
            _check(call)
        where.setdefault((weight, _device(t)), []).append(i)
    if len(where) > 1:
        _check(call)
    for (weight, _), columns in where.items():
        yield weight, call if len(columns) == len(call.indices) else call.columns(columns)


def _check(call: Call, backend: Backend | None = None) -> None:
    """Raise what is wrong with the rows, by name; return if nothing is."""
    if call.op == "pin_":
        validate.check_pin(*call.rows)  # type: ignore[arg-type]
        return
    if kinds := dtensor_types(chain(*call.rows)):  # among the directions of plain gradients, not inspected before
        Layouts(call, kinds)
    for i, g in zip(call.indices, call.rows[0], strict=True):
        if call.written and isinstance(g, Tensor) and g.is_conj():
            name = f"{call.names[0]}[{i}]"
            raise NotImplementedError(
                f"{call.op}: {name} is a lazy conjugate, whose memory holds something else; pass a tensor of its own: "
                f"{name}.resolve_conj()"
            )
    validate.check(call.op, _real(call).rows, call.names, call.indices, call.written, backend.name if backend else "")


def _beside(call: Call, t: Tensor | None) -> Tensor | None:
    """A small tensor as the kernels read it: float64, contiguous, on the device of the rows."""
    return None if t is None else t.to(first(call).device, torch.float64).contiguous()


def _flat(rows: list[list[Tensor | None]]) -> list[Tensor | None]:
    return rows[0] if len(rows) == 1 else list(chain.from_iterable(rows))


def _real(call: Call) -> Call:
    """The same call with complex tensors as real ones with a last dimension of 2; itself, if none is complex."""

    if not any(isinstance(t, Tensor) and t.is_complex() for t in chain(*call.rows)):
        return call

    def real(t):
        return torch.view_as_real(t.resolve_conj()) if isinstance(t, Tensor) and t.is_complex() else t

    return call._replace(rows=[[real(t) for t in row] for row in call.rows])


def _device(t: Tensor) -> torch.device:
    """Hook that tests patch to simulate several devices."""
    return t.device


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


# torch.compiler.assume_constant_result without importing the compiler
_has_accelerator.__dict__["_dynamo_marked_constant"] = True
