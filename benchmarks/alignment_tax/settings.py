"""What is run: the sizes that a result depends on, and what one run is aligned on and under. The grids are in cures.py."""

import dataclasses
import hashlib
import json
import platform
from typing import NamedTuple

import torch

VERSION = 2  # of the run files: raise it when a change here makes older figures mean something else
FIRST_REPORTED = 1_000  # seeds from here on are reported, those below choose settings


class Objective(NamedTuple):
    """What a model is taught.

    Attributes:
        title: in words.
        target: the metric that says how well it has learned; higher is better.
        lr: the field of Settings that is its learning rate.
    """

    title: str
    target: str
    lr: str


OBJECTIVES = {
    "dpo": Objective("preferences (DPO)", "behaviour", "lr_dpo"),
    "sft": Objective("supervised fine-tuning", "behaviour", "lr_sft"),
    "prose": Objective("English prose (the harder case: it needs the same inputs)", "prose", "lr_prose"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a laboratory. Every run in one directory shares them.

    Attributes:
        base_shipped: the base model comes with the checkout; else it is trained here.
        base_batch, capability_batch: windows of 128 bytes.
        batch: requests a step, each with a preferred and a dispreferred response.
        exercises, held_out_windows, held_out_pairs, samples, sample_bytes: what a finished model is measured on.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    base_shipped: bool = True
    base_steps: int = 4000
    base_batch: int = 8
    steps: int = 80
    batch: int = 8
    capability_batch: int = 8
    lr_dpo: float = 5e-4
    lr_sft: float = 1e-3
    lr_prose: float = 1e-3
    dpo_beta: float = 0.3
    exercises: int = 150
    held_out_windows: int = 32
    held_out_pairs: int = 192
    samples: int = 24
    sample_bytes: int = 32

    def fingerprint(self, device: str, base: str = "") -> str:
        """Of everything that makes two runs comparable: sizes, device, versions, and the digest of the shipped base model if
        they start from it. Text comes from Python's own library."""
        facts = [VERSION, dataclasses.asdict(self), device, torch.__version__, platform.python_version(), base]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


SCALES = {
    "cpu": Settings(),
    "quick": Settings(
        width=16,
        heads=2,
        base_shipped=False,
        base_steps=6,
        steps=4,
        batch=2,
        capability_batch=2,
        exercises=6,
        held_out_windows=2,
        held_out_pairs=8,
        samples=4,
        sample_bytes=6,
    ),
    "gpu": Settings(
        width=768,
        layers=12,
        heads=12,
        base_shipped=False,
        base_steps=4000,
        base_batch=128,
        steps=256,
        batch=64,
        capability_batch=64,
        lr_dpo=1e-5,
        lr_sft=5e-5,
        lr_prose=5e-5,
        exercises=1500,
        held_out_windows=256,
        held_out_pairs=288,
        samples=256,
        sample_bytes=48,
    ),
}


class Cure(NamedTuple):
    """One point of a sweep.

    Attributes:
        family: the sweep it belongs to.
        strength: what the sweep turns, in words.
        lr, steps: factors on the objective's learning rate and on the number of steps.
        kl, gamma, ewc: weights of the KL penalty, of the pre-training loss and of the penalty on weights that mattered.
        alpha: share of the tuned weights, from the finished run without a cure of the same seed.
        method, directions: of gradproj.Directions; no method is without.
        share, pinned: of gradproj.NullSpace, which is captured before the first step; 0 is without. Not pinned, only its
            layer-wise learning rates are used.
        space: of NullSpace; empty is its default.
        damping: of NullSpace's learning rates.
        kfac: damping of the two-sided K-FAC reference; 0 is without.
        frozen: embeddings, norms and positions do not train, as under NullSpace and K-FAC.
        every: steps between capability batches.
        fill: capability batches before the first step: a direction each, or all of a capture.
    """

    family: str
    strength: str = ""
    lr: float = 1.0
    steps: float = 1.0
    kl: float = 0.0
    gamma: float = 0.0
    ewc: float = 0.0
    alpha: float | None = None
    method: str | None = None
    directions: int = 1
    space: str = ""
    share: float = 0.0
    pinned: bool = True
    damping: float = 0.0
    kfac: float = 0.0
    frozen: bool = False
    every: int = 1
    fill: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}, {self.strength}" if self.strength else self.family

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name).split()).lower()
