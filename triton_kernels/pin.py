"""W <- W - (W U - B) U^T for many weights in one launch: what W makes of the inputs that U spans becomes B."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.kernels import torch_backend, validate
from gradproj.triton_kernels.cache import keep
from gradproj.triton_kernels.op import Start, implement, launch, refusing
from gradproj.triton_kernels.pin_table import LAYER, Table
from gradproj.triton_kernels.tile import dot, dot_split, load_tile, split, tile_pointers
from gradproj.triton_kernels.walk import narrow

FINISH_BLOCK = 256  # doubles that the finish takes at a time


@triton.jit
def load_bias(layer_ptr, first_output, outputs, high_ptr, low_ptr, u_column, ranks, form: tl.constexpr):
    """The last column of W and the last row of U, which make a product of vectors. Loaded where they are used: what
    lives through the loops takes their registers. Returns pointers and mask of the bias; it and the row in float32."""
    num_outputs: tl.constexpr = form.outputs
    num_ranks: tl.constexpr = form.ranks
    stride = tl.load(layer_ptr + LAYER.bias_stride)
    bias_ptr = tl.load(layer_ptr + LAYER.bias).to(tl.pointer_type(form.dtype)) + first_output * stride
    bias_ptr, mask = tile_pointers(bias_ptr, stride, 1, 0, outputs, 1, num_outputs, 1)
    row = load_tile(high_ptr, 1, u_column, 0, 1, ranks, 1, num_ranks).to(tl.float32)
    if form.basis == tl.bfloat16:
        row += load_tile(low_ptr, 1, u_column, 0, 1, ranks, 1, num_ranks).to(tl.float32)
    return bias_ptr, mask, tl.load(bias_ptr, mask=mask, other=0.0).to(tl.float32), row


@triton.jit
def multiply(moved, w, u, low, form: tl.constexpr):
    """moved + w u^T; of a pair u is the high part."""
    if form.basis == tl.bfloat16:
        moved = dot(w, low.trans(), moved)
        moved = dot(w, u.trans(), moved)
    else:  # tensor cores truncate their sums: they keep only those of one tile
        w_high, w_low = split(w.to(tl.float32))
        high, low = split(u)
        moved += dot_split(w_high, w_low, high.trans(), low.trans())
    return moved


@triton.jit
def add_change(w, change, change_low, u, form: tl.constexpr):
    """w + change u. Of a pair the high part is enough, and one product: W is rounded more coarsely."""
    if form.basis == tl.bfloat16:
        pinned = dot(change, u, w.to(tl.float32))
    else:
        high, low = split(u)
        pinned = w.to(tl.float32) + dot_split(change, change_low, high, low)
    return narrow(pinned, form.dtype)


@triton.jit
def pin_kernel(layers_ptr, programs_ptr, partial_ptr, form: tl.constexpr):
    """A program takes some rows of one weight. For every block of columns of U it reads them from memory, then again,
    the last first, and writes them once; it reads the block twice too, the low part of a pair once. One block after the
    other is exact, because the columns of U are orthogonal. Writes |W U - B|^2."""
    num_outputs: tl.constexpr = form.outputs  # Triton 3.6 and 3.7 take no plain number, as in form.outputs, for a shape
    num_ranks: tl.constexpr = form.ranks
    num_inputs: tl.constexpr = form.inputs
    stages: tl.constexpr = form.stages
    pair: tl.constexpr = form.basis == tl.bfloat16
    strided: tl.constexpr = form.layout == "strided"
    program = tl.program_id(0)
    layer_ptr = layers_ptr + tl.load(programs_ptr + program) * len(LAYER)
    first_output = (program - tl.load(layer_ptr + LAYER.first).to(tl.int32)) * num_outputs
    outputs, inputs = tl.load(layer_ptr + LAYER.outputs).to(tl.int32), tl.load(layer_ptr + LAYER.inputs).to(tl.int32)
    rank = tl.load(layer_ptr + LAYER.rank).to(tl.int32)
    basis_ptr = tl.load(layer_ptr + LAYER.basis).to(tl.pointer_type(form.basis))
    low_ptr = tl.load(layer_ptr + LAYER.low).to(tl.pointer_type(form.basis))
    u_row = tl.load(layer_ptr + LAYER.basis_row) if strided and not pair else 1
    u_column = tl.load(layer_ptr + LAYER.basis_column)
    if pair or not strided:
        basis_ptr, low_ptr = tl.multiple_of(basis_ptr, 16), tl.multiple_of(low_ptr, 16)
        u_column = tl.multiple_of(u_column, 8 if pair else 4)
    weight_ptr = tl.load(layer_ptr + LAYER.weight).to(tl.pointer_type(form.dtype))
    w_row = 1 if form.layout == "columns" else tl.load(layer_ptr + LAYER.weight_row)
    w_column = 1 if form.layout == "rows" else tl.load(layer_ptr + LAYER.weight_column)
    weight_ptr += first_output * w_row
    if not strided:
        weight_ptr, inputs = tl.multiple_of(weight_ptr, 16), tl.multiple_of(inputs, 8)
    if form.layout == "rows":
        w_row = tl.multiple_of(w_row, 8)
    elif form.layout == "columns":
        w_column, outputs = tl.multiple_of(w_column, 8), tl.multiple_of(outputs, 8)
    outputs -= first_output
    b_row = tl.load(layer_ptr + LAYER.target_row)
    b_column = tl.load(layer_ptr + LAYER.target_column) if strided else 1
    target_ptr = tl.load(layer_ptr + LAYER.target).to(tl.pointer_type(tl.float32)) + first_output * b_row
    # A branch on the address would serialise all that tensor cores do: ptxas must see where their sums come from.
    targets = tl.where(tl.load(layer_ptr + LAYER.target) != 0, outputs, 0)
    square = tl.zeros([num_outputs], dtype=tl.float64)
    # disable_licm: what every block has in common, kept, would take the registers of the loops within.
    for first in tl.range(0, rank, num_ranks, num_stages=1, disable_licm=True):
        block_ptr, rest_ptr, ranks = basis_ptr + first * u_column, low_ptr + first * u_column, rank - first
        moved = 0.0 - load_tile(target_ptr, b_row, b_column, first, targets, rank, num_outputs, num_ranks)
        row = inputs * u_row
        if form.biased:
            _, _, bias, of_bias = load_bias(
                layer_ptr, first_output, outputs, block_ptr + row, rest_ptr + row, u_column, ranks, form
            )
            moved += bias * of_bias
        for start in tl.range(0, inputs, num_inputs, num_stages=stages):
            w = load_tile(weight_ptr, w_row, w_column, start, outputs, inputs, num_outputs, num_inputs)
            u = load_tile(block_ptr, u_column, u_row, start, ranks, inputs, num_ranks, num_inputs)
            low = load_tile(rest_ptr, u_column, u_row, start, ranks, inputs, num_ranks, num_inputs) if pair else u
            moved = multiply(moved, w, u, low, form)
        square += tl.sum(moved * moved, axis=1).to(tl.float64)
        if form.biased:
            bias_ptr, there, bias, of_bias = load_bias(
                layer_ptr, first_output, outputs, block_ptr + row, rest_ptr + row, u_column, ranks, form
            )
            bias -= tl.sum(moved * of_bias, axis=1, keep_dims=True)
            tl.store(bias_ptr, narrow(bias, form.dtype), mask=there)
        change, change_low = (narrow(-moved, form.basis), moved) if pair else split(-moved)
        for done in tl.range(0, inputs, num_inputs, num_stages=stages):  # W is prefetched only if num_stages is given
            start = (inputs - 1) // num_inputs * num_inputs - done
            w_ptr, mask = tile_pointers(weight_ptr, w_row, w_column, start, outputs, inputs, num_outputs, num_inputs)
            w = tl.load(w_ptr, mask=mask, other=0.0)
            u = load_tile(block_ptr, u_column, u_row, start, ranks, inputs, num_ranks, num_inputs)
            tl.store(w_ptr, add_change(w, change, change_low, u, form), mask=mask)
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
        partial = torch.empty(len(programs), dtype=torch.float64, device=device)
        arguments = layers, programs, partial, form
        starts.append(Start(pin_kernel, form, len(programs), arguments, form.warps, form.registers))
        starts.append(Start(pin_finish_kernel, (), len(layers), (layers, partial, squares, FINISH_BLOCK)))
    with torch.cuda.device_of(squares):
        launch(device, starts)
    if table.others:
        rest = [(at, bias_of[k]) for at, k in enumerate(table.others) if bias_of[k] is not None]
        lists = ([row[k] for k in table.others] for row in (weights, bases, targets))
        found = torch_backend.pin_(*lists, [bias for _, bias in rest], [at for at, _ in rest])
        squares.index_copy_(0, table.others_at, found)
    return squares
