"""`make demo`: what a small language model forgets while it is taught to refuse, unprotected and protected.

The shipped model knows Python, exercises and a dialogue that mostly helps. Supervised fine-tuning teaches it to refuse
harmful requests, unprotected and under four cures. Writes a picture, a table and every run's figures.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradproj
import gradproj.nullspace
from laboratory import report, small
from laboratory.cures import BASE, Cure
from laboratory.points import METRICS, Point, points
from laboratory.report import forgotten
from laboratory.runs import Plan, Run, cores, make_all
from laboratory.tiny_lm import load_base
from laboratory.train import Capability
from machine import machine

SETTINGS = small.SCALES["cpu"]
FIRST_SEED = 101  # settings were chosen on other seeds
CURES = {  # and their colours: Okabe & Ito's, which the colour-blind tell apart
    Cure("unprotected"): "#222222",
    Cure("PTX every step", "gamma 0.3", gamma=0.3): "#d55e00",
    Cure("PTX every 8th step", "gamma 1.0", gamma=1.0, every=8): "#cc79a7",
    Cure("Directions", "32 fresh every step, conflict", method="conflict", directions=32, fill=16): "#009e73",
    Cure("NullSpace", "share 0.08, captured once", share=0.08, fill=16): "#0072b2",
}


def table(start: dict[str, Any], of: list[Point]) -> str:
    shown = {m: METRICS[m] for m in ("behaviour", "task_accuracy", "loss")}
    heads = ["cure", "right behaviour, %", "exercises solved, %", "code loss, nats a byte", "forgotten"]
    heads += ["capability passes", "MB held", "ms a step"]
    rows = [["before: the base model", *(m.show(start[k]) for k, m in shown.items()), *[""] * 4]]
    for p in of:
        taught = [f"{m.show(p.mean(k))} ± {m.show(p.spread(k))}" for k, m in shown.items()]
        cost = [str(p.backwards), f"{(p.extra_bytes or 0) / 1e6:.2f}", f"{p.step_ms:.0f}"]
        rows.append([p.cure.name, *taught, f"{forgotten(start, p):+.3f}", *cost])
    return report.markdown(heads, rows)


def against(tax: float, loss: float) -> str:
    """What is forgotten under a cure, against the unprotected model's, in words."""
    return f"{1 - loss / tax:.0%} less" if loss <= tax else f"{loss / tax - 1:.0%} more"


def finding(start: dict[str, Any], of: list[Point]) -> str:
    """One sentence, from the numbers."""
    none, *cures = of
    tax = forgotten(start, none)
    if tax <= none.spread("loss"):
        change = f"Unprotected, the code loss changed by {tax:+.3f} nats a byte"
        return f"{change}, no more than the seeds differ: no tax to prevent."
    effects = [
        f"{p.cure.family} {against(tax, forgotten(start, p))} "
        f"({p.mean('behaviour'):.1%} right, {p.backwards} capability passes)"
        for p in sorted(cures, key=lambda p: p.mean("loss"))
    ]
    return (
        f"Learning to refuse ({none.mean('behaviour'):.1%} right) cost the unprotected model {tax:.3f} nats a byte "
        f"of Python; against that, cures forgot: {', '.join(effects)}."
    )


def draw(start: dict[str, Any], of: list[Point], path: Path) -> None:
    """What was taught against what was kept: a line from the base model to each cure; small dots are its seeds."""
    with report.picture(path, 1, 1, bbox="tight", figsize=(9, 5.8), dpi=120) as (_, ((axes,),)):
        x0, y0 = 100 * start["behaviour"], start["loss"]
        axes.axhline(y0, color="#888888", linewidth=1.5, linestyle="--", zorder=0)
        tax = forgotten(start, of[0])
        for p in of:
            x, y, colour = 100 * p.mean("behaviour"), p.mean("loss"), CURES[p.cure]
            axes.plot([x0, x], [y0, y], color=colour, linewidth=2, alpha=0.6)
            axes.plot(
                [100 * b for b in p.values["behaviour"]], p.values["loss"], "o", color=colour, markersize=4.5, alpha=0.5
            )
            axes.plot(x, y, "o", color=colour, markersize=15, markeredgecolor="white")
        axes.plot(x0, y0, "*", color="black", markersize=20)
        axes.annotate("base model", (x0, y0), (-8, 16), textcoords="offset points", ha="center", fontsize=12)
        axes.annotate(
            "nothing forgotten", (80, y0), (0, -6), textcoords="offset points", ha="center", va="top", fontsize=12
        )
        low, high = axes.get_ylim()
        at = low - (high - low)
        for p in sorted(of, key=lambda p: p.mean("loss")):  # from below; labels are moved apart where they would touch
            at = max(p.mean("loss"), at + 0.1 * (high - low))
            effect = f"forgets {forgotten(start, p):.3f}"
            if p is not of[0] and tax > 0:
                effect += f", {against(tax, forgotten(start, p))}; {p.backwards} capability passes"
            for text, style in (
                (p.cure.family, {"fontsize": 13, "weight": "bold", "color": CURES[p.cure], "va": "bottom"}),
                (effect, {"fontsize": 10, "color": "#555555", "va": "top"}),
            ):
                axes.text(1.02, at, text, transform=axes.get_yaxis_transform(), **style)
        axes.set_ylim(low - 0.04 * (high - low), high)
        axes.set_xlim(x0 - 6, 100)
        axes.set_xlabel("what was taught: right behaviour on held-out requests, %", fontsize=12)
        axes.set_ylabel("what was forgotten: loss on held-out Python", fontsize=12)
        axes.set_title(
            "A model that knows Python is taught to refuse: what does it forget?", loc="left", fontsize=14, pad=14
        )


def draw_null_space(model: small.Small, path: Path) -> None:
    """Which of the model's matrices got which rank, and what curvature is left in them."""
    pupil, task = copy.deepcopy(model.base()), model.objectives["sft"]
    capability = Capability(model, pupil, task.capability, FIRST_SEED)
    protection = gradproj.NullSpace(pupil, share=next(cure.share for cure in CURES if cure.share))
    with protection.capture():
        capability.backward(16)
    gradproj.nullspace.show(protection).savefig(path, dpi=120)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="runs per cure (default 3)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="steps of each (default %(default)s)")
    parser.add_argument("--base", type=Path, default=small.SHIPPED, help="base model (default: the shipped one)")
    retrain = f"train the base model first, and write it to --base (default {SETTINGS.base_steps} steps, minutes)"
    parser.add_argument("--retrain", type=int, nargs="?", const=SETTINGS.base_steps, metavar="STEPS", help=retrain)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where picture and table go (default demo)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")


def main(options: argparse.Namespace, progress: Callable) -> None:
    report.check()
    begin = time.perf_counter()
    if options.retrain is not None:
        settings = dataclasses.replace(SETTINGS, base_steps=options.retrain)
        small.retrain(options.base, settings, options.device, progress)
        progress("")
    facts = load_base(options.base)[1]
    known = ", ".join(f"{name} {value:.3f}" for name, value in facts["held_out"].items())
    print(f"base model: {options.base.name}, {facts['steps']} steps, held-out nats per byte: {known}")
    runs = [Run("sft", cure, FIRST_SEED + i) for cure in CURES for i in range(options.seeds)]
    workers = options.workers or cores(options.device)
    settings = dataclasses.replace(SETTINGS, steps=options.steps)
    plan = Plan(small.Small(settings, options.base, options.device), options.out / "unfinished")
    finished = make_all(plan, [Run("sft", BASE, 0), *runs], workers, progress)
    shutil.rmtree(
        plan.work
    )  # a demo that was interrupted goes on; one that is finished runs again when it is asked for
    progress("")
    start, of = finished[0]["measured"], points(finished)
    made = {**machine(options.device), "workers": workers, "steps": options.steps, "seeds": options.seeds}
    text = f"{table(start, of)}\n\n{finding(start, of)}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo.md").write_text(f"Made by `make demo`: {report.header(made)}.\n\n{text}\n")
    results = {"made": made, "base": start, "runs": finished[1:]}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    draw(start, of, options.out / "alignment_tax.png")
    draw_null_space(plan.model, options.out / "null_space.png")
    print(f"\n{text}\n\npicture: {options.out / 'alignment_tax.png'}   ({time.perf_counter() - begin:.0f} s)")
