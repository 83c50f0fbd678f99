"""`make bench`: TorchJD beside the projection, both of its paths, from the rows as ``torchjd.autojac.backward`` leaves them."""

import functools
import statistics
from typing import NamedTuple

import pytest
import torch

import gradproj
import harness
import parameter_lists as lists
from harness import Case

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
TITLE = "UPGrad of K + 1 rows: this package with TorchJD's weighting against TorchJD"
CASES = [Case(f"GPT-2 124M float32, K = {k}", lists.gpt2_124m(), directions=k, rounds=3) for k in (2, 4, 8)]


class Contest(NamedTuple):
    """Medians in seconds, ratios over the fused one, bytes beyond the rows. None: the result was wrong."""

    seconds: dict[str, list[float] | None]
    extra_bytes: dict[str, int | None]

    def line(self, name: str) -> str:
        fused = self.seconds["gradproj"]
        assert fused is not None, "gradproj: wrong result"
        header = f"| {name} | {harness.duration(statistics.median(fused))} | {self.extra_bytes['gradproj'] / 2**20:.2f} MiB |"
        for other in TORCHJD:
            seconds, extra = self.seconds[other], self.extra_bytes[other]
            if seconds is None or extra is None:
                header += " wrong result | |"
            else:
                header += f" {harness.ratio(seconds, fused):.1f} x | {extra / 2**20:.0f} MiB |"
        return header


def jacobians(case: Case) -> list[torch.nn.Parameter]:
    """Parameters whose ``.jac`` [K + 1, *shape] holds the rows; row 0 is also ``.grad``."""
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


def fused(parameters) -> None:
    """In place: afterwards row 0 of the Jacobians is the aggregate."""
    gradproj.project_(*rows_of(parameters), method=aggregation.UPGradWeighting())


def torchjd(parameters, gramian_path: bool) -> None:
    """Leaves the aggregate in ``.grad``, N bytes of the memory counted: TorchJD has no path in place."""
    from torchjd.autojac import jac_to_grad

    for p in parameters:
        p.grad = None
    jac_to_grad(parameters, aggregation.UPGrad(), retain_jac=True, optimize_gramian_computation=gramian_path)


TORCHJD = {
    "TorchJD, concatenated": functools.partial(torchjd, gramian_path=False),
    "TorchJD, Gramian": functools.partial(torchjd, gramian_path=True),
}


def contest(case: Case) -> Contest:
    parameters = jacobians(case)
    rows = rows_of(parameters)
    weights = aggregation.UPGradWeighting()(harness.exact_gram(rows)).tolist()
    right = {}
    for name, run in TORCHJD.items():
        run(parameters)
        right[name] = harness.is_combination([p.grad for p in parameters], rows, weights)
        for p in parameters:
            p.grad = None
    copies = [g.clone() for g in rows[0]]
    gradproj.project_(copies, *rows[1:], method=aggregation.UPGradWeighting())
    right["gradproj"] = harness.is_combination(copies, rows, weights)
    del copies
    runs = {"gradproj": fused, **TORCHJD}
    timed = {name: functools.partial(run, parameters) for name, run in runs.items() if right[name]}
    extra: dict[str, int | None] = dict.fromkeys(runs)
    for name, run in timed.items():
        extra[name] = harness.extra_memory(run, "cpu")
        for p in parameters:
            p.grad = None
    times = harness.in_turns(timed, case.rounds, "cpu")
    return Contest({name: times.get(name) for name in runs}, extra)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_upgrad(case, tables, benchmark):
    lines = tables.setdefault(
        TITLE,
        [
            "| case | gradproj | extra memory | " + " | ".join(f"{name} | extra memory" for name in TORCHJD) + " |",
            "| --- " + "| ---: " * (2 + 2 * len(TORCHJD)) + "|",
        ],
    )
    found = contest(case)
    lines.append(found.line(case.name))
    parameters = jacobians(case)
    benchmark.pedantic(fused, (parameters,), rounds=2, warmup_rounds=1)
