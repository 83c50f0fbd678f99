"""The table and the figure of `make refusals`, from finished runs."""

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
COSTS = ["MB held", "s a step", "s before", "capability passes", "data needed"]


def of_objective(finished: list[dict[str, Any]], objective: str) -> tuple[dict[str, float], list[Point]]:
    """What was measured of the base model, and the settings."""
    mine = [run for run in finished if run["objective"] == objective]
    return next(r["measured"] for r in mine if r["cure"]["family"] == "base model"), points(mine)


def tables(finished: list[dict[str, Any]], steps: int) -> str:
    return "\n\n".join(_table(finished, o, steps) for o in dict.fromkeys(run["objective"] for run in finished))


def _table(finished: list[dict[str, Any]], objective: str, steps: int) -> str:
    base, of = of_objective(finished, objective)
    best = pareto(of)
    count = len(of[0].values["right"])
    texts = {k: label for k, label in LOSSES.items() if k in of[0].values}
    before = [*(m.show(base[k]) for k, m in SHOWN.items()), *(f"{base[k]:.3f}" for k in texts), *[""] * len(COSTS)]
    rows = [["base model", *before]]
    for p in of:
        shares = [_with_spread(m.show(p.mean(k)), m.show(p.spread(k)), count) for k, m in SHOWN.items()]
        losses = [_with_spread(f"{forgotten(base, p, k):+.3f}", f"{p.spread(k):.3f}", count) for k in texts]
        rows.append([f"**{p.cure.name}**" if p in best else p.cure.name, *shares, *losses, *_cost(p, steps)])
    heads = ["setting", *(f"{m.label}, %" for m in SHOWN.values()), *texts.values(), *COSTS]
    return (
        f"SmolLM2-135M-Instruct taught {OBJECTIVES[objective].title}, {steps} steps of 4 sequences; "
        f"{f'mean ± standard deviation of {count} seeds' if count > 1 else 'one seed'}. Of texts: nats a token, of "
        f"settings the change. Bold: no other is better in both right behaviour and the mean of HumanEval and other "
        f"English.\n\n{markdown(heads, rows)}"
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


def draw(finished: list[dict[str, Any]], tried: list[dict[str, Any]], path: Path) -> None:
    """A panel for each objective: right behaviour against forgetting, every setting a dot, the frontier a line.

    Args:
        tried: runs on the choosing seeds, which are shown pale; none of them is on the frontier.
    """
    objectives = [*dict.fromkeys(run["objective"] for run in finished)]
    families = [*dict.fromkeys(p.cure.family for p in points(finished))]
    with picture(path, 1, len(objectives), figsize=(7 * len(objectives), 7), dpi=110) as (made, axes):
        import matplotlib

        colours = dict(zip(families, matplotlib.colormaps["tab20"].colors, strict=False))
        for panel, objective in zip(axes[0], objectives, strict=True):
            base, of = of_objective(finished, objective)
            pale = [p for p in points(tried) if p.objective == objective]
            for alpha, some in ((0.25, pale), (1.0, of)):
                for p in some:
                    panel.plot(
                        100 * p.target, forgotten(base, p), "o", color=colours.get(p.cure.family, "#888888"),
                        alpha=alpha, markersize=9, label=p.cure.family if some is of else None,
                    )  # fmt: skip
            front = pareto(of)
            panel.plot([100 * p.target for p in front], [forgotten(base, p) for p in front], color="#bbbbbb", zorder=0)
            panel.plot(100 * base["right"], 0, "*", color="black", markersize=14)
            panel.annotate("base model", (100 * base["right"], 0), (8, 8), textcoords="offset points")
            panel.set_yscale("symlog", linthresh=0.01)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xlabel("right behaviour, held out, % (better to the right)")
            panel.set_ylabel("forgotten of HumanEval and other English, nats a token (better below)")
            panel.set_title(f"Taught {OBJECTIVES[objective].title}", fontsize=11)
        shown = {
            label: line for panel in axes[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        columns = 2 * len(objectives)
        made.legend(shown.values(), shown, loc="lower center", ncol=columns, frameon=False, fontsize=8)
        made.tight_layout(rect=(0, 0.03 + 0.025 * -(-len(shown) // columns), 1, 1))
