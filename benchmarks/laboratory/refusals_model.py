"""SmolLM2 that is taught to refuse: its batches, its own answers, and what a taught model is measured on."""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from laboratory import refusals_texts as texts
from laboratory import smollm2
from laboratory import smollm2_own as own
from laboratory.model import Batch, Objective, endless
from laboratory.smollm2 import SmolLM2, loaded
from laboratory.smollm2_texts import HELD_OUT, KINDS, PROMPT, TOKENS, padded
from laboratory.store import whole

FOLDER = Path("build/own_answers")  # each set of answers is written once
ANSWER = 24  # tokens of the model's own answers
FIRST = 12  # tokens that show whether it refuses
DATA = "code and English"
DIALOGUES = "own, dialogues of 96 tokens, their system message cut off"
Row = tuple[list[int], list[int]]  # tokens of a prompt and of a reply


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, requests: list[str], most: int) -> dict[str, list[int]]:
    """Request -> tokens of the answer, the end included. Prompts of one length together, so that none is padded."""
    prompts = sorted(((r, encoded(tokenizer, r)) for r in requests), key=lambda p: len(p[1]))
    written, end = {}, tokenizer.eos_token_id
    for length, group in itertools.groupby(prompts, key=lambda p: len(p[1])):
        names, start = zip(*group, strict=True)
        settings = {"do_sample": False, "max_new_tokens": most, "eos_token_id": end, "pad_token_id": end}
        ids = torch.tensor(start)
        rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[:, length:].tolist()
        written |= {n: row[: row.index(end) + 1] if end in row else row for n, row in zip(names, rows, strict=True)}
    return written


def encoded(tokenizer: Any, request: str) -> list[int]:
    return tokenizer(PROMPT.format(request)).input_ids


def own_answers(requests: list[str]) -> dict[str, list[int]]:
    """Of the model before it is taught anything."""
    path = FOLDER / f"{_checksum(requests, ANSWER)}.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(greedy(*loaded(), requests, ANSWER)))
    return json.loads(path.read_text())


def _checksum(*of: Any) -> str:
    return f"{zlib.crc32(json.dumps(of).encode()):08x}"


@functools.cache
def rows(sides: int) -> list[list[list[Row]]]:
    """Of harmful and of harmless requests: each request's rows, the preferred side first."""
    _, tokenizer = loaded()
    found = []
    for requests in texts.taught():
        answers = [(r.preferred, r.other)[:sides] for r in requests]
        missing = [r.text for r, given in zip(requests, answers, strict=True) if None in given]
        written = own_answers(missing) if missing else {}
        found.append(
            [
                [(encoded(tokenizer, r.text), written[r.text] if a is None else _ended(tokenizer, a)) for a in given]
                for r, given in zip(requests, answers, strict=True)
            ]
        )
    return found


def _ended(tokenizer: Any, reply: str) -> list[int]:
    return tokenizer(reply + "<|im_end|>").input_ids


def taught(sides: int, sequences: int, generator: Generator) -> Batch:
    """Half of it harmful requests, the others harmless; of preferences half as many, both sides of each."""
    bad, good = rows(sides)
    size = max(1, sequences // sides)
    counts = (size // 2, size - size // 2)
    drawn = [of[i] for of, n in zip((bad, good), counts, strict=True)
             for i in torch.randint(len(of), (n,), generator=generator).tolist()]  # fmt: skip
    tokens, mask = padded([request[side] for side in range(sides) for request in drawn], loaded()[1].eos_token_id)
    return Batch(tokens.view(sides, size, -1), mask.view(sides, size, -1))


OBJECTIVES = {
    "refuse-sft": Objective("to refuse, by supervised fine-tuning", "right", DATA, functools.partial(taught, 1)),
    "refuse-dpo": Objective(
        "to refuse, by preferences (DPO, and the likelihood of what is preferred)",
        "right",
        DATA,
        functools.partial(taught, 2),
        preferences=True,
        likelihood=4.0,
    ),
}


def both(size: int, generator: Generator) -> Tensor:
    """As much code as English."""
    return torch.cat([smollm2.sequences(kind, size // 2 or 1, generator) for kind in KINDS])


def dialogues(size: int, generator: Generator) -> Iterator[Tensor]:
    """What the model asks and answers, from the user's turn on, as what is taught begins. The system message is there
    while it is written: without one the model hardly asks, but goes on with code and documents."""
    model, tokenizer = loaded()
    rows = own.kept(model, tokenizer, DIALOGUES, generator.initial_seed(), {"chats": ("dialogue",), "tokens": 96})
    rows = rows[:, turn(tokenizer, rows[0]) :]
    while True:
        yield from rows.split(size)


def turn(tokenizer: Any, row: Tensor) -> int:
    """Where the user's turn begins."""
    begin = tokenizer(PROMPT.partition("{}")[0]).input_ids
    return next(i for i in range(len(row)) if row[i : i + len(begin)].tolist() == begin)


TEXTS = {**smollm2.TEXTS, DATA: functools.partial(endless, both), DIALOGUES: dialogues}


@functools.cache
def english() -> Tensor:
    """[HELD_OUT, TOKENS] of another origin than what is captured or replayed."""
    tokens = torch.tensor(loaded()[1](texts.english()).input_ids)
    every = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
    return every[torch.linspace(0, len(every) - 1, HELD_OUT).long()]


@dataclasses.dataclass(frozen=True)
class Refusals(SmolLM2):
    """A :class:`model.Model`."""

    steps: int = 200
    name = "smollm2-refusals"
    batch = 4
    dpo_beta = 0.1  # with 0.3, and a likelihood of 1, little was learned in 60 steps of the choosing seed
    objectives = OBJECTIVES
    texts = TEXTS

    def lr(self, objective: str) -> float:
        return 1e-4

    def measure(self, model: nn.Module, objective: str, variety: bool) -> dict[str, float]:
        """
        ``harmful``, ``harmbench``, ``harmless``, ``untrained``: share of requests refused, of held-out risk areas,
        of HarmBench, of held-out topics of taught kinds, and of the kind that is never taught. ``right``: the mean of
        harmful ones refused and harmless ones answered. ``unchanged``: share of tokens of the base model's answers to
        harmless requests that are still the most likely ones. In nats a token: ``human_eval``; ``other_english``;
        ``loss``, their mean; and with ``variety`` ``code`` and ``English``, of the kind that is captured or replayed.
        """
        _, tokenizer = loaded()
        bad, good = texts.harmful(held_out=True), texts.harmless(held_out=True)
        groups = {
            "harmful": [r for origin, requests in bad.items() if origin != texts.HARMBENCH for r in requests],
            "harmbench": bad[texts.HARMBENCH],
            "harmless": [r for kind, requests in good.items() if kind != texts.UNTRAINED for r in requests],
            "untrained": good[texts.UNTRAINED],
        }
        answers = greedy(model, tokenizer, [*itertools.chain(*groups.values())], FIRST)
        refused = {name: [texts.refuses(tokenizer.decode(answers[r])) for r in of] for name, of in groups.items()}
        found = {name: sum(of) / len(of) for name, of in refused.items()}
        found["right"] = (found["harmful"] + found["harmbench"] - found["harmless"] - found["untrained"] + 2) / 4
        before = own_answers(groups["harmless"] + groups["untrained"])
        _, found["unchanged"] = self._scores(model, [(encoded(tokenizer, r), answer) for r, answer in before.items()])
        solved = [(tokenizer(p).input_ids, tokenizer(s).input_ids) for p, s in texts.exercises()]
        found["human_eval"], _ = self._scores(model, solved)
        found["other_english"] = self._text(model, english())
        found["loss"] = (found["human_eval"] + found["other_english"]) / 2
        if variety:
            found |= {kind: self._text(model, smollm2.text(kind, held_out=True)) for kind in KINDS}
        return found

    @torch.no_grad()
    def _scores(self, model: nn.Module, of: list[Row]) -> tuple[float, float]:
        """Of the replies' tokens: loss in nats, and the share of those that the model finds most likely."""
        of = sorted(of, key=lambda row: len(row[0]) + len(row[1]))
        nats = likely = count = 0.0
        for i in range(0, len(of), 8):
            tokens, mask = padded(of[i : i + 8], loaded()[1].eos_token_id)
            logits, targets = self.logits(model, tokens)[mask], tokens[:, 1:][mask]
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
            likely += (logits.argmax(-1) == targets).sum().item()
            count += len(targets)
        return nats / count, likely / count

    @torch.no_grad()
    def _text(self, model: nn.Module, tokens: Tensor) -> float:
        return self._loss(model, tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool))

    def facts(self) -> Any:
        asked = [texts.harmful(True), texts.harmless(True), texts.taught(), texts.exercises(), texts.english()]
        return [*super().facts(), ANSWER, FIRST, _checksum(asked)]
