"""Stateless projection on lists of tensors: :func:`gram`, :func:`combine_`, :func:`project_`, :func:`pin_`.

Row 0 is the gradient, rows 1..K the directions. A row is a list with one tensor (or None) per parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradproj.kernels import methods
from gradproj.kernels.backends import select
from gradproj.rows import call as calls
from gradproj.rows.call import Call, Row
from gradproj.rows.dtensors import PLAIN_TYPES
from gradproj.rows.results import Projection
from gradproj.rows.sharding import Local, Sharding, device_of, finish, localize, reduce


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
    call, local = localize(calls.unpack("gram", rows), sharding)
    return reduce(_products(call, local, None), local.group)


def local_gram(
    rows: Sequence[Row],
    sharding: Sharding | None,
    gram_dd: Tensor | None = None,
    part: Sequence[int] = (),
    num_parts: int = 0,
) -> Tensor:
    """This rank's summand of :func:`gram`, or of the Gram [P, R, R] of the parts. Communicates only to reduce Partial.
    ``gram_dd``: the summand for rows 1.., if it is known already."""
    call, local = localize(calls.unpack("gram", rows, part, num_parts), sharding)
    return _products(call, local, gram_dd)


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
    call = calls.unpack("combine_", [grads, *directions])
    expected = (len(call.rows),)
    if not isinstance(weights, Tensor) or weights.shape != expected:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"combine_: weights must be a tensor of shape {expected}, got {shape}")
    call, local = localize(call, None, products=False)
    calls.combine(call, weights.detach())
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
        method: ``"orthogonal"`` removes the whole span of the directions; ``"conflict"`` takes the nearest vector with
            no negative inner product; ``"pcgrad"`` projects every row, ``grads`` and the directions, off the rows that
            it conflicts with, in ascending order, and sums them; ``("mix", gamma)`` adds gamma times every direction; a
            callable, such as a ``torchjd.aggregation.*Weighting``, maps the [K + 1, K + 1] float64 Gram to [K + 1]
            weights.
        eps: added to every <d_k, d_k>, and to <g, g> in ``"pcgrad"``; 0 is scale-free. Ignored by ``"mix"`` and
            callables.
        sharding: of rows that are sharded over ranks, as far as DTensors do not say it; every rank of its group must
            make the call, one that owns nothing included.
    Returns:
        Projection: tensors on the device of ``grads``, the same on every rank.
    Raises:
        ValueError, TypeError, NotImplementedError: naming the first offending list and index. Nothing is written.
    Reads (2 K + 2) N bytes and writes N, N being the size of one rank's list; holds < 1 MiB. With a group, one
    all_reduce of (K + 1)(K + 2) / 2 float64 numbers. Partial DTensors are reduced first, one all_reduce and one copy
    each; a gradient stays Partial and its first rank holds the result, the others zeros.
    Source: Farajtabar et al. 2020 (OGD); Chaudhry et al. 2019 (A-GEM) and Lopez-Paz & Ranzato 2017 (GEM) for
    "conflict"; Yu et al. 2020 (PCGrad); Ouyang et al. 2022 (PTX) for "mix".
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
    """:func:`project_` for callers that keep ``gram_dd``, this rank's :func:`local_gram` of the directions over the
    columns that have a gradient, or that project several parts each by itself, in the same passes and collective."""
    call = calls.unpack("project_", [grads, *directions], part, num_parts)
    # Without other ranks one op does it all. Directions are not inspected: the op rejects a DTensor.
    alone = sharding is None and call.types <= PLAIN_TYPES
    if alone and isinstance(rule, methods.Rule) and call.rows[0] and not calls.spans_devices(call):
        products, weights = calls.run(call, "project_", *rule, gram_dd)
        return Projection(products, weights, select(products.device.type).name)

    call, local = localize(call, sharding)
    products = reduce(_products(call, local, gram_dd), local.group)
    if isinstance(rule, methods.Rule):  # the same op on every rank, even one that owns nothing
        weights = select(products.device.type).op("weights")(products, *rule)
    else:
        weights = methods.apply_weighting(rule, products)
    calls.combine(call, weights)
    finish(local, weights)
    backend = select(calls.first(call).device.type).name if call.rows[0] else "none"
    return Projection(products, weights, backend)


def orthogonal_gradient_projection(
    model: torch.nn.Module,
    safety_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    capability_loss: Callable[[torch.nn.Module], Tensor] | Tensor,
    eps: float = 1e-8,
    sharding: Sharding | None = None,
) -> Projection:
    """The naive algorithm in one call: afterwards ``p.grad`` holds the projected safety gradient.

    Args:
        model: its parameters' ``.grad`` are replaced. They may be DTensors (FSDP2, tensor parallel).
        safety_loss: scalar, or a function of the model that returns one.
        capability_loss: likewise; its forward and backward pass come first. DDP needs functions: it reduces only the
            first backward pass after a forward pass.
        eps: added to <d, d>, as the naive version does. With short gradients some conflict is left; with 0, none.
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


def _products(call: Call, local: Local, gram_dd: Tensor | None) -> Tensor:
    """This rank's Gram, on the device of the first tensor; without any, where the group communicates."""
    device = torch.device("cpu")
    if any(t is not None for row in call.rows for t in row):
        device = calls.first(call).device
    elif local.group is not None:
        device = device_of(local.group)
    return calls.gram(call, local.weights, gram_dd, device)


def pin_(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    targets: Sequence[Tensor | None] | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """``W <- W - (W U - B) U^T`` in place, for every weight: afterwards W U = B; inputs orthogonal to U see the old W.

    Args:
        weights: [o, i] each, any strides; float32, float64, bfloat16 or float16. Modified.
        bases: U [i, r], orthonormal, r >= 0; with a bias [i + 1, r], whose last row is for the bias's input, 1. For a
            bfloat16 weight it may be the pair that :func:`split_basis` makes, which Triton's kernel is made for.
        targets: B [o, r], or None for zeros, the form for gradients; None if all are.
        biases: [o] each or None; treated as one more column of W. Modified.
    Returns:
        [L] float64: ``|W U - B|`` before, Frobenius. On the weights' device; of several, on the first that is not the
        CPU.
    Raises:
        ValueError, TypeError, NotImplementedError: naming list, index, shape, dtype, device. Nothing is written.
    Reads every weight, U and B once and writes every weight once; holds < 1 MiB, or up to 32 MiB where plain torch runs
    on a GPU. W U is summed in float32 (float64 for float64). A repeated call recognises the buffers by their addresses
    and does not check them again.
    Source: Saha et al. 2021 (GPM) and Fang et al. 2025 (AlphaEdit) for the projection, here of weights instead of
    updates.
    """
    absent = [None] * len(weights)
    rows = [weights, bases, absent if targets is None else targets, absent if biases is None else biases]
    return calls.pin(calls.unpack("pin_", rows)).sqrt_()


def split_basis(basis: Tensor) -> Tensor:
    """U [i, r] as a bfloat16 pair [2, i, r], high and low, whose sum is U to 16 bits. Every column is dense and starts
    on a 16-byte boundary, so that tensor cores can take it from memory as it is."""
    inputs, rank = basis.shape
    pair = basis.new_zeros(2, rank, -(-inputs // 8) * 8, dtype=torch.bfloat16)[:, :, :inputs].mT
    pair[0] = basis
    pair[1] = basis - pair[0]
    return pair


def split_bases(weights: Sequence[Tensor], bases: Sequence[Tensor]) -> list[Tensor]:
    """The bases, as pairs where Triton pins a bfloat16 weight. Those that are leading columns of the same ones stay
    so."""
    wanted = [w.dtype == torch.bfloat16 and select(w.device.type, "pin_").name == "triton" for w in weights]
    places = [(u.data_ptr(), u.stride(), u.shape[0]) for u in bases]
    pairs: dict[tuple, Tensor] = {}
    for u, place, split in sorted(zip(bases, places, wanted, strict=True), key=lambda entry: -entry[0].shape[1]):
        if split and place not in pairs:
            pairs[place] = split_basis(u)
    found = zip(bases, places, wanted, strict=True)
    return [pairs[place][:, :, : u.shape[1]] if split else u for u, place, split in found]
