"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the protected directions. A row is a list with one tensor (or None) per parameter.
"""

import functools
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


def gram(*rows: Buffers, known: Tensor | None = None) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
        known: [R - 1, R - 1] Gram of rows 1.., if it is known already: then only the products with row 0 are computed.
    Returns:
        [R, R] float64 on the rows' device (CPU if there is no tensor).
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending row and index.
    Reads R N bytes, N being the size of one list. Float32 products (float64 as soon as one row is), float64 sums.
    """
    if not rows:
        raise ValueError("gram: pass at least one list of tensors")
    names = [f"rows[{r}]" for r in range(len(rows))]
    lists = _same_length("gram", rows, names)
    if all(t is None for row in lists for t in row):
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    call = _Call("gram", lists, names, range(len(lists[0])), written=False)
    return call("gram", lambda op, r: op(_flat(r), len(r), known))


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
        weights = weights.detach()
        call("combine_", lambda op, r: op(r[0], _flat(r[1:]), weights.to(r[0][0].device, torch.float64)))


def project_(
    grads: Buffers,
    *directions: Buffers,
    method: methods.Method = "orthogonal",
    eps: float = 0.0,
    group=None,
    known: Tensor | None = None,
) -> Projection:
    """Remove from ``grads`` what conflicts with ``directions``, in place.

    Args:
        grads: one tensor (or None) per parameter; any shapes, floating or complex dtypes, strides. Modified.
        directions: K lists like ``grads``. Not modified. None counts as zeros, and so does a whole direction where
            ``grads`` is None, so that the result is exactly orthogonal on what can be written.
        method: ``"orthogonal"`` removes the whole span of the directions; ``"conflict"`` takes the nearest vector with no
            negative inner product; ``"pcgrad"`` projects every row, ``grads`` and the directions, off the rows that it
            conflicts with, in ascending order, and sums them; ``("mix", gamma)`` adds gamma times every direction; a
            callable, such as a ``torchjd.aggregation.*Weighting``, maps the [K + 1, K + 1] float64 Gram to [K + 1] weights.
        eps: added to every <d_k, d_k>, and to <g, g> in ``"pcgrad"``; 0 is scale-free. Ignored by ``"mix"`` and callables.
        group: process group over which the buffers are sharded; None if every rank holds all of them.
        known: [K, K] Gram of the directions over the same buffers, if it is known already.
    Returns:
        Projection: tensors on the device of ``grads``.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one list; holds < 1 MiB.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict"; Yu
    et al. 2020 (PCGrad).
    """
    rule = methods.parse(method, eps)
    call = _prepare("project_", grads, directions)
    num_rows = len(call.rows)
    if call.rows[0] and group is None and isinstance(rule, methods.Rule):
        products, weights = call("project_", lambda op, r: op(r[0], _flat(r[1:]), *rule, known))
        return Projection(products, weights, call.backend.name)

    if call.rows[0]:
        products = call("gram", lambda op, r: op(_flat(r), num_rows, known))
    else:  # nothing to project here; other ranks may have something
        first = next((t for t in _flat((grads, *directions)) if isinstance(t, Tensor)), None)
        device = distributed.device(group) if group is not None else None if first is None else first.device
        products = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    if group is not None:
        products = distributed.reduce_gram(products, group)
    weights = rule(products) if isinstance(rule, methods.Rule) else methods.apply_weighting(rule, products)
    if call.rows[0]:
        call("combine_", lambda op, r: op(r[0], _flat(r[1:]), weights))
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


def _prepare(op: str, grads: Buffers, directions: Sequence[Buffers]) -> "_Call":
    """A call on the rows without the columns where the gradient is None."""
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    lists = _same_length(op, (grads, *directions), names)
    kept: Sequence[int] = range(len(lists[0]))
    if type(None) in set(map(type, lists[0])):
        kept = [i for i, g in enumerate(lists[0]) if g is not None]
        lists = [[row[i] for i in kept] for row in lists]
    return _Call(op, lists, names, kept, written=True)


def _flat(rows: Sequence[Buffers]) -> list[Tensor | None]:
    return list(itertools.chain.from_iterable(rows))


class _Call:
    """Runs ops for one public function under the rules of the package: precise errors, no autograd, versions bumped.

    The native ops check their input themselves, so that a good call costs nothing per buffer here; when one refuses,
    nothing has been written, and the slow path finds out why.
    """

    def __init__(self, public: str, rows: list[list[Tensor | None]], names: Sequence[str], kept, written: bool):
        self.public, self.rows, self.names, self.kept, self.written = public, rows, names, kept, written

    @functools.cached_property
    def backend(self) -> Backend:
        first = next(t for row in self.rows for t in row if t is not None)
        if not isinstance(first, Tensor):
            self.check()
        return select(first.device.type)

    def check(self) -> None:
        validate.check(self.public, self.rows, self.names, self.kept, self.written)

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
