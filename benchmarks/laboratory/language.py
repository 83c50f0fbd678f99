"""`make language`: a real model goes on with another language: what it learns, and what it forgets, step by step."""

import argparse
import dataclasses
import functools
import html.parser
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from laboratory import refusals_model, refusals_texts, report, smollm2
from laboratory.cures import BASE, NONE, Cure
from laboratory.model import Batch, Objective
from laboratory.points import points
from laboratory.refusals_cures import at, needs
from laboratory.refusals_model import Refusals
from laboratory.runs import FIRST_REPORTED, Plan, Run, cores, make_all
from laboratory.smollm2 import SmolLM2, loaded
from laboratory.train import train
from machine import machine

OUT = Path(__file__).parent.parent / "results" / "language"
DEBIAN = Path("/usr/share/doc/installation-guide-amd64")
LANGUAGE = "German"
TOKENS, EVERY = 128, 16  # of a sequence that is taught; steps between two measurements
MEASURED = {"German": 24, "HumanEval": 16}  # sequences, exercises
LABELS = {"target": "German, held out", "human_eval": "HumanEval", "other_english": "other English"}
CAPTURED = {"share": 0.05, "damping": 0.3, "fill": 16}
# Nothing is chosen: all are shown.
SETTINGS = [
    NONE,
    *at("none", 0.3),
    *at("LoRA", 10, lora=True),
    *at("PTX", 1, gamma=1.0),
    *at("distilled, own text", 1, distil=3.0, text="own"),
    *at("NullSpace, own text", 1, 3, text="own", **CAPTURED),
]


class _Paragraphs(html.parser.HTMLParser):
    """The text of a page's paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "p":
            self._inside = True
            self.found.append("")

    def handle_endtag(self, tag) -> None:
        self._inside &= tag != "p"

    def handle_data(self, data) -> None:
        if self._inside:
            self.found[-1] += data


@functools.cache
def guide(folder: Path, held_out: bool) -> str:
    """Debian's installation guide in German (GPL-2; read, not kept): its paragraphs. Held out are whole pages."""
    found = []
    for page in sorted((folder / "de").glob("*.html")):
        if (zlib.crc32(page.name.encode()) % 4 == 0) == held_out:
            parser = _Paragraphs()
            parser.feed(page.read_text(encoding="utf-8"))
            found += [re.sub(r"\s+", " ", p).strip() for p in parser.found]
    return "\n\n".join(p for p in dict.fromkeys(found) if len(p) > 150)


@functools.cache
def sequences(folder: Path, held_out: bool) -> Tensor:
    """[N, TOKENS] tokens."""
    tokens = torch.tensor(loaded()[1](guide(folder, held_out)).input_ids)
    rows = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
    return rows[torch.linspace(0, len(rows) - 1, MEASURED["German"]).long()] if held_out else rows


@dataclasses.dataclass(frozen=True)
class Language(Refusals):
    """A :class:`model.Model`."""

    steps: int = 80
    data: Path = DEBIAN
    name = "smollm2-language"
    batch, capability_batch = 4, 8  # of 128 and of 64 tokens

    @property
    def objectives(self) -> dict[str, Objective]:
        title = "German, by going on with its training"
        return {LANGUAGE: Objective(title, "target", refusals_model.DATA, self._taught)}

    def _taught(self, size: int, generator: Generator) -> Batch:
        rows = sequences(self.data, held_out=False)
        tokens = rows[torch.randint(len(rows), (size,), generator=generator)][None]
        return Batch(tokens, torch.ones_like(tokens[:, :, 1:], dtype=torch.bool))

    def measure(self, model: nn.Module, objective: str, variety: bool) -> dict[str, Any]:
        """In nats a token: ``target``, German held out; ``human_eval`` and ``other_english``, never captured."""
        _, tokenizer = loaded()
        some = refusals_texts.evenly(refusals_texts.exercises(), MEASURED["HumanEval"])
        solved = [(tokenizer(p).input_ids, tokenizer(s).input_ids) for p, s in some]
        return {
            "target": self._text(model, sequences(self.data, held_out=True)),
            "human_eval": self._scores(model, solved)[0],
            "other_english": self._text(model, refusals_model.english()),
        }

    def facts(self) -> Any:
        read = [guide(self.data, True), guide(self.data, False), refusals_texts.exercises(), refusals_texts.english()]
        return [*SmolLM2.facts(self), TOKENS, EVERY, MEASURED, zlib.crc32(repr(read).encode())]


def make(plan: Plan, run: Run) -> None:
    """Make one run and keep it, with what was measured after every so many steps; the base model's is made first."""
    model, cost = plan.model, None
    if run.cure == BASE:
        curve = [model.measure(model.base(), run.objective, True)]
    else:
        curve = [plan.store.load(run.objective, BASE, 0)["measured"]]

        def watch(step: int, pupil: nn.Module) -> None:
            if step % EVERY == 0:
                curve.append(model.measure(pupil, run.objective, True))

        _, cost = train(model, *run, watch)
    over_steps = {f"{name} over steps": [found[name] for found in curve] for name in LABELS}
    plan.store.save(*run, {"measured": {**curve[-1], **over_steps}, "cost": cost and cost._asdict()})


def forgotten_at(measured: dict[str, Any], level: float, name: str) -> float:
    """What a text had gained when German's loss first was at ``level``, between two measurements by their line."""
    learned, kept = measured["target over steps"], measured[f"{name} over steps"]
    after = next(i for i, loss in enumerate(learned) if loss <= level)
    part = (learned[after - 1] - level) / (learned[after - 1] - learned[after]) if after else 0.0
    before = max(0, after - 1)
    return kept[before] + part * (kept[after] - kept[before]) - kept[0]


def table(finished: list[dict[str, Any]], steps: int) -> str:
    base, runs = finished[0]["measured"], finished[1:]
    level = max(run["measured"]["target"] for run in runs)
    rows = [["base model", *(f"{base[name]:.3f}" for name in LABELS), "", "", "", "", ""]]
    for run, point in zip(runs, points(runs), strict=True):
        found = run["measured"]
        changes = [f"{found[name] - base[name]:+.3f}" for name in LABELS]
        there = [f"{forgotten_at(found, level, name):+.3f}" for name in ("human_eval", "other_english")]
        seconds = point.step_ms / 1e3 - point.capture_s / steps
        cost = [f"{point.extra_bytes / 1e6:.0f}", f"{seconds:.2f}", needs(point.cure)]
        rows.append([point.cure.name, *changes, *there, *cost])
    at_level = [f"{LABELS[name]} when German is at {level:.3f}" for name in ("human_eval", "other_english")]
    return report.markdown(["setting", *LABELS.values(), *at_level, "MB held", "s a step", "data needed"], rows)


def draw(finished: list[dict[str, Any]], path: Path) -> None:
    """A panel for each text: its loss over the steps."""
    with report.picture(path, 1, len(LABELS), figsize=(15, 5.5), dpi=100) as (made, axes):
        for panel, (name, label) in zip(axes[0], LABELS.items(), strict=True):
            for run in finished[1:]:
                losses = run["measured"][f"{name} over steps"]
                panel.plot(
                    [EVERY * i for i in range(len(losses))], losses, label=Cure(**run["cure"]).name, marker=".",
                    linestyle="-" if "share" in run["cure"] else "--",
                )  # fmt: skip
            panel.set_title(label, fontsize=11)
            panel.set_xlabel("steps")
            panel.set_ylabel("nats a token")
            panel.grid(color="#eeeeee")
        made.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
        made.tight_layout(rect=(0, 0.12, 1, 1))


def options(parser: argparse.ArgumentParser) -> None:
    data = "Debian's installation guide, with its pages in de/ (default: where installation-guide-amd64 has them)"
    parser.add_argument("--data", type=Path, default=DEBIAN, help=data)
    parser.add_argument(
        "--steps", type=int, default=Language.steps, help=f"a multiple of {EVERY} (default %(default)s)"
    )
    work = Path("build/language")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="table, figure (default benchmarks/results/language)")


def main(options: argparse.Namespace, progress: Callable) -> None:
    if not (options.data / "de").is_dir():
        raise ValueError(
            f"{options.data} has no folder de: apt-get install installation-guide-amd64, or name the folder that holds "
            "the guide, as `dpkg-deb -x` unpacks it: --data FOLDER"
        )
    if options.steps < EVERY or options.steps % EVERY:
        raise ValueError(f"--steps must be a multiple of {EVERY}, after which it is measured, got {options.steps}")
    smollm2.check()
    refusals_texts.check()
    report.check()
    plan = Plan(Language(options.steps, options.data), options.work)
    workers = options.workers or cores("cpu")
    finished = make_all(plan, [Run(LANGUAGE, BASE, 0)], 1, progress, make)
    finished += make_all(plan, [Run(LANGUAGE, cure, FIRST_REPORTED) for cure in SETTINGS], workers, progress, make)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {**machine("cpu"), "workers": workers, "steps": options.steps}
    text = (
        f"SmolLM2-135M-Instruct goes on with German, {options.steps} steps of 4 x {TOKENS} tokens, one seed, nothing "
        f"chosen. In nats a token, of settings the change.\n\n{table(finished, options.steps)}"
    )
    (options.out / "runs.json").write_text(report.dump({"made": about}, runs=finished))
    (options.out / "table.md").write_text(f"Made by {report.header(about)}.\n\n{text}\n")
    draw(finished, options.out / "figure.png")
    print(f"\n{text}\n\nin {options.out}")
