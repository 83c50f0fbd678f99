"""From lists of weights and bases to the tables that the pin walks: the host's part."""

from collections import defaultdict, namedtuple
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from gradproj.kernels import backends, validate
from gradproj.triton_kernels.cache import Fields, upload
from gradproj.triton_kernels.op import refusing
from gradproj.triton_kernels.table import DTYPES

# A layer: addresses, 0 without a target or a bias; sizes; strides in elements, ``_row`` from one row to the next; its
# number among all layers, how many programs share its rows, and the first of these.
Layer = namedtuple(
    "Layer",
    "weight basis target bias outputs inputs rank weight_row weight_column basis_row basis_column target_row "
    "target_column bias_stride number programs first",
)
LAYER = Fields(Layer)


class Form(NamedTuple):
    """What the kernel is compiled for.

    ``layout``: ``"rows"``: every row of W is dense and starts on a 16-byte boundary; ``"columns"``: every column, as in
    a transposed weight; ``"strided"``: anything. In the first two every column of U is dense. With more ``outputs`` U
    is read less often, from L2; with fewer W is surer to be in L2 still when it is read again. A warp group multiplies
    at least 64.
    """

    dtype: tl.dtype
    layout: str
    aligned: bool  # every column of U starts on a 16-byte boundary, which it seldom does with a bias
    ranks: int  # columns of U that are taken at a time
    outputs: int  # rows of W that a program takes


class Table(NamedTuple):
    """What one call of ``pin_`` walks; see :func:`cache.keep`."""

    launches: list[tuple[Form, Tensor, int]]  # the layers of one form, [n, len(LAYER)] int64, and all their programs
    others: list[int]  # layers that go to a BLAS
    others_at: Tensor  # the same on the device
    memory: Tensor
    ready: torch.cuda.Event | None

    @staticmethod
    def of(
        weights: list[Tensor], bases: list[Tensor], targets: list[Tensor | None], biases: list[Tensor | None]
    ) -> "Table":
        """Raises :class:`Refused`: what ``gradproj.pin_`` refuses."""
        refusing(validate.check_pin, weights, bases, targets, biases)
        others: list[int] = []
        layers: defaultdict[Form, list[Layer]] = defaultdict(list)
        counts: defaultdict[Form, int] = defaultdict(int)
        for k, (w, u, target, bias) in enumerate(zip(weights, bases, targets, biases, strict=True)):
            if not _fits(w, u, target):
                others.append(k)
            elif w.numel() and u.shape[1]:
                form = _form(w, u)
                programs = -(-w.shape[0] // form.outputs)
                addresses = (0 if t is None else t.data_ptr() for t in (w, u, target, bias))
                target_strides = (0, 0) if target is None else target.stride()
                strides = *w.stride(), *u.stride(), *target_strides, 0 if bias is None else bias.stride(0)
                layers[form].append(Layer(*addresses, *w.shape, u.shape[1], *strides, k, programs, counts[form]))
                counts[form] += programs
        arrays = [np.array(entries, dtype=np.int64) for entries in (others, *layers.values())]
        memory, (others_at, *views), ready = upload(arrays, weights[0].device)
        return Table([*zip(layers, views, counts.values(), strict=True)], others, others_at, memory, ready)


def _fits(w: Tensor, u: Tensor, target: Tensor | None) -> bool:
    """No float64; U and B in float32; offsets within a tile, of 128 x 128 at most, have 32 bits."""
    wide = [t for t in (u, target) if t is not None]
    types_fit = w.dtype != torch.float64 and all(t.dtype == torch.float32 for t in wide)
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
    if backends.INTERPRETED or driver.active.get_current_target().arch // 10 in (9, 10):
        outputs = 64 if w.dtype == torch.float32 else 128  # tensor cores read shared memory by themselves
    else:
        outputs = 32 if w.dtype == torch.float32 or ranks > 64 else 128  # as many as registers allow
    return Form(DTYPES[w.dtype], layout, aligned, ranks, outputs)


def _even(w: Tensor) -> bool:
    return w.stride(1) == 1 and w.stride(0) % 16 == 0 and w.shape[1] % 16 == 0 and w.data_ptr() % 16 == 0
