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

# A layer: addresses, 0 without a low part, a target or a bias; sizes; strides in elements, ``_row`` from one row to the
# next; its number among all layers, how many programs share its rows, and the first of these.
Layer = namedtuple(
    "Layer",
    "weight basis low target bias outputs inputs rank weight_row weight_column basis_row basis_column target_row "
    "target_column bias_stride number programs first",
)
LAYER = Fields(Layer)


class Tile(NamedTuple):
    """What a program takes at a time, of a weight [outputs, inputs] and of U [inputs, ranks]. Its sums, outputs x
    ranks, stay in registers. U is read from L2 anew for every ``outputs`` rows, so these are as many as fit."""

    outputs: int
    ranks: int
    inputs: int
    stages: int  # tiles under way: as many as shared memory holds
    warps: int = 8
    registers: int | None = None  # of a thread, so that two programs fit a multiprocessor


# By whether tensor cores read shared memory by themselves (sm_90, sm_100); the last ones take several blocks of ranks.
PAIRS = {
    True: (Tile(128, 64, 64, 3, 8, 128), Tile(128, 128, 64, 2, 8, 128), Tile(128, 256, 64, 2)),
    False: (Tile(128, 64, 32, 3, 8, 128), Tile(128, 128, 32, 2), Tile(64, 256, 32, 2)),
}
FLOATS = {
    True: (Tile(64, 64, 64, 2, 4), Tile(64, 128, 64, 2)),
    False: (Tile(32, 64, 32, 3),),
}
STRIDED = {True: Tile(64, 64, 32, 2), False: Tile(32, 64, 32, 2)}  # an address for every element: registers


class Form(NamedTuple):
    """What the kernel is compiled for.

    ``layout``: ``"rows"``: every row of W is dense and starts on a 16-byte boundary; ``"columns"``: every column, as in
    a transposed weight; ``"strided"``: anything. In the first two, and in a pair, so is every column of U; in the first
    two every row of B is dense.
    """

    dtype: tl.dtype
    basis: tl.dtype  # bfloat16: a pair, high and low
    layout: str
    biased: bool
    outputs: int
    ranks: int
    inputs: int
    stages: int
    warps: int
    registers: int | None


class Table(NamedTuple):
    """What one call of ``pin_`` walks; see :func:`cache.keep`."""

    launches: list[tuple[Form, Tensor, Tensor]]  # the layers of one form, [n, len(LAYER)] int64; each program's layer
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
        for k, (w, u, target, bias) in enumerate(zip(weights, bases, targets, biases, strict=True)):
            if not _fits(w, u, target):
                others.append(k)
            elif w.numel() and u.shape[-1]:
                form = _form(w, u, target, bias)
                last = layers[form][-1] if layers[form] else None
                first = last.first + last.programs if last else 0
                programs = -(-w.shape[0] // form.outputs)
                parts = u if u.dim() == 3 else (u, None)
                addresses = (0 if t is None else t.data_ptr() for t in (w, *parts, target, bias))
                target_strides = (0, 0) if target is None else target.stride()
                strides = *w.stride(), *u.stride()[-2:], *target_strides, 0 if bias is None else bias.stride(0)
                layers[form].append(Layer(*addresses, *w.shape, u.shape[-1], *strides, k, programs, first))
        arrays = [np.array(others, dtype=np.int64)]
        for found in layers.values():
            arrays += np.array(found, dtype=np.int64), np.repeat(np.arange(len(found)), [e.programs for e in found])
        memory, (others_at, *views), ready = upload(arrays, weights[0].device)
        return Table([*zip(layers, views[::2], views[1::2], strict=True)], others, others_at, memory, ready)


def _fits(w: Tensor, u: Tensor, target: Tensor | None) -> bool:
    """No float64; a float32 U or a pair whose columns are dense and aligned; B in float32; offsets within a tile, of
    256 x 128 at most, have 32 bits."""
    pair = u.dim() == 3
    types_fit = w.dtype != torch.float64 and (target is None or target.dtype == torch.float32)
    basis_fits = _even(u[0].T, 8) and _even(u[1].T, 8) if pair else u.dtype == torch.float32
    strides = (*w.stride(), *u.stride()[-2:], *(() if target is None else target.stride()))
    return types_fit and basis_fits and all(s < 1 << 22 for s in strides)


def _form(w: Tensor, u: Tensor, target: Tensor | None, bias: Tensor | None) -> Form:
    pair = u.dim() == 3
    dense = (target is None or target.stride(1) == 1) and (pair or _even(u.T, 4)) and w.shape[1] % 8 == 0
    if not dense:
        layout = "strided"
    elif _even(w, 8):
        layout = "rows"
    elif _even(w.T, 8) and w.shape[0] % 8 == 0:
        layout = "columns"
    else:
        layout = "strided"
    newer = backends.INTERPRETED or driver.active.get_current_target().arch // 10 in (9, 10)
    tiles = (PAIRS if pair else FLOATS)[newer]
    if layout == "strided":
        tile = STRIDED[newer]
    else:
        tile = next((tile for tile in tiles if u.shape[-1] <= tile.ranks), tiles[-1])
        if tile.inputs > 32 and (layout == "columns" or bias is not None):  # which take more registers
            tile = tile._replace(inputs=32, stages=3)
    return Form(DTYPES[w.dtype], DTYPES[u.dtype], layout, bias is not None, *tile)


def _even(t: Tensor, step: int) -> bool:
    """Whether every row is dense, and starts on a 16-byte boundary and a multiple of ``step`` elements."""
    return t.stride(1) == 1 and t.stride(0) % step == 0 and t.data_ptr() % 16 == 0
