"""Finished runs as tables in markdown, a sentence for each, and a picture."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from real_model.settings import TASKS, Cure

# Okabe & Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "unprotected": "#222222", "PTX": "#d55e00", "KL": "#e69f00", "NullSpace": "#0072b2", "LoRA": "#999999",
    "LoRA, NullSpace": "#56b4e9",
}  # fmt: skip


class Point(NamedTuple):
    """A cure of one task, over its seeds: loss on the target, and how much loss each text gained."""

    cure: Cure
    target: float
    gained: dict[str, float]
    costs: dict[str, float]


def points(finished: list[dict[str, Any]], task: str) -> tuple[dict[str, float], list[Point]]:
    """What the base model measures, and the cures in the order in which they were run."""
    mine = [run for run in finished if run["objective"] == task]
    base = next(run["measured"] for run in mine if run["cost"] is None)
    groups: dict[Cure, list[dict[str, Any]]] = {}
    for run in mine:
        if run["cost"] is not None:
            groups.setdefault(Cure(**run["cure"]), []).append(run)

    def mean(runs, kind, key):
        return statistics.mean(run[kind][key] for run in runs)

    return base, [
        Point(
            cure,
            mean(runs, "measured", "target"),
            {kind: mean(runs, "measured", kind) - base[kind] for kind in ("code", "English")},
            {key: mean(runs, "cost", key) for key in ("step_s", "capture_s", "passes", "held_bytes")},
        )
        for cure, runs in groups.items()
    ]


def tables(finished: list[dict[str, Any]]) -> str:
    parts = []
    for task in dict.fromkeys(run["objective"] for run in finished):
        base, of = points(finished, task)
        seeds = len({run["seed"] for run in finished if run["objective"] == task and run["cost"]})
        captured = TASKS[task].capability
        heads = f"cure | steps | target loss | {captured} (captured) | {_other(captured)} (never captured) | capability passes | MB held | capture, s | a step, s"
        lines = [
            (
                f"SmolLM2-135M-Instruct taught {TASKS[task].title}; mean of {seeds} seeds. Before: target {base['target']:.3f}, code "
                f"{base['code']:.3f}, English {base['English']:.3f} nats a token; what is shown of the texts is the change.\n"
            ),
            f"| {heads} |",
            f"| --- {'| ---: ' * 8}|",
        ]
        for p in of:
            c = p.costs
            lines.append(
                f"| {p.cure.name} | {p.cure.steps} | {p.target:.3f} | {p.gained[captured]:+.3f} | "
                f"{p.gained[_other(captured)]:+.3f} | {c['passes']:.0f} | {c['held_bytes'] / 1e6:.0f} | "
                f"{c['capture_s']:.0f} | {c['step_s']:.2f} |"
            )
        parts.append("\n".join([*lines, "", sentence(captured, of)]))
    return "\n\n".join(parts)


def sentence(captured: str, of: list[Point]) -> str:
    """Of each family, the cure that keeps the captured text best among those whose target loss is no worse than the unprotected
    model's at either learning rate."""
    bar = max(p.target for p in of if p.cure.family == "unprotected")
    best: dict[str, Point] = {}
    for p in sorted(of, key=lambda p: p.gained[captured]):
        if p.target <= bar:
            best.setdefault(p.cure.family, p)
    named = "; ".join(
        f"{p.cure.name} {p.gained[captured]:+.3f} and {p.gained[_other(captured)]:+.3f}" for p in best.values()
    )
    return f"The best of each family that learned the target (loss {bar:.3f} or less), {captured} and {_other(captured)}: {named}."


def _other(captured: str) -> str:
    return "English" if captured == "code" else "code"


def draw(finished: list[dict[str, Any]], path: Path) -> None:
    """A row for each task: target loss against what each text lost. Large dots: learning rate 1e-4 or LoRA's; small: 3e-4."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [*dict.fromkeys(run["objective"] for run in finished)]
    made, grid = plt.subplots(len(tasks), 2, figsize=(10, 4.2 * len(tasks)), dpi=110, squeeze=False)
    shown: dict[str, Any] = {}
    for row, task in zip(grid, tasks, strict=True):
        captured = TASKS[task].capability
        for axes, kind in zip(row, (captured, _other(captured)), strict=True):
            for p in points(finished, task)[1]:
                filled = "full" if p.cure.damping or p.cure.family != "NullSpace" else "none"
                marker = "s" if p.cure.lr < 3e-4 else "o"
                (shown[p.cure.family],) = axes.plot(
                    p.target, p.gained[kind], marker, color=COLOURS[p.cure.family], markersize=11, fillstyle=filled,
                    markeredgewidth=2, linestyle="",
                )  # fmt: skip
            axes.axhline(0, color="#888888", linestyle="--", linewidth=1.2, zorder=0)
            axes.set_xlabel("loss on what was taught")
            axes.set_ylabel(f"{kind}: loss gained")
            axes.set_title(
                f"Taught {TASKS[task].title}: {kind}, {'captured' if kind == captured else 'never captured'}",
                fontsize=11,
            )
            axes.spines[["top", "right"]].set_visible(False)
    made.legend(shown.values(), shown, loc="lower center", ncol=len(shown), frameon=False)
    made.text(0.5, 0.045, "squares: learning rate 1e-4; hollow: NullSpace without damping", ha="center", fontsize=9)
    made.tight_layout(rect=(0, 0.07, 1, 1))
    made.savefig(path)
    plt.close(made)
