"""Registers the operations as ``gradproj_triton``: on CUDA, and in the interpreter on CPU tensors."""

import os

from torch import Tensor

from gradproj.methods import Rule
from gradproj.ops import implement
from gradproj.triton_kernels.combine import combine, combine_
from gradproj.triton_kernels.gram import gram, products
from gradproj.triton_kernels.table import Rows, small
from gradproj.triton_kernels.weights import weights


def project_(
    grads: list[Tensor], directions: list[Tensor | None], method: str, gamma: float, eps: float,
    known: Tensor | None = None, base: list[Tensor | None] | None = None, scales: list[Tensor | None] | None = None,
    parts: tuple[int, ...] = (), num_parts: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``project_``; see ``gradproj.ops``. For one direction three launches: gram, finish with the weights, combine."""
    rows = Rows.to_write(grads, directions, base, scales, parts, num_parts)
    count = rows.num_rows - 1
    known = small(known, (*rows.lead, count, count), rows, "known")
    result, found = products(rows, known, Rule(method, gamma, eps))
    if found is None:
        found = weights(result, method, gamma, eps)
    combine(rows, found)
    return result, found


for _function in (gram, weights, combine_, project_):
    implement("gradproj_triton", _function.__name__, _function, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        implement("gradproj_triton", _function.__name__, _function, "CPU")

from gradproj.triton_kernels import pin  # noqa: E402, F401  registers itself
