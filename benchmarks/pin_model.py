"""What a launch of the Triton pin moves, and how long that takes at best and at worst: a prediction, no measurement.

Device memory: W is read twice and written once for every block of ranks, less what L2 still holds of the first reading.
L2: that, and U for the rows of every program: a pair's high part twice and its low part once, a float32 U twice.
"""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch

from gpu_predicted import GPUS, Gpu

if TYPE_CHECKING:
    from gradproj.triton_kernels.pin_table import Tile

CLOCK = 1.755e9  # of an H100 and an H200 under load
L2_BYTES = 24, 30  # that a multiprocessor gets from L2 in a clock: published measurements lie between
PRODUCTS = {torch.bfloat16: 2 * 2048, torch.float32: 2 * 1024}  # operations of a multiprocessor in a clock, TF32's


class Traffic(NamedTuple):
    """Bytes and operations of a launch."""

    minimal: float
    memory: float
    l2: float
    operations: float

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(*map(sum, zip(self, other, strict=True)))


def tile_of(dtype: torch.dtype, rank: int) -> "Tile":
    from gradproj.triton_kernels.pin_table import FLOATS, PAIRS

    tiles = (PAIRS if dtype == torch.bfloat16 else FLOATS)[True]
    return next((tile for tile in tiles if rank <= tile.ranks), tiles[-1])


def together(tile: "Tile") -> int:
    """Programs on a multiprocessor, by their registers."""
    return max(1, (1 << 16) // (32 * tile.warps * (tile.registers or (255 if tile.warps == 4 else 256))))


def traffic(outputs: int, inputs: int, rank: int, dtype: torch.dtype, tile: "Tile", gpu: Gpu) -> Traffic:
    """Of one weight, where all programs that run at once have such ones."""
    pair = dtype == torch.bfloat16
    blocks, programs = ceil(rank / tile.ranks), ceil(outputs / tile.outputs)
    weight = outputs * inputs * dtype.itemsize
    running = gpu.sms * together(tile) * tile.outputs * inputs * dtype.itemsize
    kept = min(1.0, gpu.l2 / 2 / running)  # of a program's rows, the last of which are read again first
    target, basis = 4 * outputs * rank, 4 * inputs * rank
    memory = blocks * (3 - kept) * weight + target + basis
    l2 = blocks * 3 * weight + target + programs * basis * (1.5 if pair else 2)
    products = 3 if pair else 6
    return Traffic(2 * weight, memory, l2, 2 * products * outputs * inputs * blocks * tile.ranks)


def of_all(shapes: Sequence[tuple[int, ...]], rank: int, dtype: torch.dtype, gpu: Gpu) -> Traffic:
    """Of weights [outputs, inputs], each with a tile of its own rank, which is ``rank`` or all inputs."""
    total = Traffic(0.0, 0.0, 0.0, 0.0)
    for outputs, inputs in shapes:
        of_layer = min(rank, inputs)
        total += traffic(outputs, inputs, of_layer, dtype, tile_of(dtype, of_layer), gpu)
    return total


def seconds(t: Traffic, dtype: torch.dtype, programs: int, gpu: Gpu) -> tuple[float, float]:
    """At best memory, L2 and tensor cores work at once; at worst these wait, in each of the programs, for the rest."""
    slow, fast = (t.l2 / (rate * CLOCK * gpu.sms) for rate in L2_BYTES)
    products = t.operations / (PRODUCTS[dtype] * CLOCK * gpu.sms)
    return max(t.memory / gpu.copy, fast, products), max(t.memory / gpu.copy, slow) + products / programs


def share(shapes: Sequence[tuple[int, ...]], rank: int, dtype: torch.dtype, gpu: Gpu) -> tuple[float, float]:
    """Of the limit, 2 N at the bandwidth of a copy: at worst and at best."""
    total = of_all(shapes, rank, dtype, gpu)
    best, worst = seconds(total, dtype, together(tile_of(dtype, rank)), gpu)
    limit = total.minimal / gpu.copy
    return limit / worst, limit / best


def line(name: str, shapes: Sequence[tuple[int, ...]], rank: int, dtype: torch.dtype) -> str:
    """Of a table: bytes over N, and shares of the limit on each known GPU."""
    cells = []
    for gpu in GPUS.values():
        total = of_all(shapes, rank, dtype, gpu)
        low, high = share(shapes, rank, dtype, gpu)
        n = total.minimal / 2
        cells.append(f"{total.memory / n:.1f} N | {total.l2 / n:.1f} N | {low:.0%} to {high:.0%}")
    return f"| {name} | {' | '.join(cells)} |"
