"""One call of a public function: its rows unpacked, brought to where they are computed, run, and refused in words."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from gradproj import distributed, methods, offload, validate
from gradproj.backends import Backend, select
from gradproj.float8 import BLOCK, Float8Row

Buffers = Sequence[Tensor | None]
Row = Buffers | Float8Row | offload.HostRow


def gram_call(op: str, rows: Sequence[Row], base, parts, spread: distributed.Spread, like=None) -> "Call":
    if not rows:
        raise ValueError(f"{op}: pass at least one list of tensors")
    call = Call.of(op, rows, [f"rows[{r}]" for r in range(len(rows))], base, parts, written=False)
    call.spread(spread.of_columns(op, len(call.rows[0])), like)
    return call


def prepare(op: str, grads: Buffers, directions: Sequence[Row], base, parts, spread) -> "Call":
    """A call on the rows without the columns where the gradient is None."""
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    call = Call.of(op, (grads, *directions), names, base, parts, written=True)
    types = set(map(type, call.rows[0]))
    kept = None
    if type(None) in types:
        kept = [i for i, g in enumerate(call.rows[0]) if g is not None]
    if spread is not None:
        spread = spread.of_columns(op, len(call.rows[0]), kept)
    if kept is not None:
        call = call.columns(kept)
    # Gradients that are all plain, and nothing said of other ranks: directions are not looked at one by one for that. Where
    # one is a DTensor after all, an op refuses it.
    if types <= distributed.PLAIN_TYPES and (spread is None or not any(spread)):
        return call
    call.spread(spread)
    return call


def _flat(rows: Sequence[list[Tensor | None]]) -> list[Tensor | None]:
    return rows[0] if len(rows) == 1 else list(itertools.chain.from_iterable(rows))


def _device_of(t: Tensor) -> torch.device:
    return t.device


class _SeveralDevices(Exception):
    """The columns of a call are on several devices: it has to be run for each of them."""


@dataclasses.dataclass(eq=False)
class Call:
    """Runs ops for one public function under the rules of the package: precise errors, no autograd, versions bumped.

    The ops of every backend but torch check their input themselves, so that a good call costs nothing per buffer here; when
    one refuses, nothing has been written, and the slow path finds out why.

    Attributes:
        public: the function's name, for messages.
        rows: R lists of the same length; of a float8 row its codes.
        names: how the user knows each row.
        kept: the user's index of each column.
        written: whether row 0 is.
        scales: per row, the scales of a float8 row; None if no row is one.
        base, part: one entry per column, or None.
        num_parts: 0 without parts.
        shards: what this rank has of rows that are spread over ranks; ``rows`` and ``base`` are then local. None if they are not.
        on_host: which rows have to be brought to the others' device; empty if none.
    """

    public: str
    rows: list[list[Tensor | None]]
    names: Sequence[str]
    kept: Sequence[int]
    written: bool
    scales: list[list[Tensor | None]] | None = None
    base: list[Tensor | None] | None = None
    part: list[int] | None = None
    num_parts: int = 0
    shards: distributed.Shards | None = None
    on_host: Sequence[bool] = ()
    # Not functools.cached_property: torch.compile does not trace its lock (Python < 3.12).
    _backend: Backend | None = dataclasses.field(default=None, init=False)
    _per_device: list["Call"] | None = dataclasses.field(default=None, init=False)

    @classmethod
    def of(cls, public: str, rows: Sequence[Row], names: Sequence[str], base, parts, written: bool) -> "Call":
        lists: list[list[Tensor | None]] = []
        scales: list[list[Tensor | None]] | None = None
        for row, name in zip(rows, names, strict=True):
            if isinstance(row, offload.HostRow):
                if written and not lists:
                    raise TypeError(
                        f"{public}: {name} is a HostRow, which is read, not written; pass a list of tensors"
                    )
                row = row.row
            if isinstance(row, Tensor):
                raise TypeError(f"{public}: {name} is a tensor; pass a list of tensors, one per parameter")
            if isinstance(row, Float8Row):
                if written and not lists:
                    raise TypeError(
                        f"{public}: {name} is a Float8Row, which is read, not written; pass a list of tensors"
                    )
                scales = scales or [[None] * len(rows[0]) for _ in rows]
                scales[len(lists)] = list(row.scales)
                row = row.codes
            lists.append(list(row))
        call = cls(public, lists, names, range(len(lists[0])), written, scales)
        if offload.HostRow in set(map(type, rows)):
            call.on_host = [isinstance(row, offload.HostRow) for row in rows]
        if base is not None:
            call.base = list(base)
        if parts is not None:
            call.part = [int(p) for p in parts]
            call.num_parts = max(call.part, default=0) + 1
            if min(call.part, default=0) < 0:
                raise ValueError(f"{public}: parts must be numbers from 0, got {min(call.part)}")
        call._check_lengths()
        return call

    def _check_lengths(self) -> None:
        lists = [*zip(self.names, self.rows, strict=True)]
        if self.base is not None:
            lists.append(("base", self.base))
        if self.scales is not None:
            lists += [(f"{name}.scales", s) for name, s in zip(self.names, self.scales, strict=True)]
        if self.part is not None:
            lists.append(("parts", self.part))  # type: ignore[arg-type]
        for name, entries in lists:
            if len(entries) != len(self.rows[0]):
                raise ValueError(
                    f"{self.public}: {name} has {len(entries)} entries but {self.names[0]} has {len(self.rows[0])}; pass "
                    f"gradients of the same parameters in the same order, with None where there is no gradient"
                )

    def columns(self, wanted: Sequence[int]) -> "Call":
        """The same call on some of the columns."""

        def pick(row):
            return None if row is None else [row[i] for i in wanted]

        return dataclasses.replace(
            self,
            rows=[[row[i] for i in wanted] for row in self.rows],
            kept=[self.kept[i] for i in wanted],
            scales=None if self.scales is None else [[row[i] for i in wanted] for row in self.scales],
            base=pick(self.base),
            part=pick(self.part),
            shards=None,
        )

    def spread(self, spread: distributed.Spread | None, like: Buffers | None = None) -> None:
        """Go over to this rank's part of the rows, if they are spread over ranks. None: there will be no inner products.

        Raises:
            ValueError, NotImplementedError, RuntimeError: naming row and index. Nothing is written.
        """
        names = [*self.names, "base"]
        self.shards = distributed.shards(
            self.public, self.all_rows, names, self.kept, self.written, spread, self._scaled(), like
        )
        if self.shards is not None:
            rows = self.shards.rows
            self.rows, self.base = rows[: len(self.rows)], None if self.base is None else rows[-1]

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of Gram and weights."""
        return (self.num_parts,) if self.num_parts else ()

    @property
    def all_rows(self) -> list[list[Tensor | None]]:
        return self.rows if self.base is None else [*self.rows, self.base]

    def _first(self, columns: Sequence[int] | None = None) -> Tensor | None:
        """A tensor on the device where these columns are computed: one of the host's only if there is no other."""
        on_host = self.on_host or [False] * len(self.rows)
        rows = [row for row, host in zip(self.rows, on_host, strict=True) if not host]
        for row in (*rows, *self.rows):
            for t in row if columns is None else (row[i] for i in columns):
                if t is not None:
                    return t
        return None

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            first = self._first()
            if not isinstance(first, Tensor):
                self.check()
            self._backend = select(cast(Tensor, first).device.type)
        return self._backend

    def by_device(self) -> list["Call"]:
        """One call per device, after everything that any of them would refuse has been looked for."""
        if self._per_device is not None:
            return self._per_device
        self.check()
        where: dict[torch.device, list[int]] = {}
        for i in range(len(self.kept)):
            first = self._first([i])
            if first is not None:
                where.setdefault(_device_of(first), []).append(i)
        self._per_device = [self.columns(indices) for indices in where.values()]
        return self._per_device

    def gram(self, known: Tensor | distributed.Share | None) -> Tensor:
        """[R, R] or [P, R, R] Gram of the rows, of all ranks if they are spread."""
        if self.shards is not None:
            return self.shards.gram(self._part, known, self._shape)
        return self.share(known.gram if isinstance(known, distributed.Share) else known)

    def share(self, known: Tensor | None) -> Tensor:
        """What this rank adds to that Gram: all of it if the rows are not spread."""
        if self.shards is not None:
            return self.shards.share(self._part, known, self._shape)
        if all(t is None for row in self.rows for t in row):
            return torch.zeros(self._shape, dtype=torch.float64)
        return self._gram(known)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self.lead, len(self.rows), len(self.rows))

    def _part(self, columns: list[int], known: Tensor | None) -> Tensor:
        return self.columns(columns)._gram(known)

    def _gram(self, known: Tensor | None) -> Tensor:
        if any(self.on_host):
            return self._sum((call._gram(known) for call in self._buckets()), known)
        try:
            return self._run("gram", lambda op, c: op(_flat(c.rows), len(c.rows), c._here(known), *c._extras(0)))
        except _SeveralDevices:
            return self._sum((call._gram(known) for call in self.by_device()), known)

    def _sum(self, grams: Iterator[Tensor], known: Tensor | None) -> Tensor:
        """The Gram of all columns from those of some."""
        total = next(grams)
        for products in grams:
            total += products.to(total.device)
        if known is not None:
            total[..., 1:, 1:] = known
        return total

    def combine(self, weights: Tensor) -> None:
        """Row 0 <- weights times the rows."""
        if any(self.on_host):
            for call in self._buckets(backwards=True):
                call.combine(weights)
        else:
            self._combine(weights)
        if self.shards is not None:
            self.shards.written(weights)

    def _combine(self, weights: Tensor) -> None:
        try:
            self._run("combine_", lambda op, c: op(c.rows[0], _flat(c.rows[1:]), c._here(weights), *c._extras(1)))
        except _SeveralDevices:
            for call in self.by_device():
                call.combine(weights)

    def _buckets(self, backwards: bool = False) -> Iterator["Call"]:
        """The call in pieces, the host's rows of each brought to the device of its others.

        What any of them would refuse is looked for first: a bucket is written only if all can be.
        """
        if len(self.by_device()) > 1:
            for call in self.by_device():
                yield from call._buckets(backwards)
            return
        self._take_real_views()
        lists = [offload.Buffers(row, host) for row, host in zip(self.rows, self.on_host, strict=True)]
        if self.scales is not None:
            lists += [offload.Buffers(s, host, BLOCK) for s, host in zip(self.scales, self.on_host, strict=True)]
        if self.base is not None:
            lists.append(offload.Buffers(self.base, False))
        first = cast(Tensor, self._first())
        for cuts, buffers in offload.walk(lists, first.device, backwards):
            yield dataclasses.replace(
                self,
                rows=buffers[: len(self.rows)],
                kept=[self.kept[cut.column] for cut in cuts],
                scales=None if self.scales is None else buffers[len(self.rows) : 2 * len(self.rows)],
                base=None if self.base is None else buffers[-1],
                part=None if self.part is None else [self.part[cut.column] for cut in cuts],
                on_host=(),
                shards=None,
            )

    def project(self, rule: methods.Rule, known: Tensor | None) -> tuple[Tensor, Tensor]:
        try:
            if any(self.on_host):
                raise _SeveralDevices
            return self._run(
                "project_", lambda op, c: op(c.rows[0], _flat(c.rows[1:]), *rule, c._here(known), *c._extras(1))
            )
        except _SeveralDevices:
            products = self.gram(known)
            weights = rule(products)
            self.combine(weights)
            return products, weights

    def _here(self, t: Tensor | None) -> Tensor | None:
        """A small tensor as the kernels read it, on the device of the buffers."""
        if t is None:
            return None
        first = next(b for row in self.rows for b in row if b is not None)
        return t.to(first.device, torch.float64).contiguous()

    def _extras(self, first: int) -> tuple:
        """The ops' last arguments; ``first``: the first row that may have scales."""
        if self.base is None and self.scales is None and not self.num_parts:
            return ()
        scales = None if self.scales is None else _flat(self.scales[first:])
        return self.base, scales, self.part or [], self.num_parts

    def _scaled(self) -> list[bool]:
        """Which rows are float8 codes."""
        return [] if self.scales is None else [any(s is not None for s in row) for row in self.scales]

    def check(self) -> None:
        if self.shards is None:
            self.spread(None)  # refuses a DTensor among plain tensors
        backend = self._backend.name if self._backend else ""  # not self.backend: choosing one may lead here
        names, scaled = [*self.names, "base"], self._scaled()
        validate.check(self.public, self.all_rows, names, self.kept, self.written, scaled, backend, self.on_host)
        if self.scales is not None:
            validate.check_scales(self.public, self.rows, self.scales, self.names, self.kept)

    def _run(self, name: str, run: Callable):
        if self._per_device is not None and len(self._per_device) > 1:
            raise _SeveralDevices
        op = self.backend.op(name)
        if self.backend.name == "torch":
            self._take_real_views()
            if len(self.by_device()) > 1:
                raise _SeveralDevices
        try:
            with torch.no_grad():
                result = run(op, self)
        except RuntimeError:
            if self._take_real_views():
                return self._run(name, run)
            if len(self.by_device()) > 1:
                raise _SeveralDevices from None
            raise
        if name != "gram" and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(cast(list[Tensor], self.rows[0]))  # no None: prepare left them out
        return result

    def _take_real_views(self) -> bool:
        """Replace complex tensors by real views of their memory; a direction's lazy conjugation is carried out first."""
        if not any(isinstance(t, Tensor) and t.is_complex() for row in self.all_rows for t in row):
            return False
        for i, g in zip(self.kept, self.rows[0], strict=True):
            if self.written and isinstance(g, Tensor) and g.is_conj():
                raise NotImplementedError(
                    f"{self.public}: {self.names[0]}[{i}] is a lazy conjugate, whose memory holds something else; pass a "
                    f"tensor of its own: {self.names[0]}[{i}].resolve_conj()"
                )

        def real(row):
            return [
                torch.view_as_real(t.resolve_conj()) if isinstance(t, Tensor) and t.is_complex() else t for t in row
            ]

        self.rows = [real(row) for row in self.rows]
        self.base = None if self.base is None else real(self.base)
        return True
