"""`make bench`: protected directions kept in fewer bytes: what a step then costs, and what it still knows of the exact ones."""

import functools
import statistics

import torch
from torch import Tensor

import gradproj
import harness
import parameter_lists as lists
from gradproj import float8
from harness import Case

TITLE = "a store of 8 directions, GPT-2 124M float32 gradients"
CASE = Case("GPT-2 124M float32, K = 8", lists.gpt2_124m(), directions=8, rounds=5)


def stored(direction: list[Tensor], dtype: torch.dtype):
    if dtype == float8.DTYPE:
        return float8.quantize(direction)
    return direction if dtype == torch.float32 else [t.to(dtype) for t in direction]


def held_bytes(row) -> int:
    tensors = [*row.codes, *row.scales] if isinstance(row, float8.Float8Row) else row
    return sum(t.nbytes for t in tensors)


def exact(row) -> list[Tensor]:
    return float8.dequantize(row) if isinstance(row, float8.Float8Row) else row


def cosine(a, b) -> float:
    return float(gradproj.gram(a, b)[0, 1] / gradproj.gram(a, b).diagonal().sqrt().prod())


def project(grads, rows, known) -> None:
    gradproj.project_(grads, *rows, known=known)


def test_store(tables, benchmark):
    """A step projects with the directions' own Gram known, as the wrapper does."""
    made = harness.make_rows(CASE, "cpu")
    grads, directions = made.grads, made.directions
    for d in directions:  # so that there is something to remove
        torch._foreach_add_(d, grads, alpha=-0.2)
    stores = {dtype: [stored(d, dtype) for d in directions] for dtype in (torch.float32, torch.bfloat16, float8.DTYPE)}
    runs, cells, wanted = {}, {}, None
    for dtype, rows in stores.items():
        known = gradproj.gram(*rows)
        copy = [g.clone() for g in grads]
        info = gradproj.project_(copy, *rows, known=known)
        error = harness.relative_error(copy, [grads, *map(exact, rows)], info.weights.tolist())
        assert error <= 1e-5 and info.applied, f"wrong result with {dtype}: {error}"
        wanted = wanted or copy
        cells[dtype] = f"{cosine(directions[0], rows[0]):.5f} | {cosine(wanted, copy):.5f}"
        runs[dtype] = functools.partial(project, grads, rows, known)
    seconds = harness.in_turns(runs, CASE.rounds, "cpu")
    lines = tables.setdefault(
        TITLE,
        [
            "| store | bytes a direction | time a projection | x float32 | cosine to the exact direction | of the projected gradients |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ],
    )
    for dtype, rows in stores.items():
        time = harness.duration(statistics.median(seconds[dtype]))
        speed = harness.ratio(seconds[torch.float32], seconds[dtype])
        name = str(dtype).removeprefix("torch.")
        lines.append(f"| {name} | {held_bytes(rows[0]) / 1e6:.0f} MB | {time} | {speed:.2f} | {cells[dtype]} |")
    benchmark.pedantic(runs[float8.DTYPE], rounds=3)
