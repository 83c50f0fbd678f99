"""Registers the operations as ``gradproj_triton``: on CUDA, and in the interpreter on CPU tensors."""

import os

from torch import Tensor

from gradproj.ops import implement
from gradproj.triton_kernels.combine import combine_
from gradproj.triton_kernels.gram import gram
from gradproj.triton_kernels.weights import weights


def project_(
    grads: list[Tensor],
    directions: list[Tensor | None],
    method: str,
    gamma: float,
    eps: float,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = [*grads, *directions]
    products = gram(rows, len(rows) // len(grads), known)
    found = weights(products, method, gamma, eps)
    combine_(grads, directions, found)
    return products, found


for _function in (gram, weights, combine_, project_):
    implement("gradproj_triton", _function.__name__, _function, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        implement("gradproj_triton", _function.__name__, _function, "CPU")
