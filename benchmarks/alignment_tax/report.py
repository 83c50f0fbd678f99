"""Finished runs -> runs.json, table.md, figure.png, a page, and three sentences."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from alignment_tax import figure, page
from alignment_tax.choose import LEVELS, reached
from alignment_tax.cures import NONE
from alignment_tax.points import METRICS, Point, pareto, points
from alignment_tax.runs import Plan
from alignment_tax.settings import OBJECTIVES, VERSION
from harness import machine

EQUAL = 0.9  # of what the best setting learns: the target quality at which cures are compared
RARE = 1 / 4  # capability backward passes a step up to which a cure counts as cheap


def least_forgetting(start: float, of: list[Point], level: float, family: str | None = None) -> Point | None:
    """Among points of one objective, of ``family`` or of all: the one that reaches the level and forgets least."""
    enough = reached(start, of, level)
    mine = [p for p in of if family in (None, p.cure.family) and p.target >= enough]
    return min(mine, key=lambda p: p.mean("loss"), default=None)


def table(base: dict[str, Any], of: list[Point]) -> str:
    heads = [f"{m.label}, {m.unit}" if m.unit else m.label for m in METRICS.values()]
    heads += ["ms a step", "capability backward passes", "extra MB"]
    blank = f"| --- {'| ---: ' * len(heads)}|"
    parts = []
    for objective, (title, *_) in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        best = pareto(mine)
        lines = [f"### {title}", "", frontiers(base, mine), "", f"| cure | {' | '.join(heads)} |", blank]
        cells = [metric.show(base["measured"][m]) for m, metric in METRICS.items()]
        lines.append(f"| base model | {' | '.join(cells)} | | | |")
        for p in mine:
            cells = [f"{metric.show(p.mean(m))} ± {metric.show(p.spread(m))}" for m, metric in METRICS.items()]
            if p.step_ms is None:
                cells += ["none", "0", "0"]
            else:
                cells += [f"{p.step_ms:.0f}", str(p.backwards), f"{(p.extra_bytes or 0) / 1e6:.1f}"]
            name = f"**{p.cure.name}**" if p in best else p.cure.name
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def frontiers(base: dict[str, Any], mine: list[Point]) -> str:
    """Per family, what it forgets at equal target quality: a row of the least forgetting at each level."""
    metric = METRICS[OBJECTIVES[mine[0].objective].target]
    start = base["measured"][OBJECTIVES[mine[0].objective].target]
    heads = [f"at {metric.show(reached(start, mine, level))} % {metric.label}" for level in LEVELS]
    lines = [f"| forgotten, nats a byte | {' | '.join(heads)} |", f"| --- {'| ---: ' * len(heads)}|"]
    for family in dict.fromkeys(p.cure.family for p in mine):
        cells = []
        for level in LEVELS:
            p = least_forgetting(start, mine, level, family)
            cells.append(
                f"{forgotten(base, p):+.3f} ± {p.spread('loss'):.3f} ({p.cure.strength})" if p else "not reached"
            )
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forgotten(base: dict[str, Any], p: Point) -> float:
    return p.mean("loss") - base["measured"]["loss"]


def sentences(base: dict[str, Any], of: list[Point]) -> list[str]:
    """What won, what did not, at which cost: computed at equal target quality, whatever the answer is."""
    won, lost, cost = [], [], []
    for objective, (title, target, _) in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        start, metric = base["measured"][target], METRICS[target]
        unprotected = [p for p in mine if p.cure.family == NONE.family]
        full = next(p for p in unprotected if p.cure == NONE)
        none = least_forgetting(start, mine, EQUAL, NONE.family) or max(unprotected, key=lambda p: p.target)
        tax = forgotten(base, none)

        def shown(p: Point, metric=metric) -> str:
            return f"{forgotten(base, p):+.3f} nats a byte at {metric.show(p.target)} {metric.unit} {metric.label}"

        without = f"the best setting without a cure, {none.cure.strength}, {shown(none)}"
        if tax <= none.spread("loss"):
            won.append(f"with {title} there was no tax to prevent ({without})")
            continue
        enough = reached(start, mine, EQUAL)
        cures = [p for p in mine if p.cure.family != NONE.family]
        able = [p for p in cures if p.target >= enough]
        best = min(able, key=lambda p: p.mean("loss"), default=None)
        if best is None or forgotten(base, best) >= tax:
            won.append(f"with {title} no cure forgot less and learned as much ({without})")
        else:
            won.append(f"with {title} {best.cure.name} ({shown(best)}; {without})")
        helped = {p.cure.family for p in able if none.mean("loss") - p.mean("loss") > none.spread("loss")}
        failed = [f'"{f}"' for f in dict.fromkeys(p.cure.family for p in cures) if f not in helped]
        lost.append(f"with {title} {', '.join(failed) or 'nothing'}")
        useful = [p for p in able if p.step_ms is not None and forgotten(base, p) < tax]
        cheap = min(
            (p for p in useful if p.backwards <= RARE * full_steps(mine)), key=lambda p: p.mean("loss"), default=None
        )
        for p, role in ((best, "the winner"), (cheap, "the best with few capability passes")):
            if p is None or forgotten(base, p) >= tax or (p is best and role != "the winner"):
                continue
            price = (
                "no training"
                if p.step_ms is None
                else (
                    f"{p.step_ms / full.step_ms:.1f} x the time of a step, {p.backwards} capability backward passes "
                    f"and {p.extra_bytes / 1e6:.1f} MB"
                )
            )
            cost.append(f"with {title} {role} ({p.cure.name}, {forgotten(base, p):+.3f}) took {price}")
    bar = f"learn {EQUAL:.0%} of what the best did and forget less than without a cure, beyond the seeds' spread"
    return [
        f"What won, of the cures that learned {EQUAL:.0%} of what the best did: {'; '.join(won)}.",
        f"What did not, at any reported setting, {bar}: {'; '.join(lost)}.",
        f"What it cost: {'; '.join(cost) or 'nothing was won'}.",
    ]


def full_steps(mine: list[Point]) -> int:
    """Capability passes of a cure that takes one at every step."""
    return max(p.backwards for p in mine if p.backwards is not None and p.cure.family == "PTX")


def write(
    base: dict[str, Any],
    tried: list[dict[str, Any]],
    finished: list[dict[str, Any]],
    plan: Plan,
    out: Path,
    seconds: float,
) -> str:
    """Write everything into ``out`` and say where.

    Args:
        tried: runs on the choosing seeds, which are kept in runs.json and shown nowhere.
        finished: runs on the reported seeds.
    """
    out.mkdir(parents=True, exist_ok=True)
    of = points(finished)
    seeds = {"reported seeds": len({r["seed"] for r in finished}), "choosing seeds": len({r["seed"] for r in tried})}
    made = {**machine(plan.device), "command": _command(), "device": plan.device, "scale": plan.scale, **seeds}
    found = sentences(base, of)
    header = ", ".join(f"{k} {v}" for k, v in made.items())
    everything = {
        "version": VERSION,
        "made": made,
        "settings": dataclasses.asdict(plan.settings),
        "found": found,
        "base": base,
        "runs": finished,
        "chosen_from": [_without_bins(run) for run in tried],
    }
    (out / "runs.json").write_text(_compact(everything))
    text = table(base, of)
    (out / "table.md").write_text(
        f"Mean ± standard deviation over {seeds['reported seeds']} seeds, other than those that chose the settings. First, each "
        f"family's least forgetting at {', '.join(f'{level:.0%}' for level in LEVELS)} of what the best setting learned; then "
        f"every reported setting. Bold: no other is better in both target and loss.\nMade by {header}.\n\n{text}\n\n"
        + "\n".join(f"- {s}" for s in found)
        + "\n"
    )
    figure.draw(base, of, out / "figure.png")
    page.write(base, of, made, found, plan.store.folder / "index.html")
    return f"{text}\n\n" + "\n".join(found) + f"\n\npage: {plan.store.folder / 'index.html'}   ({seconds:.0f} s)"


def write_page(source: Path, path: Path) -> None:
    """The page of runs that were made before: from a ``runs.json``.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write(everything["base"], points(everything["runs"]), everything["made"], everything["found"], path)


def _without_bins(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "measured": {k: v for k, v in run["measured"].items() if k != "bins"}}


def _compact(everything: dict[str, Any]) -> str:
    """JSON with a line for each run, which leaves out what the header says and cures' fields at their defaults."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items() if k != "fingerprint"}
        return [short(v) for v in value] if isinstance(value, list) else value

    def dump(value) -> str:
        return json.dumps(short(value), allow_nan=False, separators=(",", ":"))

    def lines(runs: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(dump({**r, "cure": _turned(r["cure"])}) for r in runs) + "\n]"

    fields = [f"{dump(k)}:{lines(v) if k in ('runs', 'chosen_from') else dump(v)}" for k, v in everything.items()]
    return "{" + ",\n".join(fields) + "}\n"


def _turned(cure: dict[str, Any]) -> dict[str, Any]:
    defaults = NONE._field_defaults
    return {k: v for k, v in cure.items() if k not in defaults or v != defaults[k]}


def _command() -> str:
    arguments = shlex.join(sys.argv[1:])
    return f"make tax{f' ARGS={shlex.quote(arguments)}' if arguments else ''}"
