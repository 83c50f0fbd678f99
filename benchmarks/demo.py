"""`make demo`: what a small language model forgets while it is taught to refuse, unprotected and protected.

The shipped model knows Python, exercises and a dialogue that mostly helps. Supervised fine-tuning teaches it to refuse harmful
requests, under five cures of the alignment tax. Writes a picture, a table and every run's figures. CPU, or --device cuda.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from alignment_tax import adapt
from alignment_tax import base as base_model
from alignment_tax.measure import measure
from alignment_tax.points import METRICS, Point, points
from alignment_tax.runs import pool_of
from alignment_tax.settings import SCALES, Cure, Settings
from machine import machine
from tiny_lm import load_base

SETTINGS = SCALES["cpu"]
FIRST_SEED = 101  # settings were chosen on other seeds
CURES = {  # and their colours: Okabe & Ito's, which the colour-blind tell apart
    Cure("unprotected"): "#222222",
    Cure("PTX every step", "gamma 0.3", gamma=0.3): "#d55e00",
    Cure("PTX every 8th step", "gamma 1.0", gamma=1.0, every=8): "#cc79a7",
    Cure("Directions", "32 fresh every step, conflict", method="conflict", directions=32, fill=16): "#009e73",
    Cure("NullSpace", "share 0.08, captured once", share=0.08, fill=16): "#0072b2",
}


def progress(message: str, milestone: bool = False) -> None:
    """One line that is overwritten; where that is not possible, a line per milestone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message[:110]}", end="", flush=True)
    elif milestone:
        print(message, flush=True)


def run(path: Path, cure: Cure, seed: int, settings: Settings, device: str) -> dict[str, Any]:
    """Teach a copy of the base model, and measure what the table shows."""
    base, _ = load_base(path, device)
    model, cost = adapt.align(base, "sft", cure, seed, settings)
    measured = measure(model, settings, variety=False)
    return {"objective": "sft", "cure": cure._asdict(), "seed": seed, "measured": measured, "cost": cost._asdict()}


def run_all(path: Path, seeds: int, settings: Settings, device: str, workers: int) -> list[dict[str, Any]]:
    """By cure, then by seed."""
    with pool_of(workers) as pool:
        waiting = [
            pool.submit(run, path, cure, FIRST_SEED + i, settings, device) for cure in CURES for i in range(seeds)
        ]
        for finished, _ in enumerate(concurrent.futures.as_completed(waiting), 1):
            progress(f"{finished} of {len(waiting)} runs", finished % len(CURES) == 0)
        progress("")
        return [future.result() for future in waiting]


def table(start: dict[str, Any], of: list[Point]) -> str:
    shown = {m: METRICS[m] for m in ("behaviour", "task_accuracy", "loss")}
    heads = "cure | right behaviour, % | exercises solved, % | code loss, nats a byte | forgotten | capability passes | MB held | ms a step"
    before = " | ".join(m.show(start[k]) for k, m in shown.items())
    lines = [f"| {heads} |", f"| --- {'| ---: ' * 7}|", f"| before: the base model | {before} | | | | |"]
    for p in of:
        cells = [f"{m.show(p.mean(k))} ± {m.show(p.spread(k))}" for k, m in shown.items()]
        cells += [
            f"{forgotten(start, p):+.3f}",
            str(p.backwards),
            f"{(p.extra_bytes or 0) / 1e6:.2f}",
            f"{p.step_ms:.0f}",
        ]
        lines.append(f"| {p.cure.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forgotten(start: dict[str, Any], p: Point) -> float:
    return p.mean("loss") - start["loss"]


def against(tax: float, loss: float) -> str:
    """What is forgotten under a cure, against the unprotected model's, in words."""
    return f"{1 - loss / tax:.0%} less" if loss <= tax else f"{loss / tax - 1:.0%} more"


def finding(start: dict[str, Any], of: list[Point]) -> str:
    """One sentence, from the numbers."""
    none, *cures = of
    tax = forgotten(start, none)
    if tax <= none.spread("loss"):
        return f"Unprotected, the code loss changed by {tax:+.3f} nats a byte, no more than the seeds differ: no tax to prevent."
    effects = [
        f"{p.cure.family} {against(tax, forgotten(start, p))} ({p.mean('behaviour'):.1%} right, {p.backwards} capability passes)"
        for p in sorted(cures, key=lambda p: p.mean("loss"))
    ]
    return (
        f"Learning to refuse ({none.mean('behaviour'):.1%} right) cost the unprotected model {tax:.3f} nats a byte of Python; "
        f"against that, cures forgot: {', '.join(effects)}."
    )


def draw(start: dict[str, Any], of: list[Point], path: Path) -> None:
    """What was taught against what was kept: a line from the base model to a large dot for each cure, its seeds small."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(figsize=(9, 5.8), dpi=120)
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
    axes.spines[["top", "right"]].set_visible(False)
    made.savefig(path, bbox_inches="tight")
    plt.close(made)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split(": ", 1)[1].split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per cure (default 3)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="steps of each (default %(default)s)")
    parser.add_argument("--base", type=Path, default=base_model.SHIPPED, help="base model (default: the shipped one)")
    retrain = f"train the base model first, and write it to --base (default {SETTINGS.base_steps} steps, minutes)"
    parser.add_argument("--retrain", type=int, nargs="?", const=SETTINGS.base_steps, metavar="STEPS", help=retrain)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where picture and table go (default demo)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a core, or 1 on cuda)")
    options = parser.parse_args(arguments)
    device, begin = options.device, time.perf_counter()
    workers = options.workers or (1 if device == "cuda" else os.cpu_count() or 1)
    if options.retrain is not None:
        settings = dataclasses.replace(SETTINGS, base_steps=options.retrain)
        base_model.retrain(options.base, settings, device, progress)
        progress("")
    settings = dataclasses.replace(SETTINGS, steps=options.steps)
    try:
        base, facts = load_base(options.base, device)
        known = ", ".join(f"{name} {value:.3f}" for name, value in facts["held_out"].items())
        print(f"base model: {options.base.name}, {facts['steps']} steps, held-out nats per byte: {known}")
        start = measure(base, settings, variety=False)
        runs = run_all(options.base, options.seeds, settings, device, workers)
    except (ValueError, FloatingPointError) as e:
        raise SystemExit(str(e)) from None
    of = points(runs)
    made = {**machine(device), "workers": workers, "steps": options.steps, "seeds": options.seeds}
    text = f"{table(start, of)}\n\n{finding(start, of)}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo.md").write_text(
        f"Made by `make demo`: {', '.join(f'{k} {v}' for k, v in made.items())}.\n\n{text}\n"
    )
    (options.out / "results.json").write_text(json.dumps({"made": made, "base": start, "runs": runs}, indent=1))
    draw(start, of, options.out / "alignment_tax.png")
    print(f"\n{text}\n\npicture: {options.out / 'alignment_tax.png'}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
