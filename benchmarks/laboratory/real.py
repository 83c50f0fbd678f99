"""`make real`: what a real language model forgets while it is taught something narrow, under some of the cures."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laboratory import report, smollm2
from laboratory.cures import BASE, Cure
from laboratory.points import Point, points
from laboratory.report import forgotten
from laboratory.runs import Plan, Run, cores, make_all
from laboratory.smollm2 import LR, OBJECTIVES, SmolLM2
from machine import machine

OUT = Path(__file__).parent.parent / "results" / "real_model"
SEEDS = (11, 12)  # no setting was chosen on them
# Okabe & Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "unprotected": "#222222", "PTX": "#d55e00", "KL": "#e69f00", "NullSpace": "#0072b2", "LoRA": "#999999",
    "LoRA, NullSpace": "#56b4e9",
}  # fmt: skip
# What a strength names, in this order; a word for what is not named by its field.
WORDS = dict.fromkeys(
    ("gamma", "kl", "share", "max_rank", "space", "damping", "fill", "labels", "allocation", "frozen")
)
WORDS |= {"fill": "batches", "frozen": "rest"}
FIXED = {"frozen": True, "fill": 16}  # where nothing else is tried


def cure(family: str, lr: float = LR, steps: float = 1.0, **turned: Any) -> Cure:
    """One whose strength names what is turned."""

    def shown(value: Any) -> str:
        return {True: "hold", False: "train"}[value] if isinstance(value, bool) else str(value)

    words = [f"{word or k} {shown(turned[k])}" for k, word in WORDS.items() if k in turned]
    strength = ", ".join([*words, f"lr {lr:g}"])
    return Cure(family, strength, lr=lr / LR, steps=steps, **{**FIXED, **turned})


SLOW = {"lr": 1e-4, "steps": 1.5}
LORA = {"lora": True, "lr": 1e-3}
CURES = [
    cure("unprotected"),
    cure("unprotected", **SLOW),
    cure("PTX", gamma=1),
    cure("PTX", gamma=1, **SLOW),
    cure("KL", kl=0.3),
    cure("NullSpace", share=0.05),
    cure("NullSpace", share=0.05, damping=0.3),
    cure("NullSpace", share=0.05, damping=0.3, **SLOW),
    cure("LoRA", **LORA),
    cure("LoRA, NullSpace", share=0.05, **LORA),
]
# Around share 0.05 with damping 0.3, one thing changed at a time. Share 0.5 is reached by no layer of rank 8.
MIDDLE = {"share": 0.05, "damping": 0.3}
ABLATIONS = [
    cure("unprotected"),
    cure("NullSpace", **MIDDLE),
    *(cure("NullSpace", share=s, damping=0.3) for s in (0.02, 0.15)),
    cure("NullSpace", share=0.05),
    *(cure("NullSpace", share=0.05, damping=d) for d in (0.15, 0.5)),
    cure("NullSpace", share=0.5, max_rank=8),
    cure("NullSpace", share=0.5, max_rank=8, damping=0.3),
    *(cure("NullSpace", **MIDDLE, fill=b) for b in (1, 4)),
    cure("NullSpace", **MIDDLE, labels="sampled"),
    cure("NullSpace", **MIDDLE, allocation="each"),
    cure("NullSpace", **MIDDLE, space="gradient"),
    cure("NullSpace", **MIDDLE, frozen=False),
    cure("unprotected", frozen=False),
    cure("learning rates alone", **MIDDLE, pinned=False),
]


def tables(finished: list[dict[str, Any]]) -> str:
    return "\n\n".join(_table(finished, task) for task in dict.fromkeys(run["objective"] for run in finished))


def _table(finished: list[dict[str, Any]], task: str) -> str:
    base, of = _of_task(finished, task)
    before = ", ".join(f"{k} {base[k]:.3f}" for k in ("target", "code", "English"))
    texts = _texts(task)
    heads = ["cure", "steps", "target loss", f"{texts[0]} (captured)", f"{texts[1]} (never captured)"]
    heads += ["capability passes", "MB held", "capture, s", "a step, s"]
    rows = []
    for p in of:
        steps = round(p.cure.steps * SmolLM2.steps)
        # What was spent before the first step is a column of its own here.
        seconds = p.step_ms / 1e3 - p.capture_s / steps
        changes = [f"{forgotten(base, p, text):+.3f}" for text in texts]
        cost = [f"{p.backwards:.0f}", f"{p.extra_bytes / 1e6:.0f}", f"{p.capture_s:.0f}", f"{seconds:.2f}"]
        rows.append([p.cure.name, str(steps), f"{p.mean('target'):.3f}", *changes, *cost])
    return (
        f"SmolLM2-135M-Instruct taught {OBJECTIVES[task].title}; mean of {len(of[0].values['target'])} seeds. "
        f"Before: {before} nats a token; what is shown of the texts is the change.\n\n"
        f"{report.markdown(heads, rows)}\n\n{sentence(base, of)}"
    )


def _of_task(finished: list[dict[str, Any]], task: str) -> tuple[dict[str, float], list[Point]]:
    """What was measured of the base model, and the cures in the order in which they were run."""
    mine = [run for run in finished if run["objective"] == task]
    return next(r["measured"] for r in mine if r["cost"] is None), points(mine)


def _texts(task: str) -> tuple[str, str]:
    """The one that is captured, and the other."""
    captured = OBJECTIVES[task].capability
    return captured, "English" if captured == "code" else "code"


def sentence(base: dict[str, float], of: list[Point]) -> str:
    """Of each family, the cure that keeps the captured text best among those that learned the target.

    That is: whose target loss is no worse than the unprotected model's at either learning rate.
    """
    texts = _texts(of[0].objective)
    bar = max(p.mean("target") for p in of if p.cure.family == "unprotected")
    best: dict[str, Point] = {}
    for p in sorted(of, key=lambda p: p.mean(texts[0])):
        if p.mean("target") <= bar:
            best.setdefault(p.cure.family, p)
    named = "; ".join(
        f"{p.cure.name} {forgotten(base, p, texts[0]):+.3f} and {forgotten(base, p, texts[1]):+.3f}"
        for p in best.values()
    )
    return (
        f"The best of each family that learned the target (loss {bar:.3f} or less), {texts[0]} and {texts[1]}: {named}."
    )


def draw(finished: list[dict[str, Any]], path: Path) -> None:
    """A row for each task: target loss against what each text lost."""
    tasks = [*dict.fromkeys(run["objective"] for run in finished)]
    shown: dict[str, Any] = {}
    with report.picture(path, len(tasks), 2, figsize=(10, 4.2 * len(tasks)), dpi=110) as (made, grid):
        for row, task in zip(grid, tasks, strict=True):
            base, of = _of_task(finished, task)
            for axes, text, how in zip(row, _texts(task), ("captured", "never captured"), strict=True):
                for p in of:
                    filled = "full" if p.cure.damping or p.cure.family != "NullSpace" else "none"
                    (shown[p.cure.family],) = axes.plot(
                        p.mean("target"), forgotten(base, p, text), "s" if p.cure.lr < 1 else "o",
                        color=COLOURS[p.cure.family], markersize=11, fillstyle=filled, markeredgewidth=2, linestyle="",
                    )  # fmt: skip
                axes.axhline(0, color="#888888", linestyle="--", linewidth=1.2, zorder=0)
                axes.set_xlabel("loss on what was taught")
                axes.set_ylabel(f"{text}: loss gained")
                axes.set_title(f"Taught {OBJECTIVES[task].title}: {text}, {how}", fontsize=11)
        made.legend(shown.values(), shown, loc="lower center", ncol=len(shown), frameon=False)
        made.text(0.5, 0.045, "squares: learning rate 1e-4; hollow: NullSpace without damping", ha="center", fontsize=9)
        made.tight_layout(rect=(0, 0.07, 1, 1))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES], help="what is taught (default: both)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default %(default)s)")
    parser.add_argument("--ablations", action="store_true", help="one thing changed at a time, of the first task")
    work = Path("build/real_model")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="tables, picture (default benchmarks/results/real_model)")


def main(options: argparse.Namespace, progress: Callable) -> None:
    smollm2.check()
    cures = ABLATIONS if options.ablations else CURES
    tasks = options.tasks[:1] if options.ablations else options.tasks
    runs = [Run(task, BASE, 0) for task in tasks]
    runs += [Run(task, cure, seed) for seed in options.seeds for task in tasks for cure in cures]
    workers = options.workers or cores("cpu")
    finished = make_all(Plan(SmolLM2(), options.work), runs, workers, progress)
    made = {**machine("cpu"), "workers": workers, "seeds": " ".join(map(str, options.seeds))}
    name = "ablations" if options.ablations else "table"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(report.dump({"made": made}, runs=finished))
    text = tables(finished)
    (options.out / f"{name}.md").write_text(f"Made by {report.header(made)}.\n\n{text}\n")
    if not options.ablations:
        draw(finished, options.out / "figure.png")
    print(f"\n{text}\n\nin {options.out}")
