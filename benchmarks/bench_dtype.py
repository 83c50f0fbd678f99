"""Directions in 16 bits: what they cost, and how exact they are. K = 8, the directions' own Gram known, as the wrapper
has it."""

import functools
import statistics

import torch

import gradproj
import harness
import parameter_lists as lists
import timing
from gradproj.kernels import methods
from gradproj.rows import functional
from harness import Case

CASE = Case("GPT-2 124M float32, K = 8", lists.gpt2_124m(), directions=8, rounds=5)
TITLE = f"Directions(dtype=): {CASE.name}"
HEAD = (
    "| dtype | bytes a direction | time a projection | x float32 | cosine to the exact direction | "
    "of the projected gradients |"
)


def cosine(a, b) -> float:
    gram = gradproj.gram(a, b)
    return float(gram[0, 1] / gram.diagonal().sqrt().prod())


def project(grads, rows, gram_dd) -> gradproj.Projection:
    return functional.project_rows(grads, rows, methods.parse("orthogonal"), None, gram_dd)


def test_dtype(tables, benchmark):
    made = harness.make_rows(CASE, "cpu")
    grads, directions = made.grads, made.directions
    for d in directions:  # so that there is something to remove
        torch._foreach_add_(d, grads, alpha=-0.2)
    runs, cells, wanted = {}, {}, None
    for dtype in (torch.float32, torch.bfloat16):
        rows = [[t.to(dtype) for t in d] for d in directions]
        gram_dd, copy = gradproj.gram(*rows), [g.clone() for g in grads]
        info = project(copy, rows, gram_dd)
        error = harness.relative_error(copy, [grads, *rows], info.weights.tolist())
        assert error <= 1e-5 and info.applied, f"wrong result with {dtype}: {error}"
        wanted = wanted or copy
        held = sum(t.numel() * t.element_size() for t in rows[0]) / 1e6
        cells[dtype] = f"{held:.0f} MB", f"{cosine(directions[0], rows[0]):.5f} | {cosine(wanted, copy):.5f}"
        runs[dtype] = functools.partial(project, grads, rows, gram_dd)
    seconds = timing.in_turns(runs, CASE.rounds, "cpu")
    lines = tables.setdefault(TITLE, [HEAD, "| --- | ---: | ---: | ---: | ---: | ---: |"])
    for dtype, (held, exactness) in cells.items():
        time = harness.duration(statistics.median(seconds[dtype]))
        speed = timing.ratio(seconds[torch.float32], seconds[dtype])
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {held} | {time} | {speed:.2f} | {exactness} |")
    benchmark.pedantic(runs[torch.bfloat16], rounds=3)
