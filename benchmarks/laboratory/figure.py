"""The figure of `make tax`: target against capability, with error bars over the seeds."""

import textwrap
from pathlib import Path
from typing import Any

from laboratory.points import METRICS, Point, pareto
from laboratory.report import picture
from laboratory.small import OBJECTIVES

# A hue for each kind of cure, after Okabe & Ito; a marker for each family of a kind.
STYLES = {
    "none": ("#222222", "X"),
    "rest frozen": ("#777777", "X"),
    "KL penalty": ("#cc79a7", "D"),
    "PTX": ("#d55e00", "s"),
    "PTX, rare": ("#e69f00", "s"),
    "interpolation": ("#8a8a8a", "v"),
    "EWC": ("#a6761d", "p"),
    "orthogonal": ("#66a61e", "P"),
    "conflict": ("#009e73", "o"),
    "NullSpace": ("#0072b2", "o"),
    "NullSpace, gradient space": ("#56b4e9", "o"),
    "NullSpace, damped": ("#0072b2", "^"),
    "NullSpace, damped, gradient space": ("#56b4e9", "^"),
    "damping alone": ("#7b9fd4", "d"),
    "NullSpace and rare PTX": ("#b8860b", "*"),
    "NullSpace and KL": ("#8e44ad", "*"),
    "K-FAC, two-sided": ("#c0392b", "h"),
    "K-FAC, elastic": ("#e57373", "h"),
    "NullSpace, own text": ("#0072b2", "s"),
    "distilled": ("#2ca02c", "D"),
    "distilled, rare": ("#98df8a", "D"),
    "NullSpace and distilled, rare": ("#17becf", "*"),
}
# Nats a byte that are forgotten, up to which the scale is linear: most cures lie there, and some far above.
LINEAR = 0.01


def draw(base: dict[str, Any], points: list[Point], path: Path) -> None:
    """Write a PNG with a panel for each objective."""
    with picture(path, 1, len(OBJECTIVES), figsize=(19, 7), dpi=110, sharey=True, font=11) as (made, axes):
        handles: dict[str, Any] = {}
        for panel, objective in zip(axes[0], OBJECTIVES, strict=True):
            handles |= _panel(panel, base, [p for p in points if p.objective == objective])
        axes[0][0].set_ylabel(f"forgotten of held-out Python, nats a byte\n(log scale beyond {LINEAR}; better below)")
        known = [family for family in STYLES if family in handles]
        made.legend([handles[f] for f in known], known, loc="lower center", ncol=6, frameon=False)
        made.tight_layout(rect=(0, 0.14, 1, 1))


def _panel(panel: Any, base: dict[str, Any], mine: list[Point]) -> dict[str, Any]:
    """One objective; the handles of its families."""
    title, target, *_ = OBJECTIVES[mine[0].objective]
    metric, start = METRICS[target], base["measured"]

    def x(of: list[Point]) -> list[float]:
        return [metric.factor * p.target for p in of]

    def y(of: list[Point]) -> list[float]:
        return [p.mean("loss") - start["loss"] for p in of]

    panel.set_yscale("symlog", linthresh=LINEAR)
    panel.axhline(0.0, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    panel.plot(metric.factor * start[target], 0.0, marker="*", markersize=15, color="black", linestyle="none")
    panel.annotate("base model", (metric.factor * start[target], 0.0), (10, 6), textcoords="offset points")
    front = pareto(mine)
    panel.plot(x(front), y(front), color="#bbbbbb", linewidth=6, zorder=0, alpha=0.5, solid_capstyle="round")
    handles = {}
    for family, (colour, marker) in STYLES.items():
        of = sorted((p for p in mine if p.cure.family == family), key=lambda p: p.target)
        if of:
            handles[family] = panel.errorbar(
                x(of), y(of), xerr=[metric.factor * p.spread(target) for p in of], yerr=[p.spread("loss") for p in of],
                color=colour, marker=marker, markersize=7, linestyle="-" if len(of) > 1 else "none", linewidth=1.2,
                elinewidth=0.6, alpha=0.9, label=family,
            )  # fmt: skip
    panel.set_title("\n".join(textwrap.wrap(f"taught by {title}", 56)), loc="left", fontsize=12)
    panel.set_xlabel(f"{metric.label}, held out, {metric.unit}   (better to the right)")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(color="#eeeeee")
    panel.set_axisbelow(True)
    return handles
