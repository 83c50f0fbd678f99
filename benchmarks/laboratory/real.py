"""`make real`: what a real language model forgets while it is taught something narrow, under some of the cures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laboratory import report, smollm2
from laboratory.cures import BASE, Cure
from laboratory.points import Point, points
from laboratory.report import forgotten
from laboratory.runs import Plan, Run, cores, make_all
from laboratory.smollm2 import LR, OBJECTIVES, SmolLM2
from laboratory.smollm2_own import FEW, OWN, rows_of
from machine import machine

OUT = Path(__file__).parent.parent / "results" / "real_model"
SEEDS = (11, 12)  # no setting was chosen on them
CHOOSING = (10,)  # what to write for a capture, and how much of it, was chosen on this one
# Okabe & Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "unprotected": "#222222", "PTX": "#d55e00", "KL": "#e69f00", "NullSpace": "#0072b2", "LoRA": "#999999",
    "LoRA, NullSpace": "#56b4e9", "distilled": "#009e73", "NullSpace, distilled": "#cc79a7",
}  # fmt: skip
# What a strength names, in this order and in these words.
WORDS = {
    "gamma": "gamma", "kl": "kl", "distil": "weight", "every": "every", "text": "text", "share": "share",
    "max_rank": "max_rank", "space": "space", "damping": "damping", "fill": "batches", "labels": "labels",
    "allocation": "allocation", "frozen": "rest", "kfac": "damping",
}  # fmt: skip
FIXED = {"frozen": True, "fill": 16}  # where nothing else is tried


def cure(family: str, lr: float = LR, steps: float = 1.0, **turned: Any) -> Cure:
    """One whose strength names what is turned."""

    def shown(value: Any) -> str:
        return {True: "hold", False: "train"}[value] if isinstance(value, bool) else str(value)

    words = [f"{word} {shown(turned[k])}" for k, word in WORDS.items() if k in turned]
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


def own(family: str, text: str = "own", **turned: Any) -> Cure:
    """One on what the model writes, all of which a capture sees."""
    return cure(family, text=text, **turned)._replace(fill=rows_of(text) // SmolLM2.capability_batch)


UNDER_LORA = (FEW, f"{FEW} from the user's turn", f"{FEW}, dialogues")
TRIED = [
    cure("unprotected"),
    *(own("NullSpace", text, **MIDDLE) for text in OWN),
    cure("LoRA", **LORA),
    *(own("LoRA, NullSpace", text, share=0.05, **LORA) for text in UNDER_LORA),
    *(own("distilled", distil=weight, every=every) for every in (1, 4) for weight in (1, 3, 10)),
    *(own("NullSpace, distilled", distil=3, every=every, **MIDDLE) for every in (1, 4)),
]
NO_DATA = [
    cure("unprotected"),
    cure("PTX", gamma=1),
    cure("NullSpace", **MIDDLE),
    cure("elastic", kfac=0.01, elastic=True),
    own("NullSpace", **MIDDLE),
    own("NullSpace", f"{FEW}, dialogues", **MIDDLE),
    own("distilled", distil=3, every=1),
    own("NullSpace, distilled", distil=3, every=4, **MIDDLE),
    own("LoRA, NullSpace", share=0.05, **LORA),
]
SETS = {  # cures, how many of the tasks, seeds
    "table": (CURES, 2, SEEDS),
    "ablations": (ABLATIONS, 1, SEEDS),
    "tried": (TRIED, 2, CHOOSING),
    "no_data": (NO_DATA, 2, SEEDS),
}


def is_for(cure: Cure, task: str) -> bool:
    """Data that are mixed into the model's own text are of the task's capability."""
    data = OWN.get(cure.text or "", {}).get("data")
    return data in (None, OBJECTIVES[task].capability)


def tables(finished: list[dict[str, Any]]) -> str:
    return "\n\n".join(_table(finished, task) for task in dict.fromkeys(run["objective"] for run in finished))


def _table(finished: list[dict[str, Any]], task: str) -> str:
    base, of = _of_task(finished, task)
    before = ", ".join(f"{k} {v:.3f}" for k, v in base.items())
    texts = _texts(task)
    marks = ("", "") if any(p.cure.text for p in of) else (" (captured)", " (never captured)")
    heads = ["cure", "steps", "target loss", *map("".join, zip(texts, marks, strict=True))]
    if "answers" in base:
        texts, heads = (*texts, "answers"), [*heads, "its own answers"]
    heads += ["capability passes", "MB held", "capture, s", "a step, s"]
    rows = []
    counts = {len(p.values["target"]) for p in of}
    for p in of:
        steps = round(p.cure.steps * SmolLM2.steps)
        # What was spent before the first step is a column of its own here.
        seconds = p.step_ms / 1e3 - p.capture_s / steps
        changes = [f"{forgotten(base, p, text):+.3f}" if text in p.values else "" for text in texts]
        cost = [f"{p.backwards:.0f}", f"{p.extra_bytes / 1e6:.0f}", f"{p.capture_s:.0f}", f"{seconds:.2f}"]
        name = p.cure.name if len(counts) == 1 else f"{p.cure.name} ({len(p.values['target'])})"
        rows.append([name, str(steps), f"{p.mean('target'):.3f}", *changes, *cost])
    several = f"mean of {max(counts)} seeds" if max(counts) > 1 else "one seed"
    seeds = several if len(counts) == 1 else "mean of as many seeds as a row says"
    return (
        f"SmolLM2-135M-Instruct taught {OBJECTIVES[task].title}; {seeds}. "
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
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: the set's)")
    what = "table: the main one; ablations: one thing changed at a time; tried, no_data: what the model writes itself"
    parser.add_argument("--set", choices=SETS, default="table", help=f"of cures; {what}")
    work = Path("build/real_model")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="tables, picture (default benchmarks/results/real_model)")


def main(options: argparse.Namespace, progress: Callable) -> None:
    smollm2.check()
    cures, most, seeds = SETS[options.set]
    tasks, seeds = options.tasks[:most], options.seeds or seeds
    runs = [Run(task, BASE, 0) for task in tasks]
    runs += [Run(task, cure, seed) for seed in seeds for task in tasks for cure in cures if is_for(cure, task)]
    workers = options.workers or cores("cpu")
    finished = make_all(Plan(SmolLM2(), options.work), runs, workers, progress)
    made = {**machine("cpu"), "workers": workers, "seeds": " ".join(map(str, seeds))}
    options.out.mkdir(parents=True, exist_ok=True)
    dumped = report.dump({"made": made}, runs=finished)
    (options.out / f"{options.set}.json").write_text(dumped)
    text = tables(json.loads(dumped)["runs"])  # whose figures are rounded
    (options.out / f"{options.set}.md").write_text(f"Made by {report.header(made)}.\n\n{text}\n")
    if options.set == "table":
        draw(finished, options.out / "figure.png")
    print(f"\n{text}\n\nin {options.out}")
