"""The naive algorithms and the float64 oracles. Read this file first: all the others compute these numbers, faster.

The naive functions are what training scripts do today, so that a benchmark against them is fair. The oracles do the
same arithmetic in float64 on one flat matrix; every kernel is tested against them.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Buffers = Sequence[Tensor | None]
Loss = Callable[[nn.Module], Tensor] | Tensor


def flatten(buffers: Sequence[Tensor]) -> Tensor:
    """One new 1-d tensor that holds all of ``buffers`` one after the other. Moves 2 N bytes, holds N."""
    return torch.cat([b.reshape(-1) for b in buffers])


def unflatten_(buffers: Sequence[Tensor], flat: Tensor) -> None:
    """Copy the slices of ``flat`` back into ``buffers``."""
    for b, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        b.copy_(part.view_as(b))


def project_(grads: Sequence[Tensor], direction: Sequence[Tensor], eps: float = 1e-8) -> None:
    """Naive orthogonal gradient projection for one direction, in place: cat, cat, dot, dot, mul, sub, copy back.

    Moves about 15 N bytes and holds about 4 N more, N being the bytes of one list. No None, no shards, one dtype.
    """
    g, d = flatten(grads), flatten(direction)
    coefficient = torch.dot(g, d) / (torch.dot(d, d) + eps)
    unflatten_(grads, g - coefficient * d)


def orthogonal_gradient_projection(model: nn.Module, safety_loss: Loss, capability_loss: Loss) -> None:
    """The naive training-loop form: two backward passes, then :func:`project_` on ``p.grad`` of every parameter.

    Losses are scalars or functions of the model. Afterwards ``p.grad`` holds the projected safety gradient.
    A parameter without a gradient in one of the passes would shift every later slice: the naive version refuses.
    """
    losses = [loss(model) if callable(loss) else loss for loss in (capability_loss, safety_loss)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        row = [p.grad for p in parameters if p.grad is not None]
        if len(row) < len(parameters):
            name = "reference.orthogonal_gradient_projection"
            raise ValueError(f"{name}: every parameter needs a gradient in both passes")
        rows.append(row)
    capability, safety = rows
    project_(safety, capability)


def pin_(weight: Tensor, basis: Tensor, target: Tensor) -> Tensor:
    """W - (W U - B) U^T, as one writes it. Moves about 5 N bytes and holds N more, N being the bytes of the weight."""
    return weight - (weight @ basis - target) @ basis.T


class NaiveBasis(NamedTuple):
    """U [inputs, r] and B = W U [outputs, r] of a layer, float64, and the mean curvature that U leaves in it."""

    basis: Tensor
    target: Tensor
    left: float


def null_space(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], share: float = 0.05
) -> dict[str, NaiveBasis]:
    """Naive form of what :class:`gradproj.NullSpace` captures, for the ``nn.Linear`` layers of a model, by their names.

    Afterwards W <- ``pin_(W, U, B)`` after every step of any optimizer keeps W U = B; a bias is W's last column. Holds
    an inputs x inputs matrix for every layer, and all of its eigenvectors.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weight = {name: _with_bias(m) for name, m in layers.items()}
    moment: dict[str, Any] = dict.fromkeys(layers, 0)  # sum of x x^T over the tokens
    square, tokens = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)  # sum of the mean y^2, and how many tokens

    def listen(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach().double().flatten(0, -2)
        if module.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)

        def add(gradient: Tensor) -> None:
            y = gradient.double().flatten(0, -2)
            counts = (y != 0).any(1)  # false for padding
            moment[name] += x[counts].T @ x[counts]
            square[name] += float(y.square().mean(1).sum())
            tokens[name] += int(counts.sum())

        output.register_hook(add)

    handles = [m.register_forward_hook(partial(listen, name)) for name, m in layers.items()]
    for batch in batches:
        loss(model, batch).backward()
    for handle in handles:
        handle.remove()

    values, vectors, scale, curvature = {}, {}, {}, []
    for name in layers:
        values[name], vectors[name] = (t.flip(-1) for t in torch.linalg.eigh(moment[name] / tokens[name]))
        scale[name] = square[name] / tokens[name]  # the loss has curvature scale * value along an eigenvector
        curvature += [(scale[name] * float(a), name) for a in values[name] if a > 1e-6 * values[name][0]]

    budget, rank = share * sum(w.numel() for w in weight.values()), dict.fromkeys(layers, 0)
    for _, name in sorted(curvature, reverse=True):
        budget -= len(weight[name])  # an eigenvector fixes as many weights as its layer has outputs
        if budget < 0:
            break
        rank[name] += 1

    bases = {}
    for name, r in rank.items():
        basis, others = vectors[name][:, :r], values[name][r:]
        left = scale[name] * float(others.sum() / max(1, len(others)))
        bases[name] = NaiveBasis(basis, weight[name] @ basis, left)
    return bases


def _with_bias(module: nn.Linear) -> Tensor:
    """W in float64; a bias is one more column, whose input is always 1."""
    columns = [module.weight] if module.bias is None else [module.weight, module.bias[:, None]]
    return torch.cat(columns, dim=1).detach().double()


def damped_rates(left: Sequence[float], weights: Sequence[int], damping: float) -> list[float]:
    """Layer-wise factors 1 / (1 + left / c) of a learning rate, with c such that 1 - factor is ``damping`` in the mean
    over the weights."""
    low, high = 1e-30, 1e30
    for _ in range(500):
        c = (low * high) ** 0.5
        mean = sum(w * x / (x + c) for x, w in zip(left, weights, strict=True)) / sum(weights)
        low, high = (c, high) if mean > damping else (low, c)
    return [c / (x + c) for x in left]


def matrix(rows: Sequence[Buffers]) -> np.ndarray:
    """[R, numel] float64 matrix of the rows; None counts as zeros. A column that is None in every row is left out."""
    columns = []
    for column in zip(*rows, strict=True):
        like = next((t for t in column if t is not None), None)
        if like is not None:
            zeros = np.zeros_like(_float64(like))
            columns.append(np.stack([zeros if t is None else _float64(t) for t in column]))
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0))


def _float64(t: Tensor) -> np.ndarray:
    real = torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
    return real.double().cpu().reshape(-1).numpy()


def oracle_gram(*rows: Buffers) -> np.ndarray:
    """[R, R] float64 inner products."""
    m = matrix(rows)
    with np.errstate(invalid="ignore", over="ignore"):
        return m @ m.T


def oracle_combine(grads: Buffers, directions: Sequence[Buffers], weights: Sequence[float]) -> list[np.ndarray | None]:
    """float64 ``w_0 g + sum_k w_k d_k`` per buffer, flat; rows of weight 0 are not read."""
    out: list[np.ndarray | None] = []
    for g, *others in zip(grads, *directions, strict=True):
        terms = [w * _float64(t) for w, t in zip(weights, (g, *others), strict=True) if w != 0 and t is not None]
        out.append(None if g is None else sum(terms, start=np.zeros_like(_float64(g))))
    return out


def oracle_pin(
    weight: Tensor, basis: Tensor, target: Tensor | None = None, bias: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """float64 ``W - (W U - B) U^T``, the bias being one more column of W: the new weight, the new bias, and
    ``|W U - B|``."""
    whole = weight.detach() if bias is None else torch.cat([weight.detach(), bias.detach()[:, None]], dim=1)
    w, u = whole.double().cpu().numpy(), basis.double().cpu().numpy()
    moved = w @ u - (0.0 if target is None else target.double().cpu().numpy())
    w = w - moved @ u.T
    inputs = weight.shape[1]
    return w[:, :inputs], None if bias is None else w[:, inputs], float(np.linalg.norm(moved))


def oracle_weights(gram: np.ndarray, method: str | tuple[str, float] = "orthogonal", eps: float = 0.0) -> np.ndarray:
    """Weights of a method by numpy's pseudo-inverse (``orthogonal``), enumeration of active sets (``conflict``), and
    the paper's own loop in coefficients of the rows (``pcgrad``); part by part if ``gram`` is [P, R, R]."""
    if gram.ndim == 3:
        return np.stack([oracle_weights(part, method, eps) for part in gram])
    k = len(gram) - 1
    weights = np.eye(1, k + 1)[0]
    if not np.isfinite(gram).all():
        return weights
    if isinstance(method, tuple):
        weights[1:] = method[1]
        return weights
    if method == "pcgrad":
        return np.sum([_surgery(gram, i, eps) for i in range(k + 1)], axis=0)
    length = np.sqrt(np.maximum(np.diag(gram)[1:] + eps, 0))
    scale = np.divide(1.0, length, out=np.zeros(k), where=length > 0)
    cosines = (gram[1:, 1:] + eps * np.eye(k)) * np.outer(scale, scale)
    target = -gram[1:, 0] * scale
    if method == "orthogonal":
        weights[1:] = np.linalg.pinv(cosines, rcond=1e-8, hermitian=True) @ target * scale
        return weights
    best = np.inf
    for active in range(2**k):
        chosen = [i for i in range(k) if active >> i & 1]
        x = np.zeros(k)
        if chosen:
            x[chosen] = np.linalg.pinv(cosines[np.ix_(chosen, chosen)], rcond=1e-8, hermitian=True) @ target[chosen]
        value = x @ cosines @ x / 2 - target @ x
        if (x >= 0).all() and value < best - 1e-12 * max(1.0, gram[0, 0]):
            best, weights[1:] = value, x * scale
    return weights


def _surgery(gram: np.ndarray, i: int, eps: float) -> np.ndarray:
    """Coefficients of row i after it was projected off every other row that it conflicts with when its turn comes."""
    row = np.eye(len(gram))[i]
    for j in range(len(gram)):
        if j != i and (product := gram[j] @ row) < 0:
            row[j] -= product / (gram[j, j] + eps)
    return row


def oracle_project(
    grads: Buffers, directions: Sequence[Buffers], method: str | tuple[str, float] = "orthogonal", eps: float = 0.0
) -> list[np.ndarray | None]:
    """float64 projection of ``grads``, flat per buffer. Inner products run over the buffers where g is not None."""
    kept = [i for i, g in enumerate(grads) if g is not None]
    rows = [[row[i] for i in kept] for row in (grads, *directions)]
    return oracle_combine(grads, directions, list(oracle_weights(oracle_gram(*rows), method, eps)))
