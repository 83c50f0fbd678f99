"""Gram, its weights, and the combination, on one table."""

from collections.abc import Sequence

from torch import Tensor

from gradproj.kernels.methods import Rule
from gradproj.triton_kernels.combine import combine
from gradproj.triton_kernels.gram import products
from gradproj.triton_kernels.op import implement
from gradproj.triton_kernels.table import Table, check_small
from gradproj.triton_kernels.weights import weights


@implement
def project_(
    grads: list[Tensor], directions: list[Tensor | None], method: str, gamma: float, eps: float,
    gram_dd: Tensor | None = None, part: Sequence[int] = (), num_parts: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``project_``; see ``gradproj.kernels.ops``. Up to 8 directions take three launches: Gram, its finish with
    the weights, combine."""
    table = Table.to_write(grads, directions, part, num_parts)
    check_small(gram_dd, (table.num_rows - 1, table.num_rows - 1), table, "gram_dd")
    gram, found = products(table, gram_dd, Rule(method, gamma, eps))
    if found is None:
        found = weights(gram, method, gamma, eps)
    combine(table, found)
    return gram, found
