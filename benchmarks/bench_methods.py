"""`make bench`: Gram -> weights on the CPU, one system and one thread."""

import statistics

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

import gradproj
import harness
import timing

TITLE = "weights of K directions from their Gram: the solver alone"
METHODS = ("orthogonal", "conflict", "pcgrad")


def conflicting_gram(k: int) -> torch.Tensor:
    """Directions that lean against the gradient and towards each other, as gradients of one task do."""
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(k + 1, 4 * k, generator=generator, dtype=torch.float64)
    rows[1:] += torch.randn(4 * k, generator=generator, dtype=torch.float64) - 0.2 * rows[0]
    return rows @ rows.T


def nnls(gram: torch.Tensor) -> np.ndarray:
    """The weights of "conflict" by scipy: non-negative least squares on a triangular factor of the directions' Gram."""
    factor = scipy.linalg.cholesky(gram[1:, 1:].numpy())
    target = scipy.linalg.solve_triangular(factor, -gram[1:, 0].numpy(), trans="T")
    return np.concatenate([[1.0], scipy.optimize.nnls(factor, target)[0]])


@pytest.mark.parametrize("k", [8, 32, 64])
def test_weights(k, tables, benchmark):
    gram = conflicting_gram(k)
    op = gradproj.backends()["cpu"].op("weights")
    np.testing.assert_allclose(op(gram, "conflict", 0.0, 0.0), nnls(gram), rtol=1e-6, atol=1e-9)
    expected = torch.linalg.solve(gram[1:, 1:], -gram[1:, 0])
    np.testing.assert_allclose(op(gram, "orthogonal", 0.0, 0.0)[1:], expected, rtol=1e-6, atol=1e-9)
    contenders = {name: lambda name=name: op(gram, name, 0.0, 0.0) for name in METHODS}
    contenders["scipy nnls"] = lambda: nnls(gram)
    seconds = timing.in_turns(contenders, 11, "cpu")
    heads = [f"| K | {' | '.join(contenders)} |", "| ---: " * (1 + len(contenders)) + "|"]
    times = [harness.duration(statistics.median(found)) for found in seconds.values()]
    tables.setdefault(TITLE, heads).append(f"| {k} | {' | '.join(times)} |")
    benchmark.pedantic(op, (gram, "conflict", 0.0, 0.0), rounds=100, warmup_rounds=10)
