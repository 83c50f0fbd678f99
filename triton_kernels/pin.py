"""W <- W - (W U - B) U^T for many weights in one launch: what W makes of the inputs that U spans becomes B."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.kernels import torch_backend, validate
from gradproj.triton_kernels.cache import keep
from gradproj.triton_kernels.op import Start, implement, launch, refusing
from gradproj.triton_kernels.pin_table import LAYER, Table
from gradproj.triton_kernels.walk import INTERPRETED, narrow

WARPS = 8
TILE_INPUTS = tl.constexpr(64)  # inputs that a program takes at a time
FINISH_BLOCK = 256  # doubles that the finish takes at a time


@triton.jit
def find_layer(layers_ptr, num_layers, program):
    """The layer that ``program`` works on: the last whose first program is <= ``program``."""
    low = num_layers * 0
    high = num_layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(layers_ptr + middle * len(LAYER) + LAYER.first) <= program:
            low = middle
        else:
            high = middle - 1
    return layers_ptr + low * len(LAYER)


@triton.jit
def split(x, dtype: tl.constexpr):
    """float32 as a sum of two for tensor cores: 22 bits in TF32, for which ``dtype`` is float32, or 16 in bfloat16."""
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
    """(a_high + a_low) (b_high + b_low) without the product of the low parts, the small products first."""
    sums = dot(a_low, b_high, tl.zeros([a_low.shape[0], b_high.shape[1]], dtype=tl.float32))
    sums = dot(a_high, b_low, sums)
    return dot(a_high, b_high, sums)


@triton.jit
def tile_pointers(
    base_ptr, row, column, start, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr
):  # fmt: skip
    """Pointers to [num_rows, num_columns] of a [rows, columns] matrix from column ``start`` on, and which exist.
    ``row`` and ``column`` are int64 strides, or the constant 1: ``start`` then stays 32-bit, as offsets within a tile
    always do, because 64-bit ones take twice the registers."""
    i = tl.arange(0, num_rows)[:, None]
    j = tl.arange(0, num_columns)[None, :]
    tile_ptr = (base_ptr + start * column) + (i * tl.cast(row, tl.int32) + j * tl.cast(column, tl.int32))
    return tile_ptr, (i < rows) & (j < columns - start)


@triton.jit
def load_tile(base_ptr, row, column, start, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr):
    tile_ptr, mask = tile_pointers(base_ptr, row, column, start, rows, columns, num_rows, num_columns)
    return tl.load(tile_ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_layers"])
def pin_kernel(layers_ptr, partial_ptr, num_layers, form: tl.constexpr):
    """A program takes some rows of one weight. For every block of columns of U it reads them from memory, then again
    from cache, the last first, and writes them once; it reads the block twice too. One block after the other is exact,
    because the columns of U are orthogonal. Writes |W U - B|^2."""
    num_outputs: tl.constexpr = form.outputs  # Triton 3.6 and 3.7 take no plain number, as in form.outputs, for a shape
    num_ranks: tl.constexpr = form.ranks
    program = tl.program_id(0)
    layer_ptr = find_layer(layers_ptr, num_layers, program)
    first_output = (program - tl.load(layer_ptr + LAYER.first).to(tl.int32)) * num_outputs
    outputs, inputs = tl.load(layer_ptr + LAYER.outputs).to(tl.int32), tl.load(layer_ptr + LAYER.inputs).to(tl.int32)
    rank = tl.load(layer_ptr + LAYER.rank).to(tl.int32)
    basis_ptr = tl.load(layer_ptr + LAYER.basis).to(tl.pointer_type(tl.float32))
    u_row = tl.load(layer_ptr + LAYER.basis_row) if form.layout == "strided" else 1
    u_column = tl.load(layer_ptr + LAYER.basis_column)
    if form.aligned:
        basis_ptr, u_column = tl.multiple_of(basis_ptr, 16), tl.multiple_of(u_column, 4)
        inputs = tl.multiple_of(inputs, 4)
    weight_ptr = tl.load(layer_ptr + LAYER.weight).to(tl.pointer_type(form.dtype))
    w_row = 1 if form.layout == "columns" else tl.load(layer_ptr + LAYER.weight_row)
    w_column = 1 if form.layout == "rows" else tl.load(layer_ptr + LAYER.weight_column)
    weight_ptr += first_output * w_row
    if form.layout == "rows":
        weight_ptr, w_row = tl.multiple_of(weight_ptr, 16), tl.multiple_of(w_row, 16)
        inputs = tl.multiple_of(inputs, 16)
    elif form.layout == "columns":
        weight_ptr, w_column = tl.multiple_of(weight_ptr, 16), tl.multiple_of(w_column, 16)
        outputs = tl.multiple_of(outputs, 16)
    outputs -= first_output
    output = tl.arange(0, num_outputs)[:, None]
    bias_ptr = tl.load(layer_ptr + LAYER.bias).to(tl.pointer_type(form.dtype))
    bias_ptr = bias_ptr + (first_output + output) * tl.load(layer_ptr + LAYER.bias_stride)
    has_bias = tl.load(layer_ptr + LAYER.bias) != 0
    square = tl.zeros([num_outputs], dtype=tl.float64)
    stages: tl.constexpr = 3 if num_ranks == 64 else 2  # tiles under way: as many as shared memory holds
    # disable_licm: what every block has in common, kept, would take the registers of the loops within.
    for first in tl.range(0, rank, num_ranks, num_stages=1, disable_licm=True):
        block_ptr = basis_ptr + first * u_column
        moved = tl.zeros([num_outputs, num_ranks], dtype=tl.float32)
        if tl.load(layer_ptr + LAYER.target) != 0:
            b_row, b_column = tl.load(layer_ptr + LAYER.target_row), tl.load(layer_ptr + LAYER.target_column)
            target_ptr = tl.load(layer_ptr + LAYER.target).to(tl.pointer_type(tl.float32)) + first_output * b_row
            moved -= load_tile(target_ptr, b_row, b_column, first, outputs, rank, num_outputs, num_ranks)
        if has_bias:
            bias_basis = load_tile(block_ptr + inputs * u_row, 1, u_column, 0, 1, rank - first, 1, num_ranks)
            moved += tl.load(bias_ptr, mask=output < outputs, other=0.0).to(tl.float32) * bias_basis
        for start in tl.range(0, inputs, TILE_INPUTS, num_stages=stages):
            w = load_tile(weight_ptr, w_row, w_column, start, outputs, inputs, num_outputs, TILE_INPUTS)
            u = load_tile(block_ptr, u_column, u_row, start, rank - first, inputs, num_ranks, TILE_INPUTS)
            high, low = split(u, form.dtype)
            if form.dtype == tl.float32:  # tensor cores truncate their sums: they keep only those of one tile
                w_high, w_low = split(w, form.dtype)
                moved += dot_split(w_high, w_low, high.trans(), low.trans())
            else:
                moved = dot(w, low.trans(), moved)
                moved = dot(w, high.trans(), moved)
        square += tl.sum(moved * moved, axis=1).to(tl.float64)
        if has_bias:
            bias_basis = load_tile(block_ptr + inputs * u_row, 1, u_column, 0, 1, rank - first, 1, num_ranks)
            pinned = tl.load(bias_ptr, mask=output < outputs, other=0.0).to(tl.float32)
            pinned -= tl.sum(moved * bias_basis, axis=1, keep_dims=True)
            tl.store(bias_ptr, narrow(pinned, form.dtype), mask=output < outputs)
        half: tl.constexpr = tl.float32 if form.dtype == tl.float32 else tl.bfloat16  # whose range is float32's
        moved_high, moved_low = split(moved, half)
        for done in tl.range(0, inputs, TILE_INPUTS, num_stages=stages):  # W is prefetched only if num_stages is given
            start = (inputs - 1) // TILE_INPUTS * TILE_INPUTS - done
            w_ptr, mask = tile_pointers(weight_ptr, w_row, w_column, start, outputs, inputs, num_outputs, TILE_INPUTS)
            w = tl.load(w_ptr, mask=mask, other=0.0)
            u = load_tile(block_ptr, u_column, u_row, start, rank - first, inputs, num_ranks, TILE_INPUTS)
            high, low = split(u, half)
            pinned = w.to(tl.float32) - dot_split(moved_high, moved_low, high, low)
            tl.store(w_ptr, narrow(pinned, form.dtype), mask=mask)
        tl.debug_barrier()  # the next block reads what other threads have written
    tl.store(partial_ptr + program, tl.sum(square, axis=0))


@triton.jit
def pin_finish_kernel(layers_ptr, partial_ptr, squares_ptr, block: tl.constexpr):
    """Adds up the programs of a layer, in fixed order."""
    layer_ptr = layers_ptr + tl.program_id(0) * len(LAYER)
    first, count = tl.load(layer_ptr + LAYER.first), tl.load(layer_ptr + LAYER.programs)
    total = tl.zeros([block], dtype=tl.float64)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partial_ptr + first + index, mask=index < count, other=0.0)
    tl.store(squares_ptr + tl.load(layer_ptr + LAYER.number), tl.sum(total, axis=0))


@implement
def pin_(
    weights: list[Tensor], bases: list[Tensor], targets: list[Tensor | None], biases: list[Tensor], biased: list[int]
) -> Tensor:
    """The op ``pin_``; see ``gradproj.kernels.ops``. One launch for all weights of one form; what the kernel does not
    take goes to a BLAS."""
    if not weights:
        return torch.zeros(0, dtype=torch.float64)
    device = weights[0].device
    bias_of: list[Tensor | None] = [None] * len(weights)
    for k, bias in zip(biased, biases, strict=True):
        bias_of[k] = bias
    key = refusing(validate.pin_signature, weights, bases, targets, biases, biased)
    table = keep(key, device, lambda: Table.of(weights, bases, targets, bias_of))
    squares = torch.zeros(len(weights), dtype=torch.float64, device=device)
    starts = []
    for form, layers, programs in table.launches:
        partial = torch.empty(programs, dtype=torch.float64, device=device)
        starts.append(Start(pin_kernel, form, programs, (layers, partial, len(layers), form), WARPS))
        starts.append(Start(pin_finish_kernel, (), len(layers), (layers, partial, squares, FINISH_BLOCK)))
    with torch.cuda.device_of(squares):
        launch(device, starts)
    if table.others:
        rest = [(at, bias_of[k]) for at, k in enumerate(table.others) if bias_of[k] is not None]
        lists = ([row[k] for k in table.others] for row in (weights, bases, targets))
        found = torch_backend.pin_(*lists, [bias for _, bias in rest], [at for at, _ in rest])
        squares.index_copy_(0, table.others_at, found)
    return squares
