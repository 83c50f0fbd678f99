"""The table and the figures of `make refusals`, from finished runs."""

from pathlib import Path
from typing import Any

from laboratory.points import OBJECTIVES, Metric, Point, pareto, points
from laboratory.refusals_cures import needs
from laboratory.report import forgotten, markdown, picture

SHARES = {
    "right": "right", "harmful": "harmful refused", "harmbench": "HarmBench refused", "harmless": "harmless refused",
    "untrained": "untrained kind refused", "unchanged": "own answers unchanged",
}  # fmt: skip
SHOWN = {name: Metric(label, "%", 100, 0, "") for name, label in SHARES.items()}
# Of the kind that is captured or replayed: marked, for that favours what captures or replays it.
SEEN = ("code", "English")
LOSSES = {
    "human_eval": "HumanEval", "other_english": "other English", "code": "code, in distribution",
    "English": "English, in distribution",
}  # fmt: skip
PINNED, OTHERS = "#0072b2", "#d55e00"  # colours of cures with a null space and without, after Okabe & Ito
COSTS = ["MB held", "s a step", "s before", "capability passes", "data needed"]


def of_objective(finished: list[dict[str, Any]], objective: str) -> tuple[dict[str, float], list[Point]]:
    """What was measured of the base model, and the settings."""
    mine = [run for run in finished if run["objective"] == objective]
    return next(r["measured"] for r in mine if r["cure"]["family"] == "base model"), points(mine)


def tables(finished: list[dict[str, Any]], steps: int) -> str:
    return "\n\n".join(_table(finished, o, steps) for o in dict.fromkeys(run["objective"] for run in finished))


def _table(finished: list[dict[str, Any]], objective: str, steps: int) -> str:
    base, of = of_objective(finished, objective)
    best, most = pareto(of), max(len(p.values["right"]) for p in of)
    texts = {k: label for k, label in LOSSES.items() if k in of[0].values}
    before = [*(m.show(base[k]) for k, m in SHOWN.items()), *(f"{base[k]:.3f}" for k in texts), *[""] * len(COSTS)]
    rows = [["base model", *before]]
    for p in of:
        count = len(p.values["right"])
        shares = [_with_spread(m.show(p.mean(k)), m.show(p.spread(k)), count) for k, m in SHOWN.items()]
        losses = [_with_spread(f"{forgotten(base, p, k):+.3f}", f"{p.spread(k):.3f}", count) for k in texts]
        rows.append([f"**{p.cure.name}**" if p in best else p.cure.name, *shares, *losses, *_cost(p, steps)])
    heads = ["setting", *(f"{m.label}, %" for m in SHOWN.values()), *texts.values(), *COSTS]
    return (
        f"SmolLM2-135M-Instruct taught {OBJECTIVES[objective].title}, {steps} steps of 4 sequences; "
        f"{f'one seed, or, with ±, mean and standard deviation of {most}' if most > 1 else 'one seed'}. Of texts: nats "
        "a token, of settings the change. Bold: no other is better in both right behaviour and the mean of HumanEval "
        f"and other English.\n\n{markdown(heads, rows)}"
    )


def _with_spread(value: str, spread: str, count: int) -> str:
    return f"{value} ± {spread}" if count > 1 else value


def _cost(p: Point, steps: int) -> list[str]:
    if p.step_ms is None:
        return ["0", "none", "none", "0", needs(p.cure)]
    # What was spent before the first step is a column of its own here.
    seconds = p.step_ms / 1e3 - p.capture_s / (steps * p.cure.steps)
    return [
        f"{p.extra_bytes / 1e6:.0f}",
        f"{seconds:.2f}",
        f"{p.capture_s:.0f}",
        f"{p.backwards:.0f}",
        needs(p.cure),
    ]


def draw(finished: list[dict[str, Any]], tried: list[dict[str, Any]], objective: str, path: Path) -> None:
    """Right behaviour against forgetting, every setting a dot, the frontier a line.

    Args:
        tried: runs on the choosing seeds, which are shown pale and without a number; none of them is on the frontier.
    """
    base, of = of_objective(finished, objective)
    with picture(path, 1, 1, figsize=(9, 6.5), dpi=110, bbox="tight") as (_, axes):
        panel = axes[0, 0]

        def dot(p: Point, **style) -> tuple[float, float]:
            at = 100 * p.target, forgotten(base, p)
            panel.plot(*at, "o", color=PINNED if p.cure.share else OTHERS, markeredgecolor="white", **style)
            return at

        for p in points(tried):
            if p.objective == objective:
                dot(p, alpha=0.2, markersize=8)
        places = [dot(p, markersize=13) for p in of]
        for number, at in enumerate(places, 1):
            panel.annotate(str(number), at, color="white", fontsize=7, ha="center", va="center")
        front = sorted(places[of.index(p)] for p in pareto(of))
        panel.plot(*zip(*front, strict=True), color="#bbbbbb", zorder=0)
        panel.plot(100 * base["right"], 0, "*", color="black", markersize=14)
        panel.annotate("base model", (100 * base["right"], 0), (10, 6), textcoords="offset points")
        panel.set_yscale("symlog", linthresh=0.01, linscale=0.4)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("right behaviour, held out, % (better to the right)")
        panel.set_ylabel("forgotten of HumanEval and other English, nats a token (better below)")
        panel.set_title(f"SmolLM2 taught {OBJECTIVES[objective].title}", fontsize=11)
        names = [f"{number}  {p.cure.name}" for number, p in enumerate(of, 1)]
        pale = ["pale: settings that were tried, with", "fewer steps, on another seed"] if tried else []
        notes = "\n".join([*names, "", "blue: with a null space", "grey line: none is better in both", *pale])
        panel.text(1.02, 1.0, notes, fontsize=9, va="top", linespacing=1.5, transform=panel.transAxes)
