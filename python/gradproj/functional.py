"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the protected directions. A row is a list with one tensor (or None) per parameter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import distributed, methods, validate
from gradproj.backends import select

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


def gram(*rows: Buffers) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
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
    lists = _real("gram", lists, names, range(len(lists[0])), False)
    first = next((t for row in lists for t in row if t is not None), None)
    if first is None:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    flat = [t for row in lists for t in row]
    return _call("gram", "gram", lists, names, range(len(lists[0])), False, lambda op: op(flat, len(lists)))


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
    rows, names, kept = _prepare("combine_", grads, directions)
    if not isinstance(weights, Tensor) or weights.shape != (len(rows),):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"combine_: weights must be a tensor of shape ({len(rows)},), got {shape}")
    if not rows[0]:
        return
    weights = weights.detach().to(rows[0][0].device, torch.float64)
    flat = [t for row in rows[1:] for t in row]
    _call("combine_", "combine_", rows, names, kept, True, lambda op: op(rows[0], flat, weights))


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
            negative inner product; ``("mix", gamma)`` adds gamma times every direction; a callable maps the [K + 1, K + 1]
            float64 Gram to [K + 1] weights.
        eps: added to every <d_k, d_k>; 0 is scale-free. Ignored by ``"mix"`` and callables.
        group: process group over which the buffers are sharded; None if every rank holds all of them.
        known: [K, K] Gram of the directions over the same buffers, if it is known already.
    Returns:
        Projection: tensors on the device of ``grads``.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one list; holds < 1 MiB.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict".
    """
    rule = methods.parse(method, eps)
    rows, names, kept = _prepare("project_", grads, directions)
    if not rows[0] and group is None:
        first = next((t for row in (grads, *directions) for t in row if t is not None), None)
        gram_ = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=None if first is None else first.device)
        return Projection(gram_, torch.eye(1, len(rows)).to(gram_)[0], "none")
    flat = [t for row in rows[1:] for t in row]
    if group is None and isinstance(rule, methods.Rule):
        gram_, weights = _call(
            "project_", "project_", rows, names, kept, True, lambda op: op(rows[0], flat, *rule, known)
        )
        return Projection(gram_, weights, select(rows[0][0].device.type).name)
    return _project_in_steps(rule, rows, flat, names, kept, group, known)


def _project_in_steps(rule, rows, flat, names, kept, group, known) -> Projection:
    num_rows = len(rows)
    if rows[0]:
        gram_ = _call("project_", "gram", rows, names, kept, True, lambda op: op([*rows[0], *flat], num_rows, known))
        name = select(rows[0][0].device.type).name
    else:
        gram_, name = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=distributed.device(group)), "none"
    if group is not None:
        gram_ = distributed.reduce_gram(gram_, group)
    weights = rule(gram_) if isinstance(rule, methods.Rule) else methods.apply_weighting(rule, gram_)
    if rows[0]:
        _call("project_", "combine_", rows, names, kept, True, lambda op: op(rows[0], flat, weights))
    return Projection(gram_, weights, name)


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


def _prepare(op: str, grads: Buffers, directions: Sequence[Buffers]):
    """Rows without the columns where the gradient is None, their names, and the user's index of each column."""
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    lists = _same_length(op, (grads, *directions), names)
    kept: Sequence[int] = range(len(lists[0]))
    if any(g is None for g in lists[0]):
        kept = [i for i, g in enumerate(lists[0]) if g is not None]
        lists = [[row[i] for i in kept] for row in lists]
    if lists[0] and not isinstance(lists[0][0], Tensor):
        validate.check(op, lists, names, kept, True)
    return _real(op, lists, names, kept, True), names, kept


def _real(op: str, lists: list[list[Tensor | None]], names: Sequence[str], kept: Sequence[int], written: bool):
    """Complex tensors as real views of their memory; a direction's lazy conjugation is carried out first."""
    if not any(isinstance(t, Tensor) and t.is_complex() for row in lists[: 1 if written else None] for t in row):
        return lists
    for i, g in zip(kept, lists[0], strict=True):
        if written and isinstance(g, Tensor) and g.is_conj():
            raise NotImplementedError(
                f"{op}: {names[0]}[{i}] is a lazy conjugate, whose memory holds something else; pass {names[0]}[{i}].conj()"
                f" with conjugated directions, or a tensor of its own ({names[0]}[{i}].resolve_conj())"
            )
    return [
        [torch.view_as_real(t.resolve_conj()) if isinstance(t, Tensor) and t.is_complex() else t for t in row]
        for row in lists
    ]


def _call(public: str, op: str, rows, names, kept, written: bool, run):
    """Run one op on the backend that fits, under the rules of the package: precise errors, no autograd, versions bumped."""
    backend = select(_device_type(public, rows, names, kept, written))
    function = backend.op(op)
    if backend.namespace != "gradproj":
        validate.check(public, rows, names, kept, written)
    try:
        with torch.no_grad():
            result = run(function)
    except RuntimeError:
        validate.check(public, rows, names, kept, written)
        raise
    if op != "gram" and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(rows[0])
    return result


def _device_type(public, rows, names, kept, written) -> str:
    first = next(t for row in rows for t in row if t is not None)
    if not isinstance(first, Tensor):
        validate.check(public, rows, names, kept, written)
    return first.device.type
