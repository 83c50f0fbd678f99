"""What a projection did, and what a pin did: a few device tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """What a projection did, as tensors on the device of the gradients: reading one synchronises, making it did not.

    With P parts every tensor has a leading dimension of length P, except ``finite`` and ``applied``.

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
        """0-d: length of the change over length of the gradient, 0 if that is 0. 1: a projection removed everything."""
        change = self.weights.clone()
        change[..., 0] -= 1.0
        finite = self.gram.isfinite().all(-1).all(-1)[..., None, None]
        gram = torch.where(finite, self.gram, torch.eye(change.shape[-1], dtype=torch.float64, device=change.device))
        square = (change[..., None, :] @ gram @ change[..., None])[..., 0, 0]
        length2 = gram[..., 0, 0]
        return torch.where(length2 > 0, square.clamp(min=0) / length2, 0.0).sqrt()

    @property
    def ignored(self) -> Tensor:
        """[K] bool: directions that are zero wherever there is a gradient; they take no part in a projection."""
        return self.gram.diagonal(dim1=-2, dim2=-1)[..., 1:] == 0

    @property
    def finite(self) -> Tensor:
        """0-d bool: whether every inner product was finite."""
        return self.gram.isfinite().all()

    @property
    def applied(self) -> Tensor:
        """0-d bool: whether the gradient was written. False for a non-finite Gram and where nothing conflicts."""
        return (self.weights[..., 0] != 1).any() | (self.weights[..., 1:] != 0).any()


class Pin(NamedTuple):
    """What a :class:`gradproj.NullSpace` has put back.

    Attributes:
        names: of the layers.
        moved: [L] float64 on the device: Frobenius norm of W U - B before, per layer.
    """

    names: tuple[str, ...]
    moved: Tensor
