"""`make bench`: TorchJD beside the projection, both of its paths, from the rows as ``torchjd.autojac.backward`` leaves
them."""

import functools
import statistics
from typing import NamedTuple

import pytest
import torch

import gradproj
import harness
import parameter_lists as lists
import timing
from harness import Case

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
TITLE = "UPGrad of K + 1 rows: this package with TorchJD's weighting against TorchJD"
CASES = [Case(f"GPT-2 124M float32, K = {k}", lists.gpt2_124m(), directions=k, rounds=3) for k in (2, 4, 8)]
# TorchJD's Gram is a float32 sum over all elements, 1e8 of them here: its error is printed, and this much is let pass.
TOLERANCE = {"gradproj": 1e-5, "TorchJD, concatenated": 1e-2, "TorchJD, Gramian": 1e-2}


class Result(NamedTuple):
    """``seconds`` per round and ``extra_bytes`` beyond the rows; both None where the error is too large."""

    error: float
    seconds: list[float] | None
    extra_bytes: int | None

    def cells(self, fused: "Result | None") -> str:
        """Time, or the ratio to ``fused``; memory; error."""
        if self.seconds is None or self.extra_bytes is None:
            return f"wrong result | | {self.error:.0e}"
        time = harness.duration(statistics.median(self.seconds))
        if fused is not None and fused.seconds is not None:
            time += f", {timing.ratio(self.seconds, fused.seconds):.1f} x"
        return f"{time} | {self.extra_bytes / 2**20:.1f} MiB | {self.error:.0e}"


def jacobians(case: Case) -> list[torch.nn.Parameter]:
    """Parameters whose ``.jac`` [K + 1, *shape] holds the rows."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in case.shapes:
        p = torch.nn.Parameter(torch.empty(shape, dtype=case.dtype))
        p.jac = torch.empty(1 + case.directions, *shape, dtype=case.dtype).normal_(generator=generator)
        p.jac[1:] -= 0.2 * p.jac[0]  # so that the directions conflict with the gradient
        parameters.append(p)
    return parameters


def rows_of(parameters) -> list[list[torch.Tensor]]:
    return [list(row) for row in zip(*(p.jac for p in parameters), strict=True)]


def fused(grads, parameters) -> None:
    """In place of ``grads``, row 0, which is a copy: repeated, it drifts into the span of the directions, and on such
    rows TorchJD's float32 Gram is no longer positive definite."""
    gradproj.project_(grads, *rows_of(parameters)[1:], method=aggregation.UPGradWeighting())


def torchjd(grads, parameters, gramian_path: bool) -> None:
    """Leaves the aggregate in ``.grad``: TorchJD has no path in place. Those N bytes are not counted as extra
    memory."""
    from torchjd.autojac import jac_to_grad

    for p in parameters:
        p.grad = None
    jac_to_grad(parameters, aggregation.UPGrad(), retain_jac=True, optimize_gramian_computation=gramian_path)


TORCHJD = {
    "TorchJD, concatenated": functools.partial(torchjd, gramian_path=False),
    "TorchJD, Gramian": functools.partial(torchjd, gramian_path=True),
}
RUNS = {"gradproj": fused, **TORCHJD}


def contest(case: Case) -> dict[str, Result]:
    parameters = jacobians(case)
    rows = rows_of(parameters)
    weights = aggregation.UPGradWeighting()(harness.exact_gram(rows)).tolist()
    errors = {}
    grads = [g.clone() for g in rows[0]]
    for name, run in TORCHJD.items():
        run(grads, parameters)
        errors[name] = harness.relative_error([p.grad for p in parameters], rows, weights)
        for p in parameters:
            p.grad = None
    fused(grads, parameters)
    errors["gradproj"] = harness.relative_error(grads, rows, weights)
    timed = {n: functools.partial(run, grads, parameters) for n, run in RUNS.items() if errors[n] <= TOLERANCE[n]}
    extra = {}
    for name, run in timed.items():
        extra[name] = timing.extra_memory(run, "cpu")
        for p in parameters:
            p.grad = None
    times = timing.in_turns(timed, case.rounds, "cpu")
    return {name: Result(errors[name], times.get(name), extra.get(name)) for name in RUNS}


def line(case: Case, results: dict[str, Result]) -> str:
    fused = results["gradproj"]
    return f"| {case.name} | " + " | ".join(r.cells(None if r is fused else fused) for r in results.values()) + " |"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_upgrad(case, tables, benchmark):
    heads = ["case", *(f"{name} | extra memory | error" for name in RUNS)]
    lines = tables.setdefault(TITLE, [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (3 * len(RUNS)) + "|"])
    results = contest(case)
    lines.append(line(case, results))
    assert results["gradproj"].seconds is not None, f"wrong result: error {results['gradproj'].error:.0e}"
    parameters = jacobians(case)
    grads = [p.jac[0].clone() for p in parameters]
    benchmark.pedantic(fused, (grads, parameters), rounds=2, warmup_rounds=1)
