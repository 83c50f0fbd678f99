"""What one would write with torch alone: the best compositions for K directions, method "orthogonal".

Each takes (grads, directions) and works in place, without flat copies. ``torch.dot`` per tensor and ``add_`` per tensor
is near the limit on large tensors; ``_foreach_*`` saves overhead on small ones and pays with temporaries.
"""

import torch
from torch import Tensor

Rows = list[list[Tensor]]


def _weights(products: Tensor) -> Tensor:
    """[K] from the [K, K + 1] products of the directions with all rows, the gradient first."""
    if len(products) == 1:
        return -products[0, :1] / products[0, 1]
    return torch.linalg.solve(products[:, 1:], -products[:, 0])


def _dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True)]).sum(dtype=torch.float64)


def _dot_weights(grads: list[Tensor], directions: Rows) -> list[float]:
    """By ``torch.dot`` per tensor. Reads K N (K + 3) bytes."""
    k = len(directions)
    products = torch.empty(k, k + 1, dtype=torch.float64)
    for i, d in enumerate(directions):
        products[i, 0] = _dots(d, grads)
        for j in range(i, k):
            products[i, j + 1] = products[j, i + 1] = _dots(d, directions[j])
    return _weights(products).tolist()


def dot_add(grads: list[Tensor], directions: Rows) -> None:
    """``torch.dot`` and ``add_(alpha)`` per tensor. The update moves 3 K N bytes."""
    for w, d in zip(_dot_weights(grads, directions), directions, strict=True):
        for x, y in zip(grads, d, strict=True):
            x.add_(y, alpha=w)


def dot_foreach_add(grads: list[Tensor], directions: Rows) -> None:
    """The same with one ``_foreach_add_`` per direction."""
    for w, d in zip(_dot_weights(grads, directions), directions, strict=True):
        torch._foreach_add_(grads, d, alpha=w)


def _foreach_dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([t.sum(dtype=torch.float64) for t in torch._foreach_mul(a, b)]).sum()


def foreach(grads: list[Tensor], directions: Rows) -> None:
    """``_foreach_mul``, sums, ``_foreach_norm`` and ``_foreach_add_``: few calls, a temporary of N."""
    k = len(directions)
    products = torch.empty(k, k + 1, dtype=torch.float64, device=grads[0].device)
    for i, d in enumerate(directions):
        products[i, 0] = _foreach_dot(d, grads)
        norms = torch.stack(torch._foreach_norm(d)).double()
        products[i, i + 1] = (norms * norms).sum()
        for j in range(i + 1, k):
            products[i, j + 1] = products[j, i + 1] = _foreach_dot(d, directions[j])
    for w, d in zip(_weights(products).tolist(), directions, strict=True):
        torch._foreach_add_(grads, d, alpha=w)


def device_coefficient(grads: list[Tensor], directions: Rows) -> None:
    """No host synchronisation: the coefficient stays on the device, which costs a temporary of N. What one compiles."""
    (direction,) = directions
    gd = sum(torch.dot(x.view(-1), y.view(-1)) for x, y in zip(grads, direction, strict=True))
    dd = sum(torch.dot(y.view(-1), y.view(-1)) for y in direction)
    c = -gd / dd
    for x, y in zip(grads, direction, strict=True):
        x.add_(c * y)


EAGER = {"dot + add_": dot_add, "dot + foreach_add_": dot_foreach_add, "foreach": foreach}
