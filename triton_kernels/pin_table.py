"""From lists of weights and bases to the tables that the pin walks: the host's part."""

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from gradproj.kernels import validate
from gradproj.triton_kernels.cache import upload
from gradproj.triton_kernels.combine import INTERPRETED
from gradproj.triton_kernels.op import refusing

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Line(NamedTuple):
    """A layer in the table. Strides are in elements.

    Attributes:
        weight, basis, target, bias: addresses; 0 without a target or a bias.
        number: of the layer among all, which is its place in the result.
        programs: that share its rows.
        first: the number of the first of them.
    """

    weight: int
    basis: int
    target: int
    bias: int
    outputs: int
    inputs: int
    rank: int
    weight_row: int
    weight_column: int
    basis_row: int
    basis_column: int
    target_row: int
    target_column: int
    bias_stride: int
    number: int
    programs: int
    first: int


# Where a line has them, for the kernels: the fields of Line, in its order.
(
    WEIGHT, BASIS, TARGET, BIAS, OUTPUTS, INPUTS, RANK, WEIGHT_ROW, WEIGHT_COLUMN, BASIS_ROW, BASIS_COLUMN, TARGET_ROW,
    TARGET_COLUMN, BIAS_STRIDE, NUMBER, PROGRAMS, FIRST,
) = map(tl.constexpr, range(len(Line._fields)))  # fmt: skip
FIELDS = tl.constexpr(len(Line._fields))


class Form(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        dtype: of the weights.
        layout: ``"rows"``: neighbours in a row of W are neighbours in memory, and every row starts on a 16-byte
            boundary; ``"columns"``: the same of columns, as in a transposed weight; ``"strided"``: anything. In the
            first two every column of U is dense.
        aligned: every column of U starts on a 16-byte boundary too, which it seldom does with a bias.
        ranks: columns of U that are taken at a time.
        rows: of W that a program takes. The more they are, the less often U is read, from L2; the fewer, the more
            surely the second reading of W finds in L2 what the first has left there. A warp group multiplies 64 rows at
            least.
    """

    dtype: tl.dtype
    layout: str
    aligned: bool
    ranks: int
    rows: int


class Launch(NamedTuple):
    """The layers of one form: their lines, [n, FIELDS] int64, and how many programs they take."""

    form: Form
    lines: Tensor
    programs: int


class Table(NamedTuple):
    """What one call walks. Like ``table.Table`` it is kept by the addresses of its buffers, which have been checked.

    Attributes:
        others: layers that go to a BLAS, also as a tensor in ``others_at``.
        memory: what all tensors here are views of, on the device.
        ready: event recorded after its upload; None on the CPU.
    """

    launches: list[Launch]
    others: list[int]
    others_at: Tensor
    memory: Tensor
    ready: torch.cuda.Event | None

    @staticmethod
    def of(
        weights: list[Tensor], bases: list[Tensor], targets: list[Tensor | None], biases: list[Tensor | None]
    ) -> "Table":
        """Raises :class:`Refused`: what ``gradproj.pin_`` refuses."""
        with refusing():
            validate.check_pin(weights, bases, targets, biases)
        others: list[int] = []
        lines: dict[Form, list[Line]] = {}
        for k, (w, u, b, c) in enumerate(zip(weights, bases, targets, biases, strict=True)):
            if not _fits(w, u, b):
                others.append(k)
            elif w.numel() and u.shape[1]:
                form = _form(w, u)
                mine = lines.setdefault(form, [])
                first = mine[-1].first + mine[-1].programs if mine else 0
                mine.append(_line(w, u, b, c, k, -(-w.shape[0] // form.rows), first))
        arrays = [np.array(row, dtype=np.int64) for row in (others, *lines.values())]
        memory, (others_at, *tables), ready = upload(arrays, weights[0].device)
        launches = [
            Launch(form, at, mine[-1].first + mine[-1].programs)
            for (form, mine), at in zip(lines.items(), tables, strict=True)
        ]
        return Table(launches, others, others_at, memory, ready)


def _fits(w: Tensor, u: Tensor, target: Tensor | None) -> bool:
    """No float64; U and B in float32; offsets within a tile, of 128 x 128 at most, have 32 bits."""
    wide = [t for t in (u, target) if t is not None]
    types_fit = w.dtype in _TYPES and all(t.dtype == torch.float32 for t in wide)
    return types_fit and all(s < 1 << 23 for t in (w, *wide) for s in t.stride())


def _form(w: Tensor, u: Tensor) -> Form:
    ranks = 64 if u.shape[1] <= 64 else 128
    dense = u.stride(0) == 1 or u.shape[0] == 1
    if dense and _even(w):
        layout = "rows"
    elif dense and _even(w.T):
        layout = "columns"
    else:
        layout = "strided"
    aligned = layout != "strided" and u.stride(1) % 4 == 0 and u.data_ptr() % 16 == 0 and w.shape[1] % 4 == 0
    return Form(_TYPES[w.dtype], layout, aligned, ranks, _rows(w.dtype, ranks))


def _even(w: Tensor) -> bool:
    return w.stride(1) == 1 and w.stride(0) % 16 == 0 and w.shape[1] % 16 == 0 and w.data_ptr() % 16 == 0


def _rows(dtype: torch.dtype, ranks: int) -> int:
    """As many as registers allow; more where tensor cores read shared memory by themselves (sm_90, sm_100)."""
    if INTERPRETED.value or driver.active.get_current_target().arch // 10 in (9, 10):
        return 64 if dtype == torch.float32 else 128
    return 32 if dtype == torch.float32 or ranks > 64 else 128


def _line(
    w: Tensor, u: Tensor, target: Tensor | None, bias: Tensor | None, number: int, programs: int, first: int
) -> Line:
    weight_row, weight_column = w.stride()
    basis_row, basis_column = u.stride()
    target_row, target_column = (0, 0) if target is None else target.stride()
    return Line(
        weight=w.data_ptr(),
        basis=u.data_ptr(),
        target=0 if target is None else target.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        outputs=w.shape[0],
        inputs=w.shape[1],
        rank=u.shape[1],
        weight_row=weight_row,
        weight_column=weight_column,
        basis_row=basis_row,
        basis_column=basis_column,
        target_row=target_row,
        target_column=target_column,
        bias_stride=0 if bias is None else bias.stride(0),
        number=number,
        programs=programs,
        first=first,
    )
