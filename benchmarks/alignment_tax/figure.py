"""The Pareto figure: right behaviour against capability, both objectives, error bars over the seeds."""

from pathlib import Path
from typing import Any

from alignment_tax.points import Point, pareto
from alignment_tax.settings import NONE, OBJECTIVES

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


def draw(base: dict[str, Any], points: list[Point], path: Path) -> None:
    """Write a PNG with a panel for each objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    made, axes = plt.subplots(1, len(OBJECTIVES), figsize=(13, 6), dpi=130, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    # A cure that made things many times worse would press all others into one line: it is drawn at the edge, with its loss.
    none = max(p.mean("loss") for p in points if p.cure == NONE)
    tax = max(none - base["measured"]["loss"], 0.01)
    bottom, top = base["measured"]["loss"] - 0.2 * tax, none + 2 * tax
    for panel, (objective, title) in zip(axes[0], OBJECTIVES.items(), strict=True):
        mine = [p for p in points if p.objective == objective]
        start = base["measured"]
        panel.axhline(start["loss"], color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
        at = (100 * start["behaviour"], start["loss"])
        panel.plot(*at, marker="*", markersize=15, color="black", linestyle="none")
        panel.annotate("base model", at, (0, 10), textcoords="offset points", ha="center")
        front = [p for p in pareto(mine) if p.mean("loss") <= top]
        panel.plot(
            [100 * p.mean("behaviour") for p in front],
            [p.mean("loss") for p in front],
            color="#bbbbbb",
            linewidth=5,
            zorder=0,
            alpha=0.5,
            solid_capstyle="round",
        )
        beyond: list[str] = []
        for family, (colour, marker) in STYLES.items():
            of = [p for p in mine if p.cure.family == family]
            for p in of:
                if p.mean("loss") > top:
                    panel.plot(100 * p.mean("behaviour"), top, marker=marker, markersize=7, color=colour, clip_on=False)
                    beyond.append(f"{p.cure.name}: {p.mean('loss'):.2f}")
            of = [p for p in of if p.mean("loss") <= top]
            if not of:
                continue
            handles[family] = panel.errorbar(
                [100 * p.mean("behaviour") for p in of],
                [p.mean("loss") for p in of],
                xerr=[100 * p.spread("behaviour") for p in of],
                yerr=[p.spread("loss") for p in of],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="-" if len(of) > 1 else "none",
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=family,
            )
        if beyond:
            lines = "\n".join(["beyond the scale:", *beyond])
            panel.text(0.03, 0.96, lines, transform=panel.transAxes, va="top", fontsize=10, color="#555555")
        panel.set_ylim(bottom, top)
        panel.set_title(f"aligned by {title}", loc="left", fontsize=12.5)
        panel.set_xlabel("right behaviour on held-out requests, %   (better to the right)")
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
    axes[0][0].set_ylabel("loss on held-out Python, nats a byte   (better below)")
    made.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, frameon=False)
    made.tight_layout(rect=(0, 0.1, 1, 1))
    made.savefig(path)
    plt.close(made)
