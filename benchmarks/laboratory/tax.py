"""`make tax`: aligns a small language model under every cure, and measures what each costs it.

Some seeds choose each family's settings, others are reported: in runs.json, table.md, figure.png, a page, and three
sentences.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from laboratory import figure, page, report
from laboratory.cures import BASE, NONE
from laboratory.model import VERSION
from laboratory.points import METRICS, Point, pareto, points
from laboratory.report import forgotten
from laboratory.runs import FIRST_REPORTED, Plan, Run, cores, make_all
from laboratory.small import HARDER, OBJECTIVES, SCALES, small
from laboratory.tax_cures import BUDGETS, LEVELS, choose, grid, least_forgetting, plain_steps, reached, usual
from machine import machine

RESULTS = Path(__file__).parent.parent / "results"
EQUAL = 0.9  # of what the best setting learns: the target quality at which cures are compared
RARE = 1 / 4  # capability backward passes a step up to which a cure counts as cheap


def table(base: dict[str, Any], of: list[Point]) -> str:
    heads = ["cure", *(f"{m.label}, {m.unit}" if m.unit else m.label for m in METRICS.values())]
    heads += ["ms a step", "capability backward passes", "extra MB"]
    parts = []
    for objective, (title, *_) in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        best = pareto(mine)
        rows = [["base model", *(metric.show(base["measured"][m]) for m, metric in METRICS.items()), "", "", ""]]
        for p in mine:
            cells = [f"{metric.show(p.mean(m))} ± {metric.show(p.spread(m))}" for m, metric in METRICS.items()]
            trained = p.step_ms is not None
            cost = (
                [f"{p.step_ms:.0f}", str(p.backwards), f"{p.extra_bytes / 1e6:.1f}"] if trained else ["none", "0", "0"]
            )
            rows.append([f"**{p.cure.name}**" if p in best else p.cure.name, *cells, *cost])
        parts += [f"### {title}", frontiers(base, mine)]
        if objective == HARDER:
            parts.append(budgets(base, mine))
        parts.append(report.markdown(heads, rows))
    return "\n\n".join(parts)


def frontiers(base: dict[str, Any], mine: list[Point]) -> str:
    """Per family, what it forgets at equal target quality: a row of the least forgetting at each level."""
    metric = METRICS[OBJECTIVES[mine[0].objective].target]
    start = base["measured"][OBJECTIVES[mine[0].objective].target]
    heads = ["forgotten, nats a byte"]
    heads += [f"at {metric.show(reached(start, mine, level))} % {metric.label}" for level in LEVELS]
    rows = []
    for family in dict.fromkeys(p.cure.family for p in mine):
        best = [least_forgetting(mine, reached(start, mine, level), family) for level in LEVELS]
        rows.append([family, *(_at_level(base, p) if p else "not reached" for p in best)])
    return report.markdown(heads, rows)


def budgets(base: dict[str, Any], mine: list[Point]) -> str:
    """Per family, what it forgets at equal work: a row of the least forgetting within each budget."""
    target = OBJECTIVES[mine[0].objective].target
    enough = usual(base["measured"][target], mine)
    heads = [f"forgotten at {METRICS[target].show(enough)} %, within", *(f"{b:g} x the work" for b in BUDGETS)]
    rows = []
    for family in dict.fromkeys(p.cure.family for p in mine):
        best = [least_forgetting(mine, enough, family, budget) for budget in BUDGETS]
        rows.append([family, *(_at_level(base, p) if p else "not reached" for p in best)])
    return report.markdown(heads, rows)


def _at_level(base: dict[str, Any], p: Point) -> str:
    return f"{forgotten(base['measured'], p):+.3f} ± {p.spread('loss'):.3f} ({p.cure.strength})"


def sentences(base: dict[str, Any], of: list[Point]) -> list[str]:
    """What won, what did not, at which cost: computed at equal target quality, whatever the answer is."""
    won, lost, cost = [], [], []
    for objective, (title, target, *_) in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        start, metric = base["measured"], METRICS[target]
        unprotected = [p for p in mine if p.cure.family == NONE.family]
        full = next(p for p in unprotected if p.cure == NONE)
        enough = reached(start[target], mine, EQUAL)
        none = least_forgetting(mine, enough, NONE.family) or max(unprotected, key=lambda p: p.target)
        tax = forgotten(start, none)

        def shown(p: Point, start=start, metric=metric) -> str:
            return f"{forgotten(start, p):+.3f} nats a byte at {metric.show(p.target)} {metric.unit} {metric.label}"

        without = f"the best setting without a cure, {none.cure.strength}, {shown(none)}"
        if tax <= none.spread("loss"):
            won.append(f"with {title} there was no tax to prevent ({without})")
            continue
        cures = [p for p in mine if p.cure.family != NONE.family]
        able = [p for p in cures if p.target >= enough]
        best = min(able, key=lambda p: p.mean("loss"), default=None)
        if best is None or forgotten(start, best) >= tax:
            won.append(f"with {title} no cure forgot less and learned as much ({without})")
        else:
            won.append(f"with {title} {best.cure.name} ({shown(best)}; {without})")
        helped = {p.cure.family for p in able if none.mean("loss") - p.mean("loss") > none.spread("loss")}
        failed = [f'"{f}"' for f in dict.fromkeys(p.cure.family for p in cures) if f not in helped]
        lost.append(f"with {title} {', '.join(failed) or 'nothing'}")
        useful = [p for p in able if p.step_ms is not None and forgotten(start, p) < tax]
        cheap = min(
            (p for p in useful if p.backwards <= RARE * plain_steps(mine)), key=lambda p: p.mean("loss"), default=None
        )
        for p, role in ((best, "the winner"), (cheap, "the best with few capability passes")):
            if p is None or forgotten(start, p) >= tax or (p is best and role != "the winner"):
                continue
            price = "no training"
            if p.step_ms is not None:
                price = (
                    f"{p.step_ms / full.step_ms:.1f} x the time of a step, {p.backwards} capability backward passes "
                    f"and {p.extra_bytes / 1e6:.1f} MB"
                )
            cost.append(f"with {title} {role} ({p.cure.name}, {forgotten(start, p):+.3f}) took {price}")
    bar = f"learn {EQUAL:.0%} of what the best did and forget less than without a cure, beyond the seeds' spread"
    return [
        f"What won, of the cures that learned {EQUAL:.0%} of what the best did: {'; '.join(won)}.",
        f"What did not, at any reported setting, {bar}: {'; '.join(lost)}.",
        f"What it cost: {'; '.join(cost) or 'nothing was won'}.",
    ]


def write(
    base: dict[str, Any], tried: list[dict[str, Any]], finished: list[dict[str, Any]], plan: Plan, out: Path
) -> str:
    """Write everything into ``out`` and say what it is.

    Args:
        tried: runs on the choosing seeds, which are kept in runs.json and shown nowhere.
        finished: runs on the reported seeds.
    """
    out.mkdir(parents=True, exist_ok=True)
    of = points(finished)
    device = plan.model.device
    seeds = {"reported seeds": len({r["seed"] for r in finished}), "choosing seeds": len({r["seed"] for r in tried})}
    made = {**machine(device), "command": _command(), "device": device, "scale": plan.model.name, **seeds}
    facts = {"made": made, "settings": dataclasses.asdict(plan.model.settings)}
    found = sentences(base, of)
    chosen_from = [{**r, "measured": {k: v for k, v in r["measured"].items() if k != "bins"}} for r in tried]
    runs = report.dump({**facts, "found": found, "base": base}, runs=finished, chosen_from=chosen_from)
    (out / "runs.json").write_text(runs)
    text = write_table(base, of, made, found, out / "table.md")
    figure.draw(base, of, out / "figure.png")
    page.write(base, of, made, found, plan.store.folder / "index.html")
    return f"{text}\n\n" + "\n".join(found)


def write_table(base: dict[str, Any], of: list[Point], made: dict[str, Any], found: list[str], path: Path) -> str:
    text, levels = table(base, of), ", ".join(f"{level:.0%}" for level in LEVELS)
    path.write_text(
        f"Mean ± standard deviation over {made['reported seeds']} seeds, other than those that chose the settings. "
        f"First, each family's least forgetting at {levels} of what the best setting learned, in the harder case also "
        f"within equal work: forward and backward passes, in unprotected runs. Then every reported setting. "
        f"Bold: no other is better in both target and loss.\nMade by {report.header(made)}.\n\n{text}\n\n"
        + "".join(f"- {s}\n" for s in found)
    )
    return text


def read(source: Path) -> dict[str, Any]:
    """A ``runs.json``.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist: make it with `make tax`")
    try:
        everything = json.loads(source.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{source} is not JSON ({e}): make it again with `make tax`") from None
    if everything.get("version") != VERSION:
        raise ValueError(
            f"{source} is of version {everything.get('version')}, not {VERSION}: make it again with `make tax`"
        )
    return everything


def _command() -> str:
    arguments = shlex.join(sys.argv[2:])
    return f"make tax{f' ARGS={shlex.quote(arguments)}' if arguments else ''}"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="sizes of everything (default cpu)")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick", help="the same as --scale quick")
    parser.add_argument("--device", help="cpu or cuda (default: cuda for --scale gpu)")
    parser.add_argument("--seeds", type=int, default=3, help="alignments of each reported setting (default 3)")
    parser.add_argument("--choosing-seeds", type=int, help="other seeds, which choose the settings (default: --seeds)")
    work = Path("build/alignment_tax")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    where = "table, figure, page (default: results/alignment_tax, for --quick DIR/quick)"
    parser.add_argument("--out", type=Path, help=where)
    parser.add_argument("--page", action="store_true", help="no runs: only the page of those in --out, into --work")


def main(options: argparse.Namespace, progress: Callable) -> None:
    out = options.out or (RESULTS if options.scale == "cpu" else options.work) / "alignment_tax"
    if options.page:
        kept = read(out / "runs.json")
        page.write(kept["base"], points(kept["runs"]), kept["made"], kept["found"], options.work / "index.html")
        print(f"page: {options.work / 'index.html'}")
        return
    for name, count in (("--seeds", options.seeds), ("--choosing-seeds", options.choosing_seeds)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    device = options.device or ("cuda" if options.scale == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")
    report.check()
    begin, workers = time.perf_counter(), options.workers or cores(device)
    plan = Plan(small(options.scale, device, options.work, progress), options.work)
    for other in plan.store.others:
        progress(f"ignored, made with other settings or versions: {other}")
    choosing = grid(options.choosing_seeds or options.seeds)
    base, *tried = make_all(plan, [Run("base", BASE, 0), *choosing], workers, progress)
    reported = [
        Run(objective, cure, FIRST_REPORTED + seed)
        for seed in range(options.seeds)
        for objective in OBJECTIVES
        for cure in choose(base["measured"], [p for p in points(tried) if p.objective == objective])
    ]
    finished = make_all(plan, reported, workers, progress)
    progress("")
    print(write(base, tried, finished, plan, out))
    print(f"\npage: {plan.store.folder / 'index.html'}   ({time.perf_counter() - begin:.0f} s)")
