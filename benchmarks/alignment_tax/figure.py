"""The Pareto figure: what is not right yet against what was forgotten, both objectives, error bars over the seeds.

Both axes are logarithmic, since cures differ by factors: from a hundredth of a nat forgotten to two.
"""

from pathlib import Path
from typing import Any

from alignment_tax.points import Point, pareto
from alignment_tax.settings import OBJECTIVES

# Okabe & Ito's colours, which the colour-blind tell apart; a marker each for those who see none.
STYLES = {
    "none": ("#222222", "X"),
    "KL penalty": ("#cc79a7", "D"),
    "PTX": ("#d55e00", "s"),
    "PTX, rare": ("#e69f00", "s"),
    "interpolation": ("#8a8a8a", "v"),
    "orthogonal": ("#009e73", "P"),
    "conflict": ("#0072b2", "o"),
    "conflict, rare": ("#56b4e9", "o"),
    "conflict, update space": ("#6a3d9a", "^"),
}

SMALLEST = 0.003  # nats a byte: what lies lower is drawn here


def _clipped(at: list[float], spread: list[float]) -> list[list[float]]:
    """Error bars below and above, those below ending before the end of a logarithmic axis."""
    return [[min(s, 0.95 * a) for a, s in zip(at, spread, strict=True)], spread]


def draw(base: dict[str, Any], points: list[Point], path: Path) -> None:
    """Write a PNG with a panel for each objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    made, axes = plt.subplots(1, len(OBJECTIVES), figsize=(13, 6), dpi=130, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    start = base["measured"]

    def wrong(p: Point) -> float:
        return max(100 * (1 - p.mean("behaviour")), 0.1)

    def forgotten(p: Point) -> float:
        return max(p.mean("loss") - start["loss"], SMALLEST)

    for panel, (objective, title) in zip(axes[0], OBJECTIVES.items(), strict=True):
        mine = [p for p in points if p.objective == objective]
        before = 100 * (1 - start["behaviour"])
        panel.axvline(before, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
        panel.annotate(
            "base model",
            (before, 1),
            (4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color="#777777",
            fontsize=10,
        )
        front = pareto(mine)
        panel.plot(
            [wrong(p) for p in front],
            [forgotten(p) for p in front],
            color="#bbbbbb",
            linewidth=5,
            zorder=0,
            alpha=0.5,
            solid_capstyle="round",
        )
        for family, (colour, marker) in STYLES.items():
            of = [p for p in mine if p.cure.family == family]
            if not of:
                continue
            handles[family] = panel.errorbar(
                [wrong(p) for p in of],
                [forgotten(p) for p in of],
                xerr=_clipped([wrong(p) for p in of], [100 * p.spread("behaviour") for p in of]),
                yerr=_clipped([forgotten(p) for p in of], [p.spread("loss") for p in of]),
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="-" if len(of) > 1 else "none",
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=family,
            )
        panel.set_title(f"aligned by {title}", loc="left", fontsize=12.5)
        panel.set(xscale="log", yscale="log", xlim=(0.8, 100), ylim=(SMALLEST, 5))
        panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panel.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3], ["0.01", "0.03", "0.1", "0.3", "1", "3"])
        panel.minorticks_off()
        panel.set_xlabel("wrong behaviour on held-out requests, %   (better to the left)")
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
    axes[0][0].set_ylabel("forgotten Python, nats a byte   (better below)")
    made.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, frameon=False)
    made.tight_layout(rect=(0, 0.1, 1, 1))
    made.savefig(path)
    plt.close(made)
