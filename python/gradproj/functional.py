"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the directions. A row is a list with one tensor (or None) per parameter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import call as calls
from gradproj import methods
from gradproj.backends import select
from gradproj.call import Call, Row
from gradproj.dtensors import PLAIN_TYPES
from gradproj.sharding import Local, Sharding, device_of, finish, localize, reduce


class Projection(NamedTuple):
    """What a projection did, as tensors on the device of the gradients: reading one synchronises, making it did not.

    With P parts, every tensor has a leading dimension of length P, but for ``finite`` and ``applied``, which are about all.

    Attributes:
        gram: [K + 1, K + 1] float64 inner products before the projection.
        weights: [K + 1] float64; the gradient became ``weights[0] g + sum_k weights[k] d_k``.
        backend: name of the backend that ran; "none" where there was no gradient.
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
        """0-d: length of the change over length of the gradient; 0 is untouched, 1 is all of it for a projection.

        0 for a gradient of length 0, of which nothing can be removed.
        """
        change = self.weights.clone()
        change[..., 0] -= 1.0
        finite = self.gram.isfinite().all(-1).all(-1)[..., None, None]
        gram = torch.where(finite, self.gram, torch.eye(change.shape[-1], dtype=torch.float64, device=change.device))
        square = (change[..., None, :] @ gram @ change[..., None])[..., 0, 0]
        length2 = gram[..., 0, 0]
        return torch.where(length2 > 0, square.clamp(min=0) / length2, 0.0).sqrt()

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


def gram(*rows: Row, sharding: Sharding | None = None) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
        sharding: of rows that are sharded over ranks, as far as DTensors do not say it.
    Returns:
        [R, R] float64 on the rows' device (CPU, or the group's device, if there is no tensor); the same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending row and index.
    Reads R N bytes, N being the size of one list. Float32 products (float64 as soon as one row is), float64 sums.
    """
    found, group = _local_gram(rows, sharding, None, (), 0)
    return reduce(found, group)


def local_gram(
    rows: Sequence[Row],
    sharding: Sharding | None,
    gram_dd: Tensor | None = None,
    part: Sequence[int] = (),
    num_parts: int = 0,
) -> Tensor:
    """What this rank adds to :func:`gram`, which is the sum over the ranks; no collective but those for Partial.

    Args:
        rows, sharding: as for :func:`gram`.
        gram_dd: [R - 1, R - 1] or [P, R - 1, R - 1], what this rank adds to the Gram of rows 1.., if that is known already.
        part, num_parts: the number, below P, of the part that each column belongs to; every part has a Gram of its own.
    Returns:
        [R, R], or [P, R, R] with parts.
    """
    return _local_gram(rows, sharding, gram_dd, part, num_parts)[0]


def _local_gram(rows, sharding, gram_dd, part, num_parts):
    if not rows:
        raise ValueError("gram: pass at least one list of tensors")
    call = calls.unpack("gram", rows, [f"rows[{r}]" for r in range(len(rows))], False, part, num_parts)
    local = _localize(call, sharding)
    call = call._replace(rows=local.rows)
    return calls.gram(call, local.weights, gram_dd, _device(call, local.group)), local.group


def combine_(grads: Row, directions: Sequence[Row], weights: Tensor) -> None:
    """``grads <- weights[0] grads + sum_k weights[1 + k] directions[k]`` in one pass, in place.

    Args:
        grads: one tensor or None per parameter. Modified; where it is None nothing is written.
        directions: K lists like ``grads``. Not modified. None counts as zeros.
        weights: [K + 1] tensor. A weight of exactly 0 means that its row is not read; (1, 0, .., 0) touches nothing.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads up to (K + 1) N bytes and writes N. Sums in float32 (float64 as soon as one row is), rounded once.
    """
    combine_parts(grads, directions, weights, (), 0)


def combine_parts(
    grads: Row, directions: Sequence[Row], weights: Tensor, part: Sequence[int], num_parts: int
) -> None:
    """:func:`combine_` with the weights [P, K + 1] of ``num_parts`` parts, ``part`` being the number of each column's."""
    call = _written("combine_", grads, directions, part, num_parts)
    expected = (*call.lead, len(call.rows))
    if not isinstance(weights, Tensor) or weights.shape != expected:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"combine_: weights must be a tensor of shape {expected}, got {shape}")
    local = localize(call.op, call.rows, call.names, call.index, True, None, products=False)
    calls.combine(call._replace(rows=local.rows), weights.detach())
    finish(local, weights)


def project_(
    grads: Row,
    *directions: Row,
    method: methods.Method = "orthogonal",
    eps: float = 0.0,
    sharding: Sharding | None = None,
) -> Projection:
    """Remove from ``grads`` what conflicts with ``directions``, in place.

    Args:
        grads: one tensor (or None) per parameter; any shapes, floating or complex dtypes, strides, devices. Modified.
        directions: K lists like ``grads``. Not modified. None counts as zeros, and so does a whole direction where
            ``grads`` is None, so that the result is exactly orthogonal on what can be written.
        method: ``"orthogonal"`` removes the whole span of the directions; ``"conflict"`` takes the nearest vector with no
            negative inner product; ``"pcgrad"`` projects every row, ``grads`` and the directions, off the rows that it
            conflicts with, in ascending order, and sums them; ``("mix", gamma)`` adds gamma times every direction; a
            callable, such as a ``torchjd.aggregation.*Weighting``, maps the [K + 1, K + 1] float64 Gram to [K + 1] weights.
        eps: added to every <d_k, d_k>, and to <g, g> in ``"pcgrad"``; 0 is scale-free. Ignored by ``"mix"`` and callables.
        sharding: of rows that are sharded over ranks, as far as DTensors do not say it; every rank of its group must make the
            call, one that owns nothing included.
    Returns:
        Projection: tensors on the device of ``grads``, the same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one rank's list; holds < 1 MiB. With a group, one all_reduce of
    (K + 1)(K + 2) / 2 float64 numbers. Partial DTensors are reduced first, one all_reduce and one copy each; a gradient stays
    Partial and its first rank holds the result, the others zeros.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict"; Yu
    et al. 2020 (PCGrad).
    """
    return project_rows(grads, directions, methods.parse(method, eps), sharding)


def project_rows(
    grads: Row,
    directions: Sequence[Row],
    rule: methods.Rule | methods.Weighting,
    sharding: Sharding | None = None,
    gram_dd: Tensor | None = None,
    part: Sequence[int] = (),
    num_parts: int = 0,
) -> Projection:
    """:func:`project_` for who keeps the directions.

    Args:
        gram_dd: [K, K] or [P, K, K], this rank's :func:`local_gram` of the directions over the columns that have a gradient,
            if it is known already.
        part, num_parts: the number, below P, of the part that each column belongs to; every part is projected by itself, in
            the same passes and the same collective.
    """
    call = _written("project_", grads, directions, part, num_parts)
    # One op does it all where every rank is for itself. Directions are not inspected: the op rejects a DTensor.
    one_op = sharding is None and isinstance(rule, methods.Rule) and call.types <= PLAIN_TYPES
    if one_op and call.rows[0] and not calls.spans_devices(call):
        products, weights = calls.run(call, "project_", *rule, gram_dd)
        return Projection(products, weights, select(products.device.type).name)

    local = _localize(call, sharding)
    done = _weigh(call, local, rule, gram_dd)
    calls.combine(call._replace(rows=local.rows), done.weights)
    finish(local, done.weights)
    return done


def weigh_rows(
    grads: Row,
    directions: Sequence[Row],
    rule: methods.Rule | methods.Weighting,
    sharding: Sharding | None,
    gram_dd: Tensor | None,
    part: Sequence[int],
    num_parts: int,
) -> Projection:
    """What :func:`project_rows` would do; nothing is written."""
    call = _written("project_", grads, directions, part, num_parts)
    return _weigh(call, _localize(call, sharding), rule, gram_dd)


def _weigh(call: Call, local: Local, rule: methods.Rule | methods.Weighting, gram_dd: Tensor | None) -> Projection:
    call = call._replace(rows=local.rows)
    products = reduce(calls.gram(call, local.weights, gram_dd, _device(call, local.group)), local.group)
    if isinstance(rule, methods.Rule):  # the same op on every rank, one that owns nothing included
        weights = select(products.device.type).op("weights")(products, *rule)
    else:
        weights = methods.apply_weighting(rule, products)
    backend = select(calls.first(call).device.type).name if call.rows[0] else "none"
    return Projection(products, weights, backend)


def orthogonal_gradient_projection(
    model: torch.nn.Module,
    safety_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    capability_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    eps: float = 1e-8,
    sharding: Sharding | None = None,
) -> Projection:
    """The naive algorithm's signature, fused: afterwards ``p.grad`` holds the projected safety gradient.

    Args:
        model: its parameters' ``.grad`` are replaced. They may be DTensors (FSDP2, tensor parallel).
        safety_loss: scalar, or a function of the model that returns one.
        capability_loss: likewise; its forward and backward pass come first. DDP needs functions: it reduces the gradients of
            the first backward pass after a forward pass, and of no other.
        eps: added to <d, d>, as the naive version does. With short gradients it leaves some of the conflict behind; 0 does not.
        sharding: where the model is sharded over ranks; see :func:`project_`.
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
    return project_(grads, direction, method="orthogonal", eps=eps, sharding=sharding)


def _written(op: str, grads: Row, directions: Sequence[Row], part: Sequence[int], num_parts: int) -> Call:
    if not directions:
        raise ValueError(f"{op}: pass at least one direction")
    names = ["grads", *(f"directions[{k}]" for k in range(len(directions)))]
    return calls.unpack(op, (grads, *directions), names, True, part, num_parts)


def _localize(call: Call, sharding: Sharding | None) -> Local:
    if isinstance(sharding, Sharding) and sharding.owned is not None and len(sharding.owned) != call.count:
        raise ValueError(
            f"{call.op}: Sharding.owned has {len(sharding.owned)} entries for {call.count} parameters; pass one bool for each"
        )
    return localize(call.op, call.rows, call.names, call.index, call.written, sharding)


def _device(call: Call, group) -> torch.device:
    """Where this rank's Gram is made: beside the first tensor; without any, where the group communicates."""
    if any(t is not None for row in call.rows for t in row):
        return calls.first(call).device
    return torch.device("cpu") if group is None else device_of(group)
