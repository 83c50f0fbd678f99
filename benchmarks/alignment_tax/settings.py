"""What is run: the sizes that a result depends on, and the cures."""

import dataclasses
import hashlib
import json
import platform
from typing import NamedTuple

import torch

VERSION = 1  # of the run files: raise it when a change here makes older figures mean something else
OBJECTIVES = {"dpo": "preferences (DPO)", "sft": "supervised fine-tuning"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a laboratory. Every run in one directory shares them.

    Attributes:
        base_batch, capability_batch: windows of 128 bytes.
        batch: requests a step, each with a preferred and a dispreferred response.
        exercises, held_out_windows, held_out_pairs, samples, sample_bytes: what a finished model is measured on.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    base_steps: int = 2500
    base_batch: int = 8
    steps: int = 80
    batch: int = 8
    capability_batch: int = 8
    lr_dpo: float = 5e-4
    lr_sft: float = 1e-3
    dpo_beta: float = 0.3
    exercises: int = 150
    held_out_windows: int = 32
    held_out_pairs: int = 192
    samples: int = 24
    sample_bytes: int = 32

    def fingerprint(self, device: str) -> str:
        """Of everything that makes two runs comparable: sizes, device, versions. Text comes from Python's own library."""
        facts = [VERSION, dataclasses.asdict(self), device, torch.__version__, platform.python_version()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


SCALES = {
    "cpu": Settings(),
    "quick": Settings(
        width=16,
        heads=2,
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
        base_steps=4000,
        base_batch=128,
        steps=256,
        batch=64,
        capability_batch=64,
        lr_dpo=1e-5,
        lr_sft=5e-5,
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
        kl, gamma: weights of the KL penalty and of the pre-training loss.
        alpha: share of the tuned weights, from the finished run without a cure of the same seed.
        method, directions, space: of gradproj.Directions; None is the plain optimizer.
        every: steps between capability batches.
        fill: directions made before the first step.
    """

    family: str
    strength: str = ""
    kl: float = 0.0
    gamma: float = 0.0
    alpha: float | None = None
    method: str | None = None
    directions: int = 1
    space: str = "gradient"
    every: int = 1
    fill: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}, {self.strength}" if self.strength else self.family

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name).split()).lower()


NONE = Cure("none")
EVERY = 8  # steps between capability batches where they are rare


def _projected(family: str, directions: tuple[int, ...], **kwargs) -> list[Cure]:
    return [
        Cure(family, f"{k} direction{'s' * (k > 1)}", method="conflict", directions=k, fill=max(1, k // 2), **kwargs)
        for k in directions
    ]


CURES = [
    NONE,
    *(Cure("KL penalty", f"beta {b}", kl=b) for b in (0.1, 0.3, 1.0)),
    *(Cure("PTX", f"gamma {g}", gamma=g) for g in (0.1, 0.3, 1.0)),
    *(Cure("PTX, rare", f"gamma {g}", gamma=g, every=EVERY) for g in (1.0, 3.0, 8.0)),
    *(Cure("interpolation", f"alpha {a}", alpha=a) for a in (0.2, 0.4, 0.6, 0.8)),
    Cure("orthogonal", "every step", method="orthogonal"),
    Cure("orthogonal", f"every {EVERY} steps", method="orthogonal", every=EVERY),
    *_projected("conflict", (1, 8, 32)),
    *_projected("conflict, rare", (1, 8, 32), every=EVERY),
    *_projected("conflict, update space", (1, 8, 32), space="update"),
]
