"""What the laboratory asks of a model: what it can be taught, the texts of its capability, budgets and measures."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

VERSION = 2  # of the run files: raise it when a change makes older figures mean something else


class Batch(NamedTuple):
    """What is taught in a step.

    Attributes:
        tokens: [sides, B, T], the preferred side first.
        mask: [sides, B, T - 1], True where the next token counts; None counts all.
    """

    tokens: Tensor
    mask: Tensor | None


class Objective(NamedTuple):
    """What a model is taught.

    Attributes:
        title: in words.
        target: the metric that says how well it has learned.
        capability: the text that is replayed or captured, by its name in ``Model.texts``.
        batch: (size, generator) -> what is taught in a step.
        preferences: taught by DPO, from two sides; else supervised.
        likelihood: beside DPO, the weight of the preferred side's nats a token. DPO alone makes both sides less likely,
            and a model that never says the preferred one does not begin to (Pang et al. 2024; "sft" in TRL).
    """

    title: str
    target: str
    capability: str
    batch: Callable[[int, Generator], Batch]
    preferences: bool = False
    likelihood: float = 0.0


def endless(draw: Callable[[int, Generator], Tensor], size: int, generator: Generator) -> Iterator[Tensor]:
    """Batches of a text that are drawn at random."""
    while True:
        yield draw(size, generator)


class Model(Protocol):
    """A model before it is taught anything, and all that depends on which it is.

    Attributes:
        name: of the folder of its runs.
        steps, batch, capability_batch: of a run: steps, sequences taught in each, sequences of a capability batch.
        dpo_beta: of :func:`formulas.dpo_loss`.
        objectives: what it can be taught, by name.
        texts: name -> (size, generator) -> batches of tokens [size, T], without end.
    """

    name: str
    device: str
    steps: int
    batch: int
    capability_batch: int
    dpo_beta: float
    objectives: dict[str, Objective]
    texts: Mapping[str, Callable[[int, Generator], Iterator[Tensor]]]

    def base(self) -> nn.Module:
        """The network; to be copied, not trained. Made once in a process."""

    def lr(self, objective: str) -> float:
        """AdamW's learning rate."""

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """[B, T - 1, V], which predict ``tokens[:, 1:]``."""

    def measure(self, model: nn.Module, objective: str, variety: bool) -> dict[str, Any]:
        """Numbers and lists, ready for JSON. Without ``variety`` what takes long and chooses nothing is left out."""

    def facts(self) -> Any:
        """What its figures depend on, as JSON."""


def fingerprint(model: Model) -> str:
    """Of everything that makes two runs comparable, their cures apart."""
    facts = [VERSION, model.facts(), model.device, torch.__version__, platform.python_version()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
