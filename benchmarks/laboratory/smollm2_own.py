"""What SmolLM2 writes by itself: texts to capture or to distil from, for those who lack the data it was made from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from laboratory import smollm2_texts as texts
from laboratory.store import whole

FOLDER = Path("build/own_text")  # each text is written once
DEFAULT = {"sequences": 128, "tokens": 64, "temperature": 1.0, "chats": (False,)}
# Arguments of gradproj.hf.own_text that differ, `chats` being as much of each, and what else is in the text. How much,
# first; then, around 16 sequences, which keep nearly as much, what: one thing changed at a time.
FEW = "own, 16 sequences"
OWN: dict[str, dict[str, Any]] = {
    "own": {},
    FEW: {"sequences": 16},
    "own, 64 sequences": {"sequences": 64},
    "own, 512 sequences": {"sequences": 512},
    "own, dialogues": {"chats": ("dialogue",)},
    f"{FEW} of 32 tokens": {"sequences": 16, "tokens": 32},
    f"{FEW} of 256 tokens": {"sequences": 16, "tokens": 256},
    f"{FEW}, temperature 0.7": {"sequences": 16, "temperature": 0.7},
    f"{FEW}, temperature 1.3": {"sequences": 16, "temperature": 1.3},
    f"{FEW} from the user's turn": {"sequences": 16, "chats": ("turn",)},
    f"{FEW}, dialogues": {"sequences": 16, "chats": ("dialogue",)},
    f"{FEW}, dialogues of 128 tokens": {"sequences": 16, "chats": ("dialogue",), "tokens": 128},
    f"{FEW} of 128 tokens, half of them dialogues": {"sequences": 16, "chats": (False, "dialogue"), "tokens": 128},
    f"{FEW}, answers to ten prompts": {"sequences": 16, "prompts": True},
    f"{FEW}, half of them code": {"sequences": 8, "data": "code"},
    f"{FEW}, half of them English": {"sequences": 8, "data": "English"},
}
# Measured, never captured.
HELD_OUT = {"chats": ("dialogue",), "sequences": texts.HELD_OUT, "tokens": 128}
PROMPTS = [
    "Explain how rain forms.",
    "Write a short story about a lighthouse.",
    "Write a Python function that reverses a list.",
    "Summarise the rules of chess.",
    "What should I cook tonight with rice and beans?",
    "Solve 3 x + 5 = 20, step by step.",
    "Write a polite letter to a landlord about a broken window.",
    "Describe the causes of the First World War.",
    "List five tips for sleeping better.",
    "Translate to French: where is the station?",
]


def rows_of(name: str) -> int:
    """Sequences of a text, its data included."""
    return {**DEFAULT, **OWN[name]}["sequences"] * (1 + ("data" in OWN[name]))


def batches(model: nn.Module, tokenizer: Any, name: str, size: int, generator: Generator) -> Iterator[Tensor]:
    """All sequences in order, again and again. The text depends on the generator's seed."""
    rows = kept(model, tokenizer, name, generator.initial_seed(), OWN[name])
    while True:
        yield from rows.split(size)


def held_out(model: nn.Module, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Dialogues, and a mask of what is in an answer: after the third turn's start, for the first is the system's."""
    tokens = kept(model, tokenizer, "held out", 0, HELD_OUT)
    return tokens, ((tokens == tokens[:, :1]).cumsum(1) >= 3)[:, 1:]


def kept(model: nn.Module, tokenizer: Any, name: str, seed: int, settings: dict[str, Any]) -> Tensor:
    path = FOLDER / f"{name.replace(' ', '_')}-{seed}.pt"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            torch.save(write(model, tokenizer, seed, **{**DEFAULT, **settings}), part)
    return torch.load(path)


def write(
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    sequences: int,
    tokens: int,
    temperature: float,
    chats: tuple,
    data: str | None = None,
    prompts: bool = False,
) -> Tensor:
    """[sequences, tokens], twice as many with ``data``."""
    if prompts:
        return answers(model, tokenizer, seed, sequences, tokens)
    import gradproj.hf  # needs transformers, which the small model does not

    size, sampling = (sequences // len(chats), tokens), {"temperature": temperature, "seed": seed}
    own = torch.cat([gradproj.hf.own_text(model, tokenizer, *size, chat=chat, **sampling) for chat in chats])
    if data is None:
        return own
    other = texts.sequences(tokenizer, data, held_out=False)
    generator = torch.Generator().manual_seed(seed)
    other = other[torch.randint(len(other), (len(own),), generator=generator), : own.shape[1]]
    return torch.stack([own, other], 1).flatten(0, 1)


def answers(model: Any, tokenizer: Any, seed: int, sequences: int, tokens: int) -> Tensor:
    """Prompts of ours with the model's answers; each prompt as often as the others, or once less."""
    torch.manual_seed(seed)
    found = []
    for i, prompt in enumerate(PROMPTS):
        start = torch.tensor([tokenizer(texts.PROMPT.format(prompt)).input_ids])
        start = start.expand(len(range(i, sequences, len(PROMPTS))), -1)
        length = {"max_length": tokens, "min_length": tokens}
        sampled = {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(start)}
        found.append(model.generate(start, **length, **sampled))
    return torch.cat(found)
