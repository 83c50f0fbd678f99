"""`make continual`: tasks learned one after the other: what is left of the first ones, and room for the last ones.

Fashion-MNIST as two sequences of tasks (:data:`continual_tasks.KINDS`), each way to learn them on a grid of its own
that other seeds have chosen from. A :class:`cures.Cure` says which: ``lr`` is the learning rate itself, ``share`` a
NullSpace's or GPM's threshold, ``allocation`` "a task" a share that grows with the tasks.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laboratory import report
from laboratory.continual_methods import METHODS, learn
from laboratory.continual_tasks import DEBIAN, KINDS, Sequences, check
from laboratory.cures import Cure
from laboratory.points import Point, points
from laboratory.runs import FIRST_REPORTED, Plan, Run, cores, make_all
from machine import machine

OUT = Path(__file__).parent.parent / "results" / "continual"
COLOURS = dict(
    zip(
        METHODS,
        ("#222222", "#a6761d", "#d55e00", "#e69f00", "#8a8a8a", "#009e73", "#0072b2", "#56b4e9"),
        strict=True,
    )
)
DAMPING = 0.3  # of param_groups, the package's default


def cure(family: str, lr: float, **turned: Any) -> Cure:
    """One whose strength names what is turned."""
    words = {"ewc": "strength", "share": "threshold" if family == "GPM" else "share"}
    named = [f"{words[k]} {v:g}" for k, v in turned.items() if k in words]
    return Cure(family, ", ".join([*named, f"lr {lr:g}"]), lr=lr, **turned)


def crossed(family: str, low: float, middle: float, high: float, **turned: Any) -> list[Cure]:
    """Three rates at the middle share, three shares at the middle rate."""
    settings = ((0.02, middle), (0.05, low), (0.05, middle), (0.05, high), (0.1, middle))
    return [cure(family, lr, share=share, **turned) for lr, share in settings]


GRID = [
    *(cure("plain", lr) for lr in (0.002, 0.005, 0.01, 0.02)),
    *(cure("EWC", 0.01, ewc=strength) for strength in (20, 50, 500)),
    *(cure("EWC", lr, ewc=strength) for lr, strength in ((0.005, 100), (0.02, 20), (0.02, 100))),
    *(cure("replay", lr, gamma=1) for lr in (0.01, 0.02, 0.05)),
    *(cure("Directions, fresh (A-GEM)", lr, method="conflict") for lr in (0.005, 0.01, 0.02)),
    *(cure("Directions, kept (OGD)", lr, method="orthogonal") for lr in (0.002, 0.005, 0.01)),
    *crossed("GPM", 0.85, 0.9, 0.95),
    *crossed("NullSpace, fixed share", 0.07, 0.15, 0.3, damping=DAMPING),
    *crossed("NullSpace, share a task", 0.015, 0.03, 0.06, allocation="a task", damping=DAMPING),
]


def grid(kind: str) -> list[Cure]:
    """Permuted tasks take twice the time: there a NullSpace has one learning rate, and GPM two."""
    left_out = {"NullSpace": (0.02, 0.1), "GPM": (0.1,)} if kind == "permuted" else {}
    return [c for c in GRID if c.lr not in left_out.get(c.family.split(",")[0], ())]


def make(plan: Plan, run: Run) -> None:
    """Make one run and keep it."""
    plan.store.save(*run, learn(plan.model, *run))


def choose(tried: list[Point]) -> list[Cure]:
    """Of each family the setting with the best ACC."""
    best: dict[str, Point] = {}
    for p in tried:
        best[p.cure.family] = max(best.get(p.cure.family, p), p, key=lambda p: p.mean("acc"))
    return [p.cure for p in best.values()]


def behind(of: list[Point]) -> dict[str, tuple[float, float]]:
    """How much less ACC a family has than the best one: mean and deviation over the seeds, whose tasks are the same."""
    best = max(of, key=lambda p: p.mean("acc")).values["acc"]
    gaps = {p.cure.family: [b - a for a, b in zip(p.values["acc"], best, strict=True)] for p in of}
    return {family: (statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for family, x in gaps.items()}


def table(kind: str, finished: list[dict[str, Any]]) -> str:
    of, rows = points(finished), []
    gap = behind(of)
    for p in of:
        measured = [r["measured"] for r in finished if r["cure"]["family"] == p.cure.family]
        held = [statistics.mean(100 * m["fixed"][t] for m in measured) for t in (0, -1)]
        cells = [f"{100 * p.mean(m):.1f} ± {100 * p.spread(m):.1f}" for m in ("acc", "bwt", "learned")]
        less = "{:.1f} ± {:.1f}".format(*(100 * x for x in gap[p.cure.family]))
        fixed = "{:.0f} to {:.0f}".format(*held) if held[-1] else ""
        cost = [f"{p.step_ms:.2f}", f"{p.extra_bytes / 1e6:.1f}"]
        rows.append([p.cure.family, p.cure.strength, cells[0], less, *cells[1:], fixed, *cost])
    heads = ["method", "chosen", "ACC, %", "below the best", "BWT, %", "learned, %", "weights fixed, %", "ms a step"]
    best, *others = sorted(gap, key=lambda family: gap[family][0])
    close = [family for family in others if gap[family][0] <= gap[family][1]]
    sentence = f"Best: {best}. Inside the seeds' spread of it: {'; '.join(close) or 'none'}."
    return f"### {KINDS[kind]}\n\n{report.markdown([*heads, 'MB kept'], rows)}\n\n{sentence}"


def choices(tried: dict[str, list[Point]]) -> str:
    """ACC of every setting on the choosing seeds; the chosen ones bold."""
    rows = []
    for setting in GRID:
        cells = []
        for of in tried.values():
            mine = [p for p in of if p.cure == setting]
            shown = "".join(f"{100 * p.mean('acc'):.1f} ± {100 * p.spread('acc'):.1f}" for p in mine)
            cells.append(f"**{shown}**" if setting in choose(of) else shown)
        rows.append([setting.family, setting.strength, *cells])
    return report.markdown(["method", "setting", *(f"ACC, {kind}, %" for kind in tried)], rows)


def draw(finished: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A row for each kind: over the tasks, their mean accuracy, that of the newest, and the weights that are fixed."""

    def so_far(measured: dict[str, Any]) -> list[float]:
        return [100 * statistics.mean(row) for row in measured["accuracy"]]

    def newest(measured: dict[str, Any]) -> list[float]:
        return [100 * row[-1] for row in measured["accuracy"]]

    def fixed(measured: dict[str, Any]) -> list[float]:
        return [100 * share for share in measured["fixed"]]

    panels = {"mean of all tasks so far": so_far, "the newest task, just learned": newest, "weights fixed": fixed}
    with report.picture(path, len(finished), 3, figsize=(14, 4.2 * len(finished)), dpi=100) as (made, grid):
        for row, (kind, runs) in zip(grid, finished.items(), strict=True):
            for axes, (title, series) in zip(row, panels.items(), strict=True):
                for family, colour in COLOURS.items():
                    values = [series(r["measured"]) for r in runs if r["cure"]["family"] == family]
                    means = [statistics.mean(v) for v in zip(*values, strict=True)]
                    if any(means):
                        axes.plot(range(1, len(means) + 1), means, color=colour, label=family, marker=".")
                axes.set_title(f"{kind}: {title}", fontsize=10)
                axes.set_xlabel("tasks learned")
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.set_ylabel("%")
                axes.grid(color="#eeeeee")
        handles, labels = grid[0][0].get_legend_handles_labels()
        made.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
        made.tight_layout(rect=(0, 0.07, 1, 1))


def options(parser: argparse.ArgumentParser) -> None:
    data = "folder with Fashion-MNIST's four gzipped files (default: where Debian's dataset-fashion-mnist has them)"
    parser.add_argument("--data", type=Path, default=DEBIAN, help=data)
    parser.add_argument("--seeds", type=int, default=5, help="that are reported (default 5)")
    parser.add_argument("--choosing-seeds", type=int, default=3, help="other seeds, which choose (default 3)")
    parser.add_argument("--images", type=int, default=Sequences.images, help="of a task (default %(default)s)")
    work = Path("build/continual")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="table, figure (default benchmarks/results/continual)")


def main(options: argparse.Namespace, progress: Callable) -> None:
    check(options.data)
    report.check()
    of = Sequences(options.data, options.images)
    plan, workers = Plan(of, options.work), options.workers or cores("cpu")
    choosing, seeds = range(options.choosing_seeds), range(FIRST_REPORTED, FIRST_REPORTED + options.seeds)
    tried = make_all(plan, [Run(k, c, s) for k in KINDS for c in grid(k) for s in choosing], workers, progress, make)
    of_kind = {kind: points([r for r in tried if r["objective"] == kind]) for kind in KINDS}
    runs = [Run(kind, c, seed) for seed in seeds for kind in KINDS for c in choose(of_kind[kind])]
    finished = make_all(plan, runs, workers, progress, make)
    by_kind = {kind: [r for r in finished if r["objective"] == kind] for kind in KINDS}
    progress("")
    made = {**machine("cpu"), "workers": workers, "seeds": len(seeds), "choosing seeds": len(choosing)}
    settings = {k: v for k, v in dataclasses.asdict(of).items() if k != "data"}
    options.out.mkdir(parents=True, exist_ok=True)
    dumped = report.dump({"made": made, "settings": settings}, runs=finished, chosen_from=tried)
    (options.out / "runs.json").write_text(dumped)
    text = "\n\n".join(table(kind, by_kind[kind]) for kind in KINDS)
    text = f"Made by {report.header(made)}.\n\n{text}\n\n### What each choice was made from\n\n{choices(of_kind)}\n"
    (options.out / "table.md").write_text(text)
    draw(by_kind, options.out / "figure.png")
    print(f"{text}\nin {options.out}")
