"""The small model: a language model on bytes that is trained here, at three scales, and what it can be taught.

The one of the scale "cpu" is shipped under ``benchmarks/models``; those of other scales are trained when first needed.
"""

import dataclasses
import functools
import hashlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from laboratory import small_texts
from laboratory.model import Batch, Objective, endless
from laboratory.small_measure import measure, sample
from laboratory.tiny_lm import CONTEXT, TinyLM, evaluate, load_base, pretrain, save_base

SHIPPED = Path(__file__).parent.parent / "models" / "base.safetensors"
SEED = 0  # of the base model


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

    @property
    def identity(self) -> dict[str, int]:
        """Of the base model, in the header of its file."""
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "steps": self.base_steps,
            "batch": self.base_batch,
        }


SCALES = {
    "cpu": Settings(),
    "quick": Settings(
        width=16, heads=2, base_shipped=False, base_steps=6, steps=4, batch=2, capability_batch=2, exercises=6,
        held_out_windows=2, held_out_pairs=8, samples=4, sample_bytes=6,
    ),
    "gpu": Settings(
        width=768, layers=12, heads=12, base_shipped=False, base_batch=128, steps=256, batch=64, capability_batch=64,
        lr_dpo=1e-5, lr_sft=5e-5, lr_prose=5e-5, exercises=1500, held_out_windows=256, held_out_pairs=288, samples=256,
        sample_bytes=48,
    ),
}  # fmt: skip


def responses(sides: int, size: int, generator: Generator) -> Batch:
    """Requests with the preferred response, and with the other one too where ``sides`` is 2."""
    pairs = small_texts.pairs(held_out=False)
    which = torch.randint(pairs.tokens.shape[1], (size,), generator=generator)
    return Batch(pairs.tokens[:sides, which], pairs.mask[:sides, which])


def prose(size: int, generator: Generator) -> Batch:
    return Batch(small_texts.windows(small_texts.prose(held_out=False), size, generator)[None], None)


def _some(rows: Tensor, size: int, generator: Generator) -> Tensor:
    return rows[torch.randint(len(rows), (size,), generator=generator)]


LEARNED = "pretraining"  # Python source, exercises and dialogue, as the base model saw them
OWN = "own"  # what the base model writes after a line break
WRITTEN = 256  # windows of it
HARDER = "prose"
OBJECTIVES = {
    "dpo": Objective("preferences (DPO)", "behaviour", LEARNED, functools.partial(responses, 2), preferences=True),
    "sft": Objective("supervised fine-tuning", "behaviour", LEARNED, functools.partial(responses, 1)),
    HARDER: Objective("English prose (the harder case: it needs the same inputs)", "prose", LEARNED, prose),
}


@dataclasses.dataclass(frozen=True)
class Small:
    """A :class:`model.Model`; ``path`` is its file."""

    settings: Settings
    path: Path = SHIPPED
    device: str = "cpu"
    name: str = "cpu"

    objectives = OBJECTIVES
    texts = property(lambda self: {LEARNED: functools.partial(endless, small_texts.pretraining_batch), OWN: self.own})
    steps = property(lambda self: self.settings.steps)
    batch = property(lambda self: self.settings.batch)
    capability_batch = property(lambda self: self.settings.capability_batch)
    dpo_beta = property(lambda self: self.settings.dpo_beta)

    @functools.cache  # noqa: B019  of a few models, as long as the process lives
    def base(self) -> TinyLM:
        return load_base(self.path, self.device)[0]

    def own(self, size: int, generator: Generator) -> Iterator[Tensor]:
        return endless(functools.partial(_some, self._written(generator.initial_seed())), size, generator)

    @functools.cache  # noqa: B019
    @torch.no_grad()
    def _written(self, seed: int) -> Tensor:
        start = torch.full((WRITTEN, 1), ord("\n"), device=self.device)
        written, _ = sample(self.base(), start, start.new_ones(WRITTEN), CONTEXT, seed)
        return torch.cat([start, written], 1)

    def lr(self, objective: str) -> float:
        return getattr(self.settings, f"lr_{objective}")

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens[:, :-1])

    def measure(self, model: nn.Module, objective: str, variety: bool) -> dict[str, Any]:
        return measure(model, self.settings, variety)

    def facts(self) -> Any:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path.exists() else "missing"
        return [dataclasses.asdict(self.settings), digest]


def small(scale: str, device: str, work: Path, report: Callable) -> Small:
    """The model of a scale, its base model trained first where it is not shipped and not in ``work`` already."""
    settings = SCALES[scale]
    sizes = "-".join(map(str, settings.identity.values()))
    path = SHIPPED if settings.base_shipped else work / f"base-{sizes}-{device}.safetensors"
    if not settings.base_shipped and not path.exists():
        retrain(path, settings, device, report)
    load_base(path, **settings.identity)  # refuses one of other sizes
    return Small(settings, path, device, scale)


def retrain(path: Path, settings: Settings, device: str, report: Callable[[str, bool], None]) -> None:
    """Train the base model and write it to ``path``, with how it was made and its held-out losses in the header.

    Args:
        report: takes a line on how far it is, and whether it is worth keeping.
    Raises:
        FloatingPointError: naming the step whose loss is not finite.
    """
    torch.manual_seed(SEED)
    model = TinyLM(settings.width, settings.layers, settings.heads).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def progress(step: int, value: Tensor) -> None:
        if step % 50 == 0 or step == settings.base_steps:
            if not value.isfinite():
                raise FloatingPointError(f"base model: the loss of step {step} is {value.item()}")
            line = f"base model: step {step}/{settings.base_steps}, {value.item():.2f} nats per byte"
            report(line, step % 250 == 0)

    def draw() -> Tensor:
        return small_texts.pretraining_batch(settings.base_batch, generator).to(device)

    pretrain(model, draw, settings.base_steps, progress)
    facts = {
        **settings.identity,
        "seed": SEED,
        "held_out": held_out(model),
        "command": f"make demo ARGS='--retrain {settings.base_steps}'",
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    save_base(path, model, facts)


def held_out(model: TinyLM) -> dict[str, float]:
    """Nats per byte on the held-out part of each text that the model learned from."""
    return {name: evaluate(model, text) for name, text in small_texts.corpora(held_out=True).items()}
