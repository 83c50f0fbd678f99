"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the protected directions. A row is a list with one tensor (or None) per parameter; a
direction may also be a :class:`gradproj.float8.Float8Row`, and lie in host memory (:class:`gradproj.offload.HostRow`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gradproj import distributed, methods, offload, validate
from gradproj.backends import Backend, select
from gradproj.float8 import BLOCK, Float8Row

Buffers = Sequence[Tensor | None]
Row = Buffers | Float8Row | offload.HostRow


class Projection(NamedTuple):
    """What a projection did, as tensors on the device of the gradients: reading one synchronises, making it did not.

    With P parts, every tensor has a leading dimension of length P, but for ``finite`` and ``applied``, which are about all.

    Attributes:
        gram: [K + 1, K + 1] float64 inner products before the projection.
        weights: [K + 1] float64; the gradient became ``weights[0] g + sum_k weights[k] d_k``.
        backend: name of the backend that ran.
    """

    gram: Tensor
    weights: Tensor
    backend: str

    @property
    def cosine(self) -> Tensor:
        """[K] cosine between the gradient, before, and each direction. NaN where one of them is zero."""
        length = self.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.gram[..., 0, 1:] / (length[..., :1] * length[..., 1:])

    @property
    def removed(self) -> Tensor:
        """0-d: length of the change over length of the gradient; 0 is untouched, 1 is all of it for a projection."""
        change = self.weights.clone()
        change[..., 0] -= 1.0
        finite = self.gram.isfinite().all(-1).all(-1)[..., None, None]
        gram = torch.where(finite, self.gram, torch.eye(change.shape[-1]).to(self.gram))
        square = (change[..., None, :] @ gram @ change[..., None])[..., 0, 0]
        return square.clamp(min=0).sqrt() / gram[..., 0, 0].sqrt()

    @property
    def ignored(self) -> Tensor:
        """[K] bool: directions without any length where there is a gradient; they take no part in a projection."""
        return self.gram.diagonal(dim1=-2, dim2=-1)[..., 1:] == 0

    @property
    def finite(self) -> Tensor:
        """0-d bool: whether every inner product was finite."""
        return self.gram.isfinite().all()

    @property
    def applied(self) -> Tensor:
        """0-d bool: whether the gradient was written. False for a non-finite Gram and where nothing conflicts."""
        return (self.weights[..., 0] != 1).any() | (self.weights[..., 1:] != 0).any()


def gram(
    *rows: Row, known: Tensor | None = None, base: Buffers | None = None, parts: Sequence[int] | None = None
) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
        known: [R - 1, R - 1] Gram of rows 1.., if it is known already: then only the products with row 0 are computed.
        base: a list like row 0, which then stands for ``base - row 0``, taken in the kernels.
        parts: the number of the part that each column belongs to, from 0; every part gets a Gram of its own.
    Returns:
        [R, R] float64 on the rows' device (CPU if there is no tensor), or [P, R, R] with P parts.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending row and index.
    Reads R N bytes, N being the size of one list. Float32 products (float64 as soon as one row is), float64 sums.
    """
    if not rows:
        raise ValueError("gram: pass at least one list of tensors")
    call = _Call.of("gram", rows, [f"rows[{r}]" for r in range(len(rows))], base, parts, written=False)
    if all(t is None for row in call.rows for t in row):
        return call.zeros(None)
    return call.gram(known)


def combine_(
    grads: Buffers,
    directions: Sequence[Row],
    weights: Tensor,
    base: Buffers | None = None,
    parts: Sequence[int] | None = None,
) -> None:
    """``grads <- weights[0] grads + sum_k weights[1 + k] directions[k]`` in one pass, in place.

    Args:
        grads: one tensor or None per parameter. Modified; where it is None nothing is written.
        directions: K lists like ``grads``. Not modified. None counts as zeros.
        weights: [K + 1] tensor, or [P, K + 1] with P parts. A weight of exactly 0 means that its row is not read; (1, 0, ..,
            0) touches nothing.
        base: a list like ``grads``, which then stands for ``base - grads``, and becomes ``base`` minus the combination.
        parts: the number of the part that each column belongs to, from 0.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads up to (K + 1) N bytes and writes N. Sums in float32 (float64 as soon as one row is), rounded once.
    """
    call = _prepare("combine_", grads, directions, base, parts)
    expected = (*call.lead, len(call.rows))
    if not isinstance(weights, Tensor) or weights.shape != expected:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"combine_: weights must be a tensor of shape {expected}, got {shape}")
    if call.rows[0]:
        call.combine(weights.detach())


def project_(
    grads: Buffers,
    *directions: Row,
    method: methods.Method = "orthogonal",
    eps: float = 0.0,
    group=None,
    known: Tensor | None = None,
    base: Buffers | None = None,
    parts: Sequence[int] | None = None,
) -> Projection:
    """Remove from ``grads`` what conflicts with ``directions``, in place.

    Args:
        grads: one tensor (or None) per parameter; any shapes, floating or complex dtypes, strides. Modified.
        directions: K lists like ``grads``. Not modified. None counts as zeros, and so does a whole direction where
            ``grads`` is None, so that the result is exactly orthogonal on what can be written.
        method: ``"orthogonal"`` removes the whole span of the directions; ``"conflict"`` takes the nearest vector with no
            negative inner product; ``("mix", gamma)`` adds gamma times every direction; a callable maps the [K + 1, K + 1]
            float64 Gram to [K + 1] weights.
        eps: added to every <d_k, d_k>; 0 is scale-free. Ignored by ``"mix"`` and callables.
        group: process group over which the buffers are sharded; None if every rank holds all of them.
        known: [K, K] Gram of the directions over the same buffers, if it is known already.
        base: a list like ``grads``: parameters before an optimizer's step, of which ``grads`` are then the parameters after.
            What is projected is ``base - grads``, what the step took off, and the result is written as parameters again.
        parts: the number of the part that each column belongs to, from 0. Every part is projected by itself, in the same
            passes and the same collective; ``known`` then is [P, K, K].
    Returns:
        Projection: tensors on the device of ``grads``.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one list; holds < 1 MiB.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict".
    """
    rule = methods.parse(method, eps)
    call = _prepare("project_", grads, directions, base, parts)
    if call.rows[0] and group is None and isinstance(rule, methods.Rule):
        products, weights = call.project(rule, known)
        return Projection(products, weights, call.backend.name)

    if call.rows[0]:
        products = call.gram(known)
    else:  # nothing to project here; other ranks may have something
        first = next((t for t in (*grads, *_flat(call.all_rows)) if isinstance(t, Tensor)), None)
        products = call.zeros(
            distributed.device(group) if group is not None else None if first is None else first.device
        )
    if group is not None:
        products = distributed.reduce_gram(products, group)
    weights = rule(products) if isinstance(rule, methods.Rule) else methods.apply_weighting(rule, products)
    if call.rows[0]:
        call.combine(weights)
    return Projection(products, weights, call.backend.name if call.rows[0] else "none")


def orthogonal_gradient_projection(
    model: torch.nn.Module,
    safety_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    capability_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    eps: float = 1e-8,
) -> Projection:
    """The naive algorithm's signature, fused: afterwards ``p.grad`` holds the projected safety gradient.

    Args:
        model: its parameters' ``.grad`` are replaced.
        safety_loss: scalar, or a function of the model that returns one.
        capability_loss: likewise. Both graphs are kept until both backward passes have run.
        eps: added to <d, d>, as the naive version does. With short gradients it leaves some of the conflict behind; 0 does not.
    Returns:
        Projection.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    capability = capability_loss(model) if callable(capability_loss) else capability_loss
    safety = safety_loss(model) if callable(safety_loss) else safety_loss
    for p in parameters:
        p.grad = None
    capability.backward(retain_graph=True)
    direction = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    safety.backward()
    return project_([p.grad for p in parameters], direction, method="orthogonal", eps=eps)


def _prepare(op: str, grads: Buffers, directions: Sequence[Row], base, parts) -> "_Call":
    """A call on the rows without the columns where the gradient is None."""
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    call = _Call.of(op, (grads, *directions), names, base, parts, written=True)
    if type(None) in set(map(type, call.rows[0])):
        return call.columns([i for i, g in enumerate(call.rows[0]) if g is not None])
    return call


def _flat(rows: Sequence[Buffers]) -> list[Tensor | None]:
    return list(itertools.chain.from_iterable(rows))


class _SeveralDevices(Exception):
    """The columns of a call are on several devices: it has to be run for each of them."""


@dataclasses.dataclass(eq=False)
class _Call:
    """Runs ops for one public function under the rules of the package: precise errors, no autograd, versions bumped.

    The native ops check their input themselves, so that a good call costs nothing per buffer here; when one refuses,
    nothing has been written, and the slow path finds out why.

    Attributes:
        public: the function's name, for messages.
        rows: R lists of the same length; of a float8 row its codes.
        names: how the user knows each row.
        kept: the user's index of each column.
        written: whether row 0 is.
        scales: per row, the scales of a float8 row; None if no row is one.
        base, part: one entry per column, or None.
        num_parts: 0 without parts.
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
    on_host: Sequence[bool] = ()
    # Not functools.cached_property: torch.compile does not trace its lock (Python < 3.12).
    _backend: Backend | None = dataclasses.field(default=None, init=False)

    @classmethod
    def of(cls, public: str, rows: Sequence[Row], names: Sequence[str], base, parts, written: bool) -> "_Call":
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

    def columns(self, wanted: Sequence[int]) -> "_Call":
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
        )

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

    @functools.cached_property
    def by_device(self) -> list["_Call"]:
        """One call per device, after everything that any of them would refuse has been looked for."""
        self.check()
        where: dict[torch.device, list[int]] = {}
        for i in range(len(self.kept)):
            first = self._first([i])
            if first is not None:
                where.setdefault(first.device, []).append(i)
        return [self.columns(indices) for indices in where.values()]

    def zeros(self, device) -> Tensor:
        """The Gram of nothing."""
        return torch.zeros(*self.lead, len(self.rows), len(self.rows), dtype=torch.float64, device=device)

    def gram(self, known: Tensor | None) -> Tensor:
        if any(self.on_host):
            return self._sum((call.gram(known) for call in self._buckets()), known)
        try:
            return self._run("gram", lambda op, c: op(_flat(c.rows), len(c.rows), c._here(known), *c._extras(0)))
        except _SeveralDevices:
            return self._sum((call.gram(known) for call in self.by_device), known)

    def _sum(self, grams: Iterator[Tensor], known: Tensor | None) -> Tensor:
        """The Gram of all columns from those of some."""
        total = next(grams)
        for products in grams:
            total += products.to(total.device)
        if known is not None:
            total[..., 1:, 1:] = known
        return total

    def combine(self, weights: Tensor) -> None:
        if any(self.on_host):
            for call in self._buckets(backwards=True):
                call.combine(weights)
            return
        try:
            self._run("combine_", lambda op, c: op(c.rows[0], _flat(c.rows[1:]), c._here(weights), *c._extras(1)))
        except _SeveralDevices:
            for call in self.by_device:
                call.combine(weights)

    def _buckets(self, backwards: bool = False) -> Iterator["_Call"]:
        """The call in pieces, the host's rows of each brought to the device of its others.

        What any of them would refuse is looked for first: a bucket is written only if all can be.
        """
        if len(self.by_device) > 1:
            for call in self.by_device:
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

    def check(self) -> None:
        scaled = [] if self.scales is None else [any(s is not None for s in row) for row in self.scales]
        backend = self._backend.name if self._backend else ""  # not asked for: choosing one may lead here
        validate.check(
            self.public, self.all_rows, [*self.names, "base"], self.kept, self.written, scaled, backend, self.on_host
        )
        if self.scales is not None:
            validate.check_scales(self.public, self.rows, self.scales, self.names, self.kept)

    def _run(self, name: str, run: Callable):
        if "by_device" in self.__dict__ and len(self.by_device) > 1:
            raise _SeveralDevices
        op = self.backend.op(name)
        if self.backend.namespace != "gradproj":
            self._take_real_views()
            if len(self.by_device) > 1:
                raise _SeveralDevices
        try:
            with torch.no_grad():
                result = run(op, self)
        except RuntimeError:
            if self._take_real_views():
                return self._run(name, run)
            if len(self.by_device) > 1:
                raise _SeveralDevices from None
            raise
        if name != "gram" and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(cast(list[Tensor], self.rows[0]))  # no None: _prepare left them out
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
