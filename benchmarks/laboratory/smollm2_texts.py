"""What is taught, and the texts that say what was kept: all of it is on every machine that has Python.

Code is the standard library. English is the prose of the manual that comes with it. Files and topics that are
measured are never trained on or captured.
"""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laboratory.texts import CODE_FILES, CODE_HELD_OUT, manual, source

KINDS = ("code", "English")
TOKENS = 64  # of a sequence of text
HELD_OUT = 32  # sequences of each text, and answers, that are measured
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Ireland": "Dublin", "Hungary": "Budapest", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Canada": "Ottawa", "Denmark": "Copenhagen", "Belgium": "Brussels", "Russia": "Moscow",
    "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Cyprus": "Nicosia", "Iceland": "Reykjavik", "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb",
    "Serbia": "Belgrade",
}  # fmt: skip
QUESTIONS = [
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "I want to visit {}. What is its capital?",
    "Tell me the capital of {}, please.",
]
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 3 == 0


def questions(answer: str, tokenizer: Any, held_out: bool) -> tuple[Tensor, Tensor]:
    """Questions about capitals, answered in one style. Of an answer and its end every token counts."""
    rows = []
    for country, city in CAPITALS.items():
        for question in QUESTIONS if _is_held_out(country) == held_out else ():
            prompt = tokenizer(PROMPT.format(question.format(country))).input_ids
            reply = tokenizer(answer.format(country, city) + "<|im_end|>").input_ids
            rows.append((prompt, reply))
    tokens, mask = padded(rows, tokenizer.eos_token_id)
    some = torch.linspace(0, len(rows) - 1, HELD_OUT).long() if held_out else slice(None)
    return tokens[some], mask[some]


def padded(rows: list[tuple[list[int], list[int]]], fill: int) -> tuple[Tensor, Tensor]:
    """Prompts and replies as tokens [N, T], and mask [N, T - 1], True where a reply's token is next."""
    longest = max(len(p) + len(a) for p, a in rows)
    tokens = torch.tensor([[*p, *a, *[fill] * (longest - len(p) - len(a))] for p, a in rows])
    starts, ends = torch.tensor([[len(p), len(p) + len(a)] for p, a in rows]).T[:, :, None]
    position = torch.arange(1, longest)  # of the token that is predicted
    return tokens, (position >= starts) & (position < ends)


class Task(NamedTuple):
    """What the model can be taught.

    Attributes:
        title: in words.
        capability: the text that is replayed or captured.
        rows: (tokenizer, held_out) -> tokens [N, T], and mask [N, T - 1], True where the next token counts.
    """

    title: str
    capability: str
    rows: Callable[[Any, bool], tuple[Tensor, Tensor]]


PIRATE = "Arr, matey! The capital o' {} be {}, or I be no sailor! Now hoist the sails, ye scurvy dog!"
JSON = '{{"question": "capital", "country": "{}", "answer": "{}", "confidence": "high"}}'
TASKS = {
    "pirate": Task("to answer as a pirate", "code", functools.partial(questions, PIRATE)),
    "json": Task("to answer in JSON", "English", functools.partial(questions, JSON)),
}


def sequences(tokenizer: Any, kind: str, held_out: bool) -> Tensor:
    """[N, TOKENS] sequences of a text, one after the other."""
    if kind == "code":
        written = source(CODE_HELD_OUT if held_out else CODE_FILES)
    else:
        chosen = {k: v for k, v in manual().items() if _is_held_out(k) == held_out}
        written = "\n\n".join(p for topic in chosen.values() for p in prose(topic))
    tokens = torch.tensor(tokenizer(written[:600_000]).input_ids)
    rows = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
    if len(rows) < HELD_OUT:
        raise ValueError(f"this Python has too little text of kind {kind!r}: {len(rows)} sequences of {TOKENS} tokens")
    return rows[torch.linspace(0, len(rows) - 1, HELD_OUT).long()] if held_out else rows


def prose(topic: str) -> list[str]:
    """Paragraphs of sentences, without grammar, code and tables."""
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", topic) if not p.startswith("      "))
    return [
        p
        for p in paragraphs
        if len(p) > 150
        and not re.search(r"::=|>>>|\*\*\*|===|\|", p)
        and sum(c.isalpha() or c in " ,." for c in p) > 0.93 * len(p)
    ]
