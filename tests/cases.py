"""Random rows of every kind that a projection takes, and how exact the answer has to be."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "sliced", "misaligned", "reversed_dims", "column"]
# fmt: off
SHAPES = [
    (), (1,), (0,), (3, 0, 2), (7,), (64,), (5, 3), (2, 3, 4), (4, 6, 3, 5), (257,), (33, 9), (1, 1, 5), (1040,),
    (65, 63),
]
# fmt: on


def make_buffer(
    shape: Sequence[int], dtype: torch.dtype, layout: str, rng: torch.Generator, device="cpu"
) -> torch.Tensor:
    """A tensor of random values with the given memory layout."""

    def values(*size):
        return torch.randn(size, generator=rng, dtype=torch.float64).to(device=device, dtype=dtype)

    if layout == "contiguous" or not shape:
        return values(*shape)
    if layout == "misaligned":  # starts one element into its storage
        n = int(np.prod(shape))
        return values(n + 1)[1:].view(shape)
    if layout == "sliced":  # every second element of the last dimension
        return values(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "column":  # the first part of a wider matrix
        return values(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
    if layout == "reversed_dims":
        return values(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "transposed":
        order = [*range(1, len(shape)), 0]
        inverse = [order.index(i) for i in range(len(shape))]
        return values(*(shape[i] for i in order)).permute(*inverse)
    if layout == "expanded":  # one slice seen many times: a direction may be this, a gradient not
        return values(1, *shape[1:]).expand(*shape)
    raise ValueError(layout)


def placed(row, shift, gap):
    """A copy of ``row`` in one buffer, its first tensor ``shift`` bytes past a 64-byte boundary, ``gap`` elements
    between tensors."""
    size = row[0].element_size()
    shift = shift // size * size
    buffer = torch.empty(sum(t.numel() + gap for t in row) * size + 128, dtype=torch.uint8)
    at = -buffer.data_ptr() % 64 + shift
    result = []
    for t in row:
        length = t.numel() * size
        result.append(buffer[at : at + length].view(t.dtype).view(t.shape).copy_(t))
        at += length + gap * size
    return result


@st.composite
def rows(draw, max_directions=8, none_in_grads=True, dtypes=DTYPES, max_buffers=5, device="cpu"):
    """(grads, directions): lists of buffers that differ in everything that may differ."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k = draw(st.integers(1, max_directions))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=max_buffers))
    one_dtype = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    one_layout = draw(st.booleans())
    result = []
    for row in range(k + 1):
        buffers = []
        for shape in shapes:
            layouts = ["contiguous"] if one_layout else LAYOUTS + (["expanded"] if row else [])
            absent = draw(st.integers(0, 5)) == 0 and (row > 0 or none_in_grads)
            kind = draw(st.sampled_from(layouts))
            wanted = dtype if one_dtype else draw(st.sampled_from(dtypes))
            buffers.append(None if absent else make_buffer(shape, wanted, kind, rng, device))
        result.append(buffers)
    return result[0], result[1:]


def clone(buffers):
    """Copies with the same strides, so that a projection of the copy takes the same path."""
    out = []
    for t in buffers:
        if t is None:
            out.append(None)
            continue
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        out.append(
            torch.as_strided(torch.full((span,), float("nan"), dtype=t.dtype, device=t.device), t.shape, t.stride())
        )
        if span:
            out[-1].copy_(t)
    return out


def assert_gram_close(actual: torch.Tensor, expected: np.ndarray, tolerance=1e-6):
    """Relative to |x||y|, which is what the error of a sum of products scales with."""
    assert actual.dtype == torch.float64
    lengths = np.sqrt(np.diag(expected))
    error = np.abs(actual.cpu().numpy() - expected)
    assert (error <= tolerance * np.outer(lengths, lengths) + 1e-300).all(), (actual, expected)


def assert_combined_close(actual, expected, rows_in, weights):
    """One rounding to the dtype of the gradient, plus float32 arithmetic on the terms."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a is None:
            continue
        wide = any(r[i] is not None and r[i].dtype == torch.float64 for r in rows_in)
        wide = wide and a.dtype == torch.float64
        terms = sum(
            abs(w) * r[i].double().cpu().abs().numpy().reshape(-1)
            for w, r in zip(weights, rows_in, strict=True)
            if r[i] is not None and w != 0
        )
        step = torch.finfo(a.dtype).eps * np.abs(e) / 2 + (
            torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps
        )
        bound = 1.01 * step + (1e-14 if wide else 1e-6) * terms
        error = np.abs(a.double().cpu().numpy().reshape(-1) - e)
        assert (error <= bound).all(), (i, error.max(), a.dtype, a.shape, a.stride())
