"""`make demo`: adapt a small language model to English, and see what it forgets of Python, unprotected and protected.

The base model knows the source of Python's standard library. It is adapted to the language reference (English) with AdamW, three
seeds each: plain; wrapped, protecting 32 directions; and with pre-training data mixed in (PTX), which is the baseline to beat.
Writes a table, DIR/alignment_tax.png and DIR/results.json. CPU, or --device cuda.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import gradproj
from alignment_tax import base as base_model
from alignment_tax.settings import SCALES
from tiny_lm import Text, TinyLM, batch, code, evaluate, load_base, loss, prose

BATCH = 8
MEASUREMENTS = 4  # along each adaptation
BASE = SCALES["cpu"]  # what --retrain makes: the laboratory's base model


class Cure(NamedTuple):
    """A way to keep the capability.

    Attributes:
        method: of gradproj.Directions; None is the plain optimizer.
        directions: how many protected directions are kept.
        every: steps between capability batches.
    """

    name: str
    colour: str
    method: str | tuple[str, float] | None
    directions: int = 1
    every: int = 1


CURES = (
    Cure("unprotected", "#7a7a7a", None),
    Cure("conflict, 32 directions", "#0072b2", "conflict", 32),
    Cure("conflict, 32, every 4th step", "#56b4e9", "conflict", 32, 4),
    Cure("PTX, gamma 0.3", "#d55e00", ("mix", 0.3)),
)


class Run(NamedTuple):
    """One adaptation: (steps, target loss, capability loss) along the way, and what it cost."""

    cure: str
    seed: int
    points: list[tuple[int, float, float]]
    step_ms: float
    projection_ms: float
    capability_batches: int


def progress(message: str, milestone: bool = False) -> None:
    """One line that is overwritten; where that is not possible, a line per milestone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message[:78]}", end="", flush=True)
    elif milestone:
        print(message, flush=True)


def adapt(base: TinyLM, cure: Cure, seed: int, steps: int, capability: Text, target: Text, device: str) -> Run:
    """Adapt a copy of ``base`` to ``target``. All cures see the same target batches of a seed."""
    model = copy.deepcopy(base)
    targets = torch.Generator().manual_seed(1000 + seed)
    anchors = torch.Generator().manual_seed(2000 + seed)
    opt = gradproj.ProjectedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), gradproj.Directions(cure.directions, cure.method or "conflict")
    )
    points = [(0, evaluate(model, target.held_out), evaluate(model, capability.held_out))]
    times, projections, batches = [], [], 0
    for i in range(steps):
        start = time.perf_counter()
        if cure.method is not None and i % cure.every == 0:
            for _ in range(cure.directions // 2 if i == 0 and cure.directions > 1 else 1):
                with opt.protect():
                    loss(model, batch(capability.train, BATCH, anchors).to(device)).backward()
                batches += 1
        opt.zero_grad()
        loss(model, batch(target.train, BATCH, targets).to(device)).backward()
        before = time.perf_counter()
        opt.project()
        projections.append(time.perf_counter() - before)
        opt.step()
        times.append(time.perf_counter() - start)
        if (i + 1) % max(1, steps // MEASUREMENTS) == 0:
            points.append((i + 1, evaluate(model, target.held_out), evaluate(model, capability.held_out)))
            progress(f"{cure.name}, seed {seed}: step {i + 1}/{steps}", i == steps - 1)
    return Run(cure.name, seed, points, 1e3 * statistics.median(times), 1e3 * statistics.median(projections), batches)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def report(runs: list[Run]) -> str:
    start = runs[0].points[0]
    lines = [
        f"Before: {start[1]:.3f} nats per byte on English (the target), {start[2]:.3f} on Python (the capability).",
        "",
        "| cure | target after | capability after | forgotten | ms a step | of it projecting | capability batches |",
        "| --- " + "| ---: " * 6 + "|",
    ]
    for name in dict.fromkeys(r.cure for r in runs):
        of = [r for r in runs if r.cure == name]
        target, kept = [r.points[-1][1] for r in of], [r.points[-1][2] for r in of]
        lines.append(
            f"| {name} | {spread(target)} | {spread(kept)} | {statistics.mean(kept) - start[2]:+.3f} | "
            f"{statistics.mean(r.step_ms for r in of):.0f} | {statistics.mean(r.projection_ms for r in of):.2f} | "
            f"{of[0].capability_batches} |"
        )
    return "\n".join(lines)


def finding(runs: list[Run], cures=CURES) -> str:
    """One sentence, from the numbers."""
    start = runs[0].points[0][2]

    def forgotten(name):
        return statistics.mean(r.points[-1][2] for r in runs if r.cure == name) - start

    plain, protected, mixed = (forgotten(cures[i].name) for i in (0, 1, 3))
    if plain <= 0:
        return "The unprotected run forgot nothing: there was nothing to protect."
    if protected >= plain:
        return f"Protection did not help: forgotten {protected:+.3f} against {plain:+.3f} nats per byte unprotected."
    sentence = f"Protecting 32 directions prevents {1 - protected / plain:.0%} of the forgetting"
    return sentence + (
        f"; PTX, at about the same cost, {1 - mixed / plain:.0%}." if mixed < plain else "; PTX does not."
    )


def draw(runs: list[Run], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=120)
    start = runs[0].points[0]
    axes.axhline(start[2], color="#bbbbbb", linewidth=1, linestyle="--")
    ends = []
    for cure in CURES:
        of = [r for r in runs if r.cure == cure.name]
        for r in of:
            axes.plot([p[1] for p in r.points], [p[2] for p in r.points], color=cure.colour, linewidth=0.8, alpha=0.35)
        mean = [
            [statistics.mean(column) for column in zip(*ps, strict=True)]
            for ps in zip(*(r.points for r in of), strict=True)
        ]
        axes.plot(
            [p[1] for p in mean], [p[2] for p in mean], color=cure.colour, linewidth=2.4, marker="o", markersize=4
        )
        ends.append((mean[-1][2], mean[-1][1], cure))
    low, high = axes.get_ylim()
    at = low
    for y, x, cure in sorted(
        ends, key=lambda end: end[0]
    ):  # labels beside the ends, moved apart where they would touch
        at = max(y, at + 0.055 * (high - low))
        axes.annotate(cure.name, (x, y), (x - 0.004, at), color=cure.colour, fontsize=11, va="center", ha="left")
    axes.plot(start[1], start[2], "o", color="black", markersize=7)
    axes.annotate("base model", (start[1], start[2]), (-8, -16), textcoords="offset points", fontsize=11, ha="left")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.06 * (high - low), high)
    axes.set_xlim(start[1] + 0.01, min(x for _, x, _ in ends) - 0.13)  # reversed: adaptation runs to the right
    axes.set_xlabel("target: loss on English, nats per byte (better to the right)", fontsize=11)
    axes.set_ylabel("capability: loss on Python, nats per byte", fontsize=11)
    axes.set_title(title, fontsize=12.5, loc="left", pad=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.text(
        1, start[2], "nothing forgotten", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="#888888"
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3, help="adaptations per cure (default 3)")
    parser.add_argument("--base", type=Path, default=base_model.SHIPPED, help="base model (default: the shipped one)")
    parser.add_argument(
        "--retrain",
        type=int,
        nargs="?",
        const=BASE.base_steps,
        metavar="STEPS",
        help=f"train the base model first, and write it to --base (default {BASE.base_steps} steps, minutes)",
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of each adaptation (default 120)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where picture and results go (default demo)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    capability, target = code(), prose()
    if options.retrain is not None:
        settings = dataclasses.replace(BASE, base_steps=options.retrain)
        base_model.retrain(options.base, settings, options.device, progress)
        progress("")
    try:
        base, facts = load_base(options.base, options.device)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    known = ", ".join(f"{name} {value:.3f}" for name, value in facts["held_out"].items())
    print(f"base model: {options.base.name}, {facts['steps']} steps, held-out nats per byte: {known}")
    runs = [
        adapt(base, cure, seed, options.steps, capability, target, options.device)
        for seed in range(options.seeds)
        for cure in CURES
    ]
    progress("")
    options.out.mkdir(parents=True, exist_ok=True)
    text, title = report(runs), finding(runs)
    print(f"\n{text}\n\n{title}")
    draw(runs, options.out / "alignment_tax.png", title)
    results = {
        "finding": title,
        "torch": torch.__version__,
        "settings": vars(options),
        "base": facts,
        "runs": [r._asdict() for r in runs],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    print(f"\npicture: {options.out / 'alignment_tax.png'}   ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
