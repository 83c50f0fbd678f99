"""Tiles of matrices of any strides, and their products on tensor cores: what the pin's kernel is made of."""

import triton
import triton.language as tl

from gradproj.triton_kernels.walk import INTERPRETED


@triton.jit
def split(x):
    """float32 as a sum of two TF32 numbers, to 22 bits."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


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
