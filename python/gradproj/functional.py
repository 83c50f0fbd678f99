"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the protected directions. A row is a list with one tensor (or None) per parameter.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gradproj import distributed, methods, validate
from gradproj.backends import Backend, select

Buffers = Sequence[Tensor | None]


class Projection(NamedTuple):
    """What a projection did, as tensors on the device of the gradients: reading one synchronises, making it did not.

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
        length = self.gram.diagonal().sqrt()
        return self.gram[0, 1:] / (length[0] * length[1:])

    @property
    def removed(self) -> Tensor:
        """0-d: length of the change over length of the gradient; 0 is untouched, 1 is all of it for a projection."""
        change = self.weights.clone()
        change[0] -= 1.0
        gram = torch.where(self.gram.isfinite().all(), self.gram, torch.eye(len(change)).to(self.gram))
        return (change @ gram @ change).clamp(min=0).sqrt() / gram[0, 0].sqrt()

    @property
    def finite(self) -> Tensor:
        """0-d bool: whether every inner product was finite."""
        return self.gram.isfinite().all()

    @property
    def applied(self) -> Tensor:
        """0-d bool: whether the gradient was written. False for a non-finite Gram and where nothing conflicts."""
        return (self.weights[0] != 1) | (self.weights[1:] != 0).any()


def gram(
    *rows: Buffers,
    known: Tensor | None = None,
    group=None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
        known: [R - 1, R - 1] Gram of rows 1.., if it is known already: then only the products with row 0 are computed.
        group, plain, counted: of rows that are spread over ranks; see :func:`project_`. ``known`` is of the whole rows.
    Returns:
        [R, R] float64 on the rows' device (CPU, or the group's device, if there is no tensor); the same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending row and index.
    Reads R N bytes, N being the size of one list. Float32 products (float64 as soon as one row is), float64 sums.
    """
    return _gram_call("gram", rows, distributed.Spread(group, plain, counted)).gram(known)


def share(
    *rows: Buffers,
    known: distributed.Share | None = None,
    group=None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
) -> distributed.Share:
    """This rank's part of :func:`gram`, which it is alone to compute: no collective, except to reduce Partial buffers."""
    call = _gram_call("share", rows, distributed.Spread(group, plain, counted))
    return distributed.Share(call.share(None if known is None else known.gram))


def combine_(grads: Buffers, directions: Sequence[Buffers], weights: Tensor) -> None:
    """``grads <- weights[0] grads + sum_k weights[1 + k] directions[k]`` in one pass, in place.

    Args:
        grads: one tensor or None per parameter. Modified; where it is None nothing is written.
        directions: K lists like ``grads``. Not modified. None counts as zeros.
        weights: [K + 1] tensor. A weight of exactly 0 means that its row is not read; (1, 0, .., 0) touches nothing.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads up to (K + 1) N bytes and writes N. Sums in float32 (float64 as soon as one row is), rounded once.
    """
    call = _prepare("combine_", grads, directions)
    if not isinstance(weights, Tensor) or weights.shape != (len(call.rows),):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"combine_: weights must be a tensor of shape ({len(call.rows)},), got {shape}")
    if call.rows[0]:
        call.combine(weights.detach())


def project_(
    grads: Buffers,
    *directions: Buffers,
    method: methods.Method = "orthogonal",
    eps: float = 0.0,
    group=None,
    known: Tensor | distributed.Share | None = None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
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
        group: process group over which the rows are spread; every rank of it must make the call, one that owns nothing
            included. Not needed for DTensors on a mesh that covers the world. None with plain tensors: this rank holds all.
        known: [K, K] Gram of the directions over the same buffers of all ranks, if it is known already, or this rank's
            :func:`share` of it.
        plain: what the other ranks of the group hold of a plain tensor: ``"replicated"``, the same (DDP), or ``"sharded"``,
            other parts (FSDP1, ZeRO, pipeline stages). DTensors say it themselves, on any meshes, but for ranks of the group
            that are not in their mesh.
        counted: per entry of ``grads``, False for what another rank counts already, such as a tied parameter on two pipeline
            stages: left out of the inner products, but written.
    Returns:
        Projection: tensors on the device of ``grads``, the same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one rank's list; holds < 1 MiB. With a group, one all_reduce of
    (K + 1)(K + 2) / 2 float64 numbers, of K + 1 with ``known``. Partial DTensors are reduced first, one all_reduce and one
    copy each; a gradient stays Partial and its first rank holds the result, the others zeros.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict".
    """
    rule = methods.parse(method, eps)
    call = _prepare("project_", grads, directions, distributed.Spread(group, plain, counted))
    if call.rows[0] and call.shards is None and isinstance(rule, methods.Rule):
        whole = known.gram if isinstance(known, distributed.Share) else known  # nothing is spread: they are the same
        products, weights = call("project_", lambda op, r: op(r[0], _flat(r[1:]), *rule, whole))
        return Projection(products, weights, call.backend.name)

    if call.rows[0] or call.shards is not None:
        products = call.gram(known)
    else:
        first = next((t for t in _flat((grads, *directions)) if isinstance(t, Tensor)), None)
        products = torch.zeros(
            len(call.rows), len(call.rows), dtype=torch.float64, device=None if first is None else first.device
        )
    if not isinstance(rule, methods.Rule):
        weights = methods.apply_weighting(rule, products)
    elif call.shards is None:
        weights = rule(products)
    else:  # the same op on every rank, one that owns nothing included
        weights = select(products.device.type).op("weights")(products, *rule)
    if call.rows[0]:
        call.combine(weights)
    return Projection(products, weights, call.backend.name if call.rows[0] else "none")


def orthogonal_gradient_projection(
    model: torch.nn.Module,
    safety_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    capability_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    eps: float = 1e-8,
    group=None,
    plain: distributed.Plain | None = None,
) -> Projection:
    """The naive algorithm's signature, fused: afterwards ``p.grad`` holds the projected safety gradient.

    Args:
        model: its parameters' ``.grad`` are replaced. They may be DTensors (FSDP2, tensor parallel).
        safety_loss: scalar, or a function of the model that returns one.
        capability_loss: likewise; its forward and backward pass come first. DDP needs functions: it reduces the gradients of
            the first backward pass after a forward pass, and of no other.
        eps: added to <d, d>, as the naive version does. With short gradients it leaves some of the conflict behind; 0 does not.
        group, plain: where the model is spread over ranks; see :func:`project_`.
    Returns:
        Projection.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(loss) -> list[Tensor | None]:
        scalar = loss(model) if callable(loss) else loss
        for p in parameters:
            p.grad = None
        scalar.backward(retain_graph=True)  # the other loss may share this graph
        return [p.grad for p in parameters]

    direction = gradient(capability_loss)
    grads = gradient(safety_loss)
    return project_(grads, direction, method="orthogonal", eps=eps, group=group, plain=plain)


def _same_length(op: str, rows: Sequence[Buffers], names: Sequence[str]) -> list[list[Tensor | None]]:
    lists = []
    for row, name in zip(rows, names, strict=True):
        if isinstance(row, Tensor):
            raise TypeError(f"{op}: {name} is a tensor; pass a list of tensors, one per parameter")
        lists.append(list(row))
        if len(lists[-1]) != len(lists[0]):
            raise ValueError(
                f"{op}: {name} has {len(lists[-1])} entries but {names[0]} has {len(lists[0])}; pass gradients of the same "
                f"parameters in the same order, with None where there is no gradient"
            )
    return lists


def _gram_call(op: str, rows: Sequence[Buffers], spread: distributed.Spread) -> "_Call":
    if not rows:
        raise ValueError(f"{op}: pass at least one list of tensors")
    names = [f"rows[{r}]" for r in range(len(rows))]
    lists = _same_length(op, rows, names)
    _per_column(op, spread.counted, len(lists[0]))
    return _Call(op, lists, names, range(len(lists[0])), False, spread)


def _per_column(op: str, counted: Sequence[bool] | None, columns: int) -> Sequence[bool] | None:
    if counted is not None and len(counted) != columns:
        raise ValueError(f"{op}: counted has {len(counted)} entries for {columns} buffers; pass one bool for each")
    return counted


def _prepare(
    op: str, grads: Buffers, directions: Sequence[Buffers], spread: distributed.Spread | None = None
) -> "_Call":
    """A call on the rows without the columns where the gradient is None."""
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    lists = _same_length(op, (grads, *directions), names)
    counted = _per_column(op, spread.counted if spread else None, len(lists[0]))
    kept: Sequence[int] = range(len(lists[0]))
    if type(None) in set(map(type, lists[0])):
        kept = [i for i, g in enumerate(lists[0]) if g is not None]
        lists = [[row[i] for i in kept] for row in lists]
        if spread and counted is not None:
            spread = spread._replace(counted=[counted[i] for i in kept])
    return _Call(op, lists, names, kept, True, spread)


def _flat(rows: Sequence[Buffers]) -> list[Tensor | None]:
    return list(itertools.chain.from_iterable(rows))


class _Call:
    """Runs ops for one public function under the rules of the package: precise errors, no autograd, versions bumped.

    The native ops check their input themselves, so that a good call costs nothing per buffer here; when one refuses,
    nothing has been written, and the slow path finds out why.
    """

    def __init__(
        self,
        public: str,
        rows: list[list[Tensor | None]],
        names: Sequence[str],
        kept: Sequence[int],
        written: bool,
        spread: distributed.Spread | None,
    ):
        self.shards = distributed.shards(public, rows, names, kept, written, spread)
        self.public, self.names, self.kept, self.written = public, names, kept, written
        self.rows = rows if self.shards is None else self.shards.rows
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        if (
            self._backend is None
        ):  # not functools.cached_property: torch.compile does not trace its lock (Python < 3.12)
            first = next(t for row in self.rows for t in row if t is not None)
            if not isinstance(first, Tensor):
                self.check()
            self._backend = select(first.device.type)
        return self._backend

    def check(self) -> None:
        validate.check(self.public, self.rows, self.names, self.kept, self.written)

    def gram(self, known: Tensor | distributed.Share | None) -> Tensor:
        """[R, R] Gram of the rows, of all ranks if they are spread."""
        if self.shards is None:
            return self.share(known.gram if isinstance(known, distributed.Share) else known)
        return self.shards.gram(self._part, known)

    def share(self, known: Tensor | None) -> Tensor:
        """[R, R] what this rank adds to the Gram of the rows: all of it if they are not spread."""
        if self.shards is not None:
            return self.shards.share(self._part, known)
        if all(t is None for row in self.rows for t in row):
            return torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64)
        return self("gram", lambda op, r: op(_flat(r), len(r), known))

    def _part(self, columns: list[int], known: Tensor | None) -> Tensor:
        return self("gram", lambda op, r: op(_flat([[row[i] for i in columns] for row in r]), len(r), known))

    def combine(self, weights: Tensor) -> None:
        """Row 0 <- weights times the rows."""
        self("combine_", lambda op, r: op(r[0], _flat(r[1:]), weights.to(r[0][0].device, torch.float64)))
        if self.shards is not None:
            self.shards.written(weights)

    def __call__(self, name: str, run: Callable):
        op = self.backend.op(name)
        if self.backend.namespace != "gradproj":
            self._take_real_views()
            self.check()
        try:
            with torch.no_grad():
                result = run(op, self.rows)
        except RuntimeError:
            if self._take_real_views():
                return self(name, run)
            self.check()
            raise
        if name != "gram" and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(cast(list[Tensor], self.rows[0]))  # no None: _prepare left them out
        return result

    def _take_real_views(self) -> bool:
        """Replace complex tensors by real views of their memory; a direction's lazy conjugation is carried out first."""
        if not any(isinstance(t, Tensor) and t.is_complex() for row in self.rows for t in row):
            return False
        for i, g in zip(self.kept, self.rows[0], strict=True):
            if self.written and isinstance(g, Tensor) and g.is_conj():
                raise NotImplementedError(
                    f"{self.public}: {self.names[0]}[{i}] is a lazy conjugate, whose memory holds something else; pass a "
                    f"tensor of its own: {self.names[0]}[{i}].resolve_conj()"
                )
        self.rows = [
            [torch.view_as_real(t.resolve_conj()) if isinstance(t, Tensor) and t.is_complex() else t for t in row]
            for row in self.rows
        ]
        return True
