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

import torch

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
    Cure("PTX", "every step", gamma=0.3): "#d55e00",
    Cure("PTX", "every 8th step", gamma=1.0, every=8): "#e69f00",
    Cure("Directions", "32, fresh every step", method="conflict", directions=32, fill=16): "#56b4e9",
    Cure("NullSpace", "captured once", share=0.08, fill=16): "#0072b2",
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


def prevented(start: float, none: Point, p: Point) -> float:
    """The part of what is forgotten unprotected that a cure keeps; 1 is everything."""
    return 1 - (p.mean("loss") - start) / (none.mean("loss") - start)


def table(start: dict[str, Any], of: list[Point]) -> str:
    shown = {m: METRICS[m] for m in ("behaviour", "task_accuracy", "loss")}
    lines = [
        "| cure | right behaviour, % | exercises solved, % | code loss, nats a byte | forgotten | capability passes | MB held "
        "| ms a step |",
        "| --- " + "| ---: " * 7 + "|",
        f"| before: the base model | {' | '.join(m.show(start[k]) for k, m in shown.items())} | | | | |",
    ]
    for p in of:
        cells = [f"{m.show(p.mean(k))} ± {m.show(p.spread(k))}" for k, m in shown.items()]
        cells += [f"{p.mean('loss') - start['loss']:+.3f}", str(p.backwards), f"{(p.extra_bytes or 0) / 1e6:.2f}"]
        lines.append(f"| {p.cure.name} | {' | '.join(cells)} | {p.step_ms:.0f} |")
    return "\n".join(lines)


def finding(start: dict[str, Any], of: list[Point]) -> str:
    """One sentence, from the numbers."""
    none, *cures = of
    tax = none.mean("loss") - start["loss"]
    if tax <= none.spread("loss"):
        return f"Unprotected, the code loss changed by {tax:+.3f} nats a byte, within the seeds' spread: no tax to prevent."

    def said(p: Point) -> str:
        part = prevented(start["loss"], none, p)
        effect = f"prevented {part:.0%}" if part > 0 else f"added {-part:.0%}"
        return f"{p.cure.name} {effect} ({p.mean('behaviour'):.1%} right, {p.backwards} capability passes)"

    ranked = sorted(cures, key=lambda p: p.mean("loss"))
    return (
        f"Learning to refuse ({none.mean('behaviour'):.1%} right) cost the unprotected model {tax:.3f} nats a byte of Python, "
        f"of which {'; '.join(said(p) for p in ranked)}."
    )


def draw(start: dict[str, Any], of: list[Point], path: Path) -> None:
    """What was taught against what was kept: a large dot a cure, its seeds small."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(figsize=(9.6, 5.4), dpi=120)
    axes.axhline(start["loss"], color="#888888", linewidth=1.5, linestyle="--", zorder=0)
    colours = list(CURES.values())
    for p, colour in zip(of, colours, strict=True):
        x, y = ([factor * v for v in p.values[m]] for m, factor in (("behaviour", 100), ("loss", 1)))
        axes.plot(x, y, "o", color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        axes.plot(100 * p.mean("behaviour"), p.mean("loss"), "o", color=colour, markersize=17)
        axes.annotate(p.cure.name, (100 * p.mean("behaviour"), p.mean("loss")), (14, 0), textcoords="offset points", va="center")
    made.tight_layout()
    made.savefig(path)
    plt.close(made)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split(": ", 1)[1].split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per cure (default 3)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="steps of each (default %(default)s)")
    parser.add_argument("--base", type=Path, default=base_model.SHIPPED, help="base model (default: the shipped one)")
    parser.add_argument(
        "--retrain",
        type=int,
        nargs="?",
        const=SETTINGS.base_steps,
        metavar="STEPS",
        help=f"train the base model first, and write it to --base (default {SETTINGS.base_steps} steps, minutes)",
    )
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
    (options.out / "demo.md").write_text(f"Made by `make demo`: {', '.join(f'{k} {v}' for k, v in made.items())}.\n\n{text}\n")
    (options.out / "runs.json").write_text(json.dumps({"made": made, "base": start, "runs": runs}, indent=1))
    draw(start, of, options.out / "alignment_tax.png")
    print(f"\n{text}\n\npicture: {options.out / 'alignment_tax.png'}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
