"""W <- W - (W U - B) U^T for many weights in one launch: what W makes of the inputs that U spans becomes B."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.kernels import torch_backend, validate
from gradproj.triton_kernels.cache import keep
from gradproj.triton_kernels.combine import INTERPRETED, narrow
from gradproj.triton_kernels.op import Start, implement, launch, refusing
from gradproj.triton_kernels.pin_table import (
    BASIS,
    BASIS_COLUMN,
    BASIS_ROW,
    BIAS,
    BIAS_STRIDE,
    FIELDS,
    FIRST,
    INPUTS,
    NUMBER,
    OUTPUTS,
    PROGRAMS,
    RANK,
    TARGET,
    TARGET_COLUMN,
    TARGET_ROW,
    WEIGHT,
    WEIGHT_COLUMN,
    WEIGHT_ROW,
    Table,
)  # fmt: skip

WARPS = 8
COLUMNS = tl.constexpr(64)  # inputs that a program takes at a time


@triton.jit
def find_layer(table, layers, program):
    """The layer that ``program`` works on: the last whose first program is <= ``program``."""
    low = layers * 0
    high = layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(table + middle * FIELDS + FIRST) <= program:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def split(x, dtype: tl.constexpr):
    """float32 as a sum of two that tensor cores take: 22 bits in TF32, for which ``dtype`` is float32, 16 in
    bfloat16."""
    if dtype == tl.float32:
        high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        low = x - high
    else:
        high = narrow(x, dtype)
        low = narrow(x - high.to(tl.float32), dtype)
    return high, low


@triton.jit
def dot(a, b, sums):
    """a b + sums on tensor cores, which take a float32 as TF32. Triton's interpreter multiplies no bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="tf32")


@triton.jit
def dot_split(a_high, a_low, b_high, b_low):
    """(a_high + a_low) (b_high + b_low) without the product of the low parts, the small ones first."""
    sums = dot(a_low, b_high, tl.zeros([a_low.shape[0], b_high.shape[1]], dtype=tl.float32))
    sums = dot(a_high, b_low, sums)
    return dot(a_high, b_high, sums)


@triton.jit
def weight_tile(w, step, stride, start, outputs, inputs, form: tl.constexpr):
    """Where [rows, COLUMNS] of W lie, from input ``start`` on, and which of them there are. ``w``: of the first row."""
    num_rows: tl.constexpr = form.rows
    rows = tl.arange(0, num_rows)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    if form.layout == "rows":
        places = (w + start) + (rows * step + columns)
    elif form.layout == "columns":
        places = (w + tl.cast(start, tl.int64) * stride) + (rows + columns * stride)
    else:
        places = (w + tl.cast(start, tl.int64) * stride) + (rows * step + columns * stride)
    return places, (rows < outputs) & (columns < inputs - start)


@triton.jit
def load_basis(u, step, stride, start, inputs, rank, form: tl.constexpr):
    """[ranks, COLUMNS] of U^T, from input ``start`` on. ``u``: of the first of ``rank`` columns that are left."""
    num_ranks: tl.constexpr = form.ranks
    ranks = tl.arange(0, num_ranks)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    if form.layout == "strided":
        places = (u + tl.cast(start, tl.int64) * step) + (ranks * stride + columns * step)
    else:
        places = (u + start) + (ranks * stride + columns)
    return tl.load(places, mask=(ranks < rank) & (columns < inputs - start), other=0.0)


@triton.jit
def load_of_bias(u, step, stride, inputs, rank, form: tl.constexpr):
    """[1, ranks] of U: what belongs to the bias's input."""
    num_ranks: tl.constexpr = form.ranks
    ranks = tl.arange(0, num_ranks)[None, :]
    return tl.load(u + inputs.to(tl.int64) * step + ranks * stride, mask=ranks < rank, other=0.0)


@triton.jit
def load_target(line, first_row, first, outputs, rank, form: tl.constexpr):
    """[rows, ranks] of B."""
    step, stride = tl.load(line + TARGET_ROW), tl.load(line + TARGET_COLUMN)
    target = tl.load(line + TARGET).to(tl.pointer_type(tl.float32)) + first_row.to(tl.int64) * step + first * stride
    num_rows: tl.constexpr = form.rows
    num_ranks: tl.constexpr = form.ranks
    rows = tl.arange(0, num_rows)[:, None]
    ranks = tl.arange(0, num_ranks)[None, :]
    offsets = rows * step.to(tl.int32) + ranks * stride.to(tl.int32)
    return tl.load(target + offsets, mask=(rows < outputs) & (ranks < rank), other=0.0)


@triton.jit(do_not_specialize=["layers"])
def pin_kernel(table, partial, layers, form: tl.constexpr):
    """A program takes some rows of one weight: reads them from memory once, again from cache, the last first, writes
    them once; per block of columns of U, which are orthogonal to all others, so that one block after the other is
    exact. Reads the block twice too. Writes |W U - B|^2. Offsets within a tile are 32-bit: pointers would take twice
    the registers."""
    num_rows: tl.constexpr = form.rows  # Triton 3.6 and 3.7 take no plain number, as in form.rows, for a shape
    num_ranks: tl.constexpr = form.ranks
    program = tl.program_id(0)
    line = table + find_layer(table, layers, program) * FIELDS
    first_row = (program - tl.load(line + FIRST).to(tl.int32)) * num_rows
    outputs, inputs = tl.load(line + OUTPUTS).to(tl.int32), tl.load(line + INPUTS).to(tl.int32)
    u = tl.load(line + BASIS).to(tl.pointer_type(tl.float32))
    u_step, u_stride = tl.load(line + BASIS_ROW).to(tl.int32), tl.load(line + BASIS_COLUMN).to(tl.int32)
    if form.aligned:
        u, u_stride, inputs = tl.multiple_of(u, 16), tl.multiple_of(u_stride, 4), tl.multiple_of(inputs, 4)
    w = tl.load(line + WEIGHT).to(tl.pointer_type(form.dtype))
    step, stride = tl.load(line + WEIGHT_ROW).to(tl.int32), tl.load(line + WEIGHT_COLUMN).to(tl.int32)
    if form.layout == "columns":
        w, stride = tl.multiple_of(w + first_row, 16), tl.multiple_of(stride, 16)
        outputs = tl.multiple_of(outputs, 16)
    else:
        w += first_row.to(tl.int64) * step
    if form.layout == "rows":
        w, step, inputs = tl.multiple_of(w, 16), tl.multiple_of(step, 16), tl.multiple_of(inputs, 16)
    outputs -= first_row
    rank = tl.load(line + RANK).to(tl.int32)
    rows = tl.arange(0, num_rows)[:, None]
    bias = tl.load(line + BIAS).to(tl.pointer_type(form.dtype))
    biases = bias + (first_row + rows).to(tl.int64) * tl.load(line + BIAS_STRIDE)
    has_bias = tl.load(line + BIAS) != 0
    square = tl.zeros([num_rows], dtype=tl.float64)
    stages: tl.constexpr = 3 if num_ranks == 64 else 2  # of tiles under way: what shared memory holds
    # What does not change from block to block is computed again: kept, it would take the registers of the loops within.
    for first in tl.range(0, rank, num_ranks, num_stages=1, disable_licm=True):
        block = u + tl.cast(first, tl.int64) * u_stride
        moved = tl.zeros([num_rows, num_ranks], dtype=tl.float32)
        if tl.load(line + TARGET) != 0:
            moved -= load_target(line, first_row, first, outputs, rank - first, form)
        if has_bias:
            of_bias = load_of_bias(block, u_step, u_stride, inputs, rank - first, form)
            moved += tl.load(biases, mask=rows < outputs, other=0.0).to(tl.float32) * of_bias
        for start in tl.range(0, inputs, COLUMNS, num_stages=stages):
            places, mask = weight_tile(w, step, stride, start, outputs, inputs, form)
            tile = tl.load(places, mask=mask, other=0.0)
            high, low = split(load_basis(block, u_step, u_stride, start, inputs, rank - first, form), form.dtype)
            if form.dtype == tl.float32:  # tensor cores truncate their sums: only those of a tile are left to them
                tile_high, tile_low = split(tile, form.dtype)
                moved += dot_split(tile_high, tile_low, high.trans(), low.trans())
            else:
                moved = dot(tile, low.trans(), moved)
                moved = dot(tile, high.trans(), moved)
        square += tl.sum(moved * moved, axis=1).to(tl.float64)
        if has_bias:
            of_bias = load_of_bias(block, u_step, u_stride, inputs, rank - first, form)
            pinned = tl.load(biases, mask=rows < outputs, other=0.0).to(tl.float32)
            pinned -= tl.sum(moved * of_bias, axis=1, keep_dims=True)
            tl.store(biases, narrow(pinned, form.dtype), mask=rows < outputs)
        half: tl.constexpr = tl.float32 if form.dtype == tl.float32 else tl.bfloat16  # whose range is float32's
        moved_high, moved_low = split(moved, half)
        for done in tl.range(0, inputs, COLUMNS, num_stages=stages):  # a loop that says it prefetches W too
            start = (inputs - 1) // COLUMNS * COLUMNS - done
            places, mask = weight_tile(w, step, stride, start, outputs, inputs, form)
            tile = tl.load(places, mask=mask, other=0.0)
            high, low = split(load_basis(block, u_step, u_stride, start, inputs, rank - first, form), half)
            pinned = tile.to(tl.float32) - dot_split(moved_high, moved_low, high, low)
            tl.store(places, narrow(pinned, form.dtype), mask=mask)
        tl.debug_barrier()  # the next block reads what other threads have written
    tl.store(partial + program, tl.sum(square, axis=0))


@triton.jit
def pin_finish_kernel(table, partial, squares, block: tl.constexpr):
    """Adds up the programs of a layer, in fixed order."""
    line = table + tl.program_id(0) * FIELDS
    first, count = tl.load(line + FIRST), tl.load(line + PROGRAMS)
    total = tl.zeros([block], dtype=tl.float64)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partial + first + index, mask=index < count, other=0.0)
    tl.store(squares + tl.load(line + NUMBER), tl.sum(total, axis=0))


@implement
def pin_(
    weights: list[Tensor], bases: list[Tensor], targets: list[Tensor | None], biases: list[Tensor], biased: list[int]
) -> Tensor:
    """The op ``pin_``; see ``gradproj.kernels.ops``. One launch for all weights of one form; what does not fit goes to
    a BLAS."""
    if not weights:
        return torch.zeros(0, dtype=torch.float64)
    device = weights[0].device
    bias_of: list[Tensor | None] = [None] * len(weights)
    for k, bias in zip(biased, biases, strict=True):
        bias_of[k] = bias
    with refusing():
        key = validate.pin_signature(weights, bases, targets, biases, biased)
    table = keep(key, device, lambda: Table.of(weights, bases, targets, bias_of))
    squares = torch.zeros(len(weights), dtype=torch.float64, device=device)
    starts = []
    for form, lines, programs in table.launches:
        partial = torch.empty(programs, dtype=torch.float64, device=device)
        starts.append(Start(pin_kernel, form, programs, (lines, partial, len(lines), form), WARPS))
        starts.append(Start(pin_finish_kernel, (), len(lines), (lines, partial, squares, 256)))
    with torch.cuda.device_of(squares):
        launch(device, starts)
    if table.others:
        some = [(at, bias_of[k]) for at, k in enumerate(table.others) if bias_of[k] is not None]
        lists = ([row[k] for k in table.others] for row in (weights, bases, targets))
        found = torch_backend.pin_(*lists, [bias for _, bias in some], [at for at, _ in some])
        squares.index_copy_(0, table.others_at, found)
    return squares
