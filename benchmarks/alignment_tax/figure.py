"""The figure: target against capability for each objective, the reported settings of every family, error bars over the seeds."""

import textwrap
from pathlib import Path
from typing import Any

from alignment_tax.cures import NONE
from alignment_tax.points import METRICS, Point, pareto
from alignment_tax.settings import OBJECTIVES

# A hue for each kind of cure, told apart by the colour-blind too (after Okabe & Ito); a marker for each family of a kind.
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
}


def draw(base: dict[str, Any], points: list[Point], path: Path) -> None:
    """Write a PNG with a panel for each objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    made, axes = plt.subplots(1, len(OBJECTIVES), figsize=(19, 7), dpi=110, squeeze=False)
    handles: dict[str, Any] = {}
    for panel, objective in zip(axes[0], OBJECTIVES, strict=True):
        handles |= _panel(panel, base, [p for p in points if p.objective == objective])
    axes[0][0].set_ylabel("loss on held-out Python, nats a byte   (better below)")
    known = [family for family in STYLES if family in handles]
    made.legend([handles[f] for f in known], known, loc="lower center", ncol=6, frameon=False)
    made.tight_layout(rect=(0, 0.14, 1, 1))
    made.savefig(path)
    plt.close(made)


def _panel(panel: Any, base: dict[str, Any], mine: list[Point]) -> dict[str, Any]:
    """One objective; the handles of its families."""
    title, target, _ = OBJECTIVES[mine[0].objective]
    metric, start = METRICS[target], base["measured"]
    # A cure that made things many times worse would press all others into one line: it is drawn at the edge, with its loss.
    none = max(p.mean("loss") for p in mine if p.cure.family == NONE.family)
    tax = max(none - start["loss"], 0.01)
    bottom, top = min([start["loss"], *(p.mean("loss") for p in mine)]) - 0.1 * tax, none + 0.3 * tax
    panel.axhline(start["loss"], color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    at = (metric.factor * start[target], start["loss"])
    panel.plot(*at, marker="*", markersize=15, color="black", linestyle="none")
    panel.annotate("base model", at, (0, 10), textcoords="offset points", ha="left")
    front = [p for p in pareto(mine) if p.mean("loss") <= top]
    panel.plot(
        [metric.factor * p.target for p in front],
        [p.mean("loss") for p in front],
        color="#bbbbbb",
        linewidth=5,
        zorder=0,
        alpha=0.5,
        solid_capstyle="round",
    )
    beyond: list[str] = []
    handles = {}
    for family, (colour, marker) in STYLES.items():
        of = sorted((p for p in mine if p.cure.family == family), key=lambda p: p.target)
        for p in of:
            if p.mean("loss") > top:
                panel.plot(metric.factor * p.target, top, marker=marker, markersize=7, color=colour, clip_on=False)
                beyond.append(f"{p.cure.name}: {p.mean('loss'):.2f}")
        of = [p for p in of if p.mean("loss") <= top]
        if of:
            handles[family] = panel.errorbar(
                [metric.factor * p.target for p in of],
                [p.mean("loss") for p in of],
                xerr=[metric.factor * p.spread(target) for p in of],
                yerr=[p.spread("loss") for p in of],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="-" if len(of) > 1 else "none",
                linewidth=1.2,
                elinewidth=0.6,
                alpha=0.9,
                label=family,
            )
    if beyond:
        lines = "\n".join(["beyond the scale:", *beyond])
        panel.text(0.03, 0.96, lines, transform=panel.transAxes, va="top", fontsize=10, color="#555555")
    panel.set_ylim(bottom, top)
    panel.set_title("\n".join(textwrap.wrap(f"taught by {title}", 52)), loc="left", fontsize=12)
    panel.set_xlabel(f"{metric.label}, held out, {metric.unit}   (better to the right)")
    panel.grid(color="#eeeeee")
    panel.set_axisbelow(True)
    return handles
