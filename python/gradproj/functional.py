"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`.

Row 0 is the gradient, rows 1..K the protected directions. A row is a list with one tensor (or None) per parameter; a
direction may also be a :class:`gradproj.float8.Float8Row`, and lie in host memory (:class:`gradproj.offload.HostRow`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradproj import distributed, methods
from gradproj.backends import select
from gradproj.call import Buffers, Row, gram_call, prepare


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
        gram = torch.where(finite, self.gram, torch.eye(change.shape[-1], dtype=torch.float64, device=change.device))
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
    *rows: Row,
    known: Tensor | None = None,
    base: Buffers | None = None,
    parts: Sequence[int] | None = None,
    group=None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
) -> Tensor:
    """All inner products of the rows in one pass.

    Args:
        rows: R >= 1 lists of the same length; any shapes, strides and floating or complex dtypes, equal shapes within a
            column. None counts as zeros. Not modified.
        known: [R - 1, R - 1] Gram of rows 1.., if it is known already: then only the products with row 0 are computed.
        base: a list like row 0, which then stands for ``base - row 0``, taken in the kernels.
        parts: the number of the part that each column belongs to, from 0; every part gets a Gram of its own.
        group, plain, counted: of rows that are spread over ranks; see :func:`project_`. ``known`` is of the whole rows.
    Returns:
        [R, R] float64, or [P, R, R] with P parts, on the rows' device (CPU, or the group's device, if there is no tensor); the
        same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending row and index.
    Reads R N bytes, N being the size of one list. Float32 products (float64 as soon as one row is), float64 sums.
    """
    return gram_call("gram", rows, base, parts, distributed.Spread(group, plain, counted)).gram(known)


def share(
    *rows: Row,
    known: distributed.Share | None = None,
    like: Buffers | None = None,
    base: Buffers | None = None,
    parts: Sequence[int] | None = None,
    group=None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
) -> distributed.Share:
    """What this rank adds to :func:`gram`, which is the sum of all ranks' shares. No collective but those for Partial.

    To keep the Gram of directions that stay: :func:`project_` takes it as ``known`` and adds the ranks' shares up in its one
    collective. Arguments as of :func:`gram`; ``known`` is this rank's share of the Gram of rows 1.., ``like`` a list that lies
    over the ranks as the rows do: float8 rows do not tell.
    """
    call = gram_call("share", rows, base, parts, distributed.Spread(group, plain, counted), like)
    return distributed.Share(call.share(None if known is None else known.gram))


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
    call = prepare("combine_", grads, directions, base, parts, None)
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
    known: Tensor | distributed.Share | None = None,
    base: Buffers | None = None,
    parts: Sequence[int] | None = None,
    plain: distributed.Plain | None = None,
    counted: Sequence[bool] | None = None,
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
        group: process group over which the rows are spread; every rank of it must make the call, one that owns nothing
            included. Not needed for DTensors on a mesh that covers the world. None with plain tensors: this rank holds all.
        known: [K, K] Gram of the directions over the same buffers of all ranks, if it is known already, or this rank's
            :func:`share` of it.
        base: a list like ``grads``: parameters before an optimizer's step, of which ``grads`` are then the parameters after.
            What is projected is ``base - grads``, what the step took off, and the result is written as parameters again.
        parts: the number of the part that each column belongs to, from 0. Every part is projected by itself, in the same
            passes and the same collective; ``known`` then is [P, K, K].
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
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for "conflict"; Yu
    et al. 2020 (PCGrad).
    """
    rule = methods.parse(method, eps)
    call = prepare("project_", grads, directions, base, parts, distributed.Spread(group, plain, counted))
    if call.rows[0] and call.shards is None and isinstance(rule, methods.Rule):
        # Nothing is spread, and a share is the whole.
        products, weights = call.project(rule, known.gram if isinstance(known, distributed.Share) else known)
        return Projection(products, weights, call.backend.name)

    products = call.gram(known)
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
