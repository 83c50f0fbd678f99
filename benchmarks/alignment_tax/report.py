"""Finished runs -> runs.json, table.md, figure.png, a page, and three sentences."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from alignment_tax import figure, page
from alignment_tax.points import METRICS, Point, pareto, points
from alignment_tax.runs import Plan
from alignment_tax.settings import NONE, OBJECTIVES, VERSION
from harness import machine

SAME_ALIGNMENT = 0.02  # right behaviour below the best cure's, down to which a cure counts as aligned
RARE = 1 / 4  # capability backward passes a step up to which a cure counts as cheap


def table(base: dict[str, Any], of: list[Point]) -> str:
    heads = [f"{m.label}, {m.unit}" if m.unit else m.label for m in METRICS.values()]
    heads += ["ms a step", "capability backward passes", "extra MB"]
    blank = f"| --- {'| ---: ' * len(heads)}|"
    parts = []
    for objective, title in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        best = pareto(mine)
        lines = [f"### {title}", "", f"| cure | {' | '.join(heads)} |", blank]
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


def sentences(base: dict[str, Any], of: list[Point]) -> list[str]:
    """What won, what did not, at which cost: computed, whatever the answer is."""
    start = base["measured"]["loss"]
    won, lost, cost = [], [], []
    for objective, title in OBJECTIVES.items():
        mine = [p for p in of if p.objective == objective]
        none = next(p for p in mine if p.cure == NONE)
        tax = none.mean("loss") - start
        if tax <= none.spread("loss"):
            won.append(f"with {title} there was no tax to prevent ({tax:+.3f} nats a byte)")
            continue

        def prevented(p: Point, tax=tax) -> float:
            return 1 - (p.mean("loss") - start) / tax

        cures = [p for p in mine if p is not none]
        enough = max(p.mean("behaviour") for p in mine) - SAME_ALIGNMENT
        aligned = [p for p in cures if p.mean("behaviour") >= enough]
        best = max(aligned, key=prevented, default=None)
        if best is None or prevented(best) <= 0:
            won.append(f"with {title} no cure lowered the tax and aligned as well as the best")
        else:
            won.append(
                f"with {title} {best.cure.name} prevented {prevented(best):.0%} of the forgetting "
                f"({best.mean('behaviour'):.1%} right behaviour, {none.mean('behaviour'):.1%} without a cure)"
            )
        helped = {p.cure.family for p in aligned if none.mean("loss") - p.mean("loss") > none.spread("loss")}
        failed = [f'"{f}"' for f in dict.fromkeys(p.cure.family for p in cures) if f not in helped]
        lost.append(f"with {title} {', '.join(failed) or 'nothing'}")
        trained = [p for p in aligned if p.step_ms is not None and p.backwards is not None]
        steps = max(p.backwards for p in mine if p.backwards is not None) or 1
        cheap = max((p for p in trained if p.backwards <= RARE * steps), key=prevented, default=None)
        for p, role in ((best, "the winner"), (cheap, "the best with few capability passes")):
            if p is None or prevented(p) <= 0 or (p is best and role != "the winner"):
                continue
            price = (
                "no training"
                if p.step_ms is None
                else (
                    f"{p.step_ms / none.step_ms:.1f} x the time of a step, {p.backwards} capability backward passes "
                    f"and {p.extra_bytes / 1e6:.1f} MB"
                )
            )
            cost.append(f"with {title} {role} ({p.cure.name}, {prevented(p):.0%}) took {price}")
    bar = f"lower the tax beyond the seeds' spread within {100 * SAME_ALIGNMENT:.0f} points of the best right behaviour"
    return [
        f"What won: {'; '.join(won)}.",
        f"What did not, at any strength, {bar}: {'; '.join(lost)}.",
        f"What it cost: {'; '.join(cost) or 'nothing was won'}.",
    ]


def write(base: dict[str, Any], finished: list[dict[str, Any]], plan: Plan, out: Path, seconds: float) -> str:
    """Write everything into ``out`` and say where."""
    out.mkdir(parents=True, exist_ok=True)
    of = points(finished)
    made = {**machine(plan.device), "command": _command(), "device": plan.device, "scale": plan.scale}
    found = sentences(base, of)
    header = ", ".join(f"{k} {v}" for k, v in made.items())
    everything = {
        "version": VERSION,
        "made": made,
        "settings": dataclasses.asdict(plan.settings),
        "found": found,
        "base": base,
        "runs": finished,
    }
    (out / "runs.json").write_text(_compact(everything))
    text = table(base, of)
    seeds = len(of[0].values["loss"])
    (out / "table.md").write_text(
        f"Mean ± standard deviation over {seeds} seeds. Bold: no other cure is better in both right behaviour and loss.\n"
        f"Made by {header}.\n\n{text}\n\n" + "\n".join(f"- {s}" for s in found) + "\n"
    )
    figure.draw(base, of, out / "figure.png")
    page.write(base, of, made, found, plan.store.folder / "index.html")
    return f"{text}\n\n" + "\n".join(found) + f"\n\npage: {plan.store.folder / 'index.html'}   ({seconds:.0f} s)"


def write_page(source: Path, path: Path) -> None:
    """The page of runs that were made before: from a ``runs.json``.

    Raises:
        ValueError: there is none, or of another version.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist: make it with `make tax`")
    everything = json.loads(source.read_text())
    if everything.get("version") != VERSION:
        raise ValueError(f"{source} is of version {everything.get('version')}, not {VERSION}: make it again with `make tax`")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write(everything["base"], points(everything["runs"]), everything["made"], everything["found"], path)


def _compact(everything: dict[str, Any]) -> str:
    """JSON with a line for each run."""

    def dump(value) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    fields = [f"{dump(k)}:{dump(v)}" for k, v in everything.items() if k != "runs"]
    runs = ",\n".join(map(dump, everything["runs"]))
    return "{" + ",\n".join([*fields, f'"runs":[\n{runs}\n]']) + "}\n"


def _command() -> str:
    arguments = shlex.join(sys.argv[1:])
    return f"make tax{f' ARGS={shlex.quote(arguments)}' if arguments else ''}"
