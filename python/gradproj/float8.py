"""Rows in float8: a code per element and a float32 scale per block of 512, read by the kernels as they are.

Element i of a buffer, in the order of memory, stands for ``codes[i] * scales[i // 512]``. A scale maps the largest element of
its block to 448, the largest number of e4m3fn, so an element is off by at most 2^-4 of itself, or by 2^-10 * 448 / 2^9 of its
block's largest. A scale has 16 significant bits, so that ``codes[i] * scales[i // 512]`` is exact in float32, and quantising
what a row stands for gives the same row. Source of the format: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 512
DTYPE = torch.float8_e4m3fn
_CHUNK = 1 << 16  # elements that are quantised at a time: temporaries stay under 1 MiB


class Float8Row(NamedTuple):
    """A row that takes one byte per element, and 4 per 512 elements. Goes wherever a list of tensors goes as a direction.

    Attributes:
        codes: float8_e4m3fn tensors of the parameters' shapes, gap-free in memory, or None.
        scales: float32 [ceil(numel / 512)] tensors, None where ``codes`` is.
    """

    codes: list[Tensor | None]
    scales: list[Tensor | None]


def quantize(row: Iterable[Tensor | None]) -> Float8Row:
    """Reads N bytes and writes N / 4 of a float32 row. A non-finite element makes its block's scale non-finite."""
    pairs = [(None, None) if t is None else _quantize(real(t.detach())) for t in row]
    return Float8Row([codes for codes, _ in pairs], [scales for _, scales in pairs])


def dequantize(row: Float8Row, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """The row as tensors of ``dtype``; what the kernels compute with, exactly, where ``dtype`` holds it."""
    out: list[Tensor | None] = []
    for codes, scales in zip(row.codes, row.scales, strict=True):
        if codes is None or scales is None:
            out.append(None)
            continue
        values = in_memory(codes).to(torch.float64)
        values *= scales.double().repeat_interleave(BLOCK)[: values.numel()]
        target = torch.empty_like(codes, dtype=dtype)
        in_memory(target).copy_(values)
        out.append(target)
    return out


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def in_memory(t: Tensor) -> Tensor:
    """A gap-free tensor's elements in the order of memory."""
    return t.as_strided((t.numel(),), (1,))


def _quantize(t: Tensor) -> tuple[Tensor, Tensor]:
    dense = torch.empty_like(t)  # the strides of t without its gaps and overlaps
    if dense.stride() == t.stride():
        dense = t
    else:
        dense.copy_(t)
    codes = torch.empty_like(dense, dtype=DTYPE)
    scales = torch.empty(-(-t.numel() // BLOCK), dtype=torch.float32, device=t.device)
    source, target = in_memory(dense), in_memory(codes)
    for start in range(0, t.numel(), _CHUNK):
        part = source[start : start + _CHUNK].float()
        padded = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scale = _upwards(padded.abs().amax(dim=1) / torch.finfo(DTYPE).max)
        scales[start // BLOCK : start // BLOCK + len(scale)] = scale
        unit = torch.where(scale > 0, scale, 1.0)[:, None]
        target[start : start + _CHUNK] = (padded / unit).view(-1)[: part.numel()].to(DTYPE)
    return codes, scales


def _upwards(scale: Tensor) -> Tensor:
    """Rounded up to 16 significant bits; the largest element of the block still rounds to the largest code."""
    return (scale.view(torch.int32) + 0xFF).bitwise_and_(~0xFF).view(torch.float32)
