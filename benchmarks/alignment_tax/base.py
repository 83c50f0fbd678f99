"""The base model: trained once, shipped under ``benchmarks/models``, and where both `make demo` and `make tax` start."""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from alignment_tax import data
from alignment_tax.settings import Settings
from tiny_lm import TinyLM, evaluate, load_base, pretrain, save_base

SHIPPED = Path(__file__).parent.parent / "models" / "base.safetensors"
SEED = 0

Report = Callable[[str, bool], None]  # a line on how far it is, and whether it is worth keeping


def train(settings: Settings, device: str, report: Report) -> TinyLM:
    """
    Raises:
        FloatingPointError: naming the step whose loss is not finite.
    """
    torch.manual_seed(SEED)
    model = TinyLM(settings.width, settings.layers, settings.heads).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def progress(step: int, value: torch.Tensor) -> None:
        if step % 50 == 0 or step == settings.base_steps:
            if not value.isfinite():
                raise FloatingPointError(f"base model: the loss of step {step} is {value.item()}")
            line = f"base model: step {step}/{settings.base_steps}, {value.item():.2f} nats per byte"
            report(line, step % 250 == 0)

    def draw() -> torch.Tensor:
        return data.pretraining_batch(settings.base_batch, generator).to(device)

    pretrain(model, draw, settings.base_steps, progress)
    return model


def retrain(path: Path, settings: Settings, device: str, report: Report) -> None:
    """Train the base model and write it to ``path``, with how it was made and its held-out losses in the header."""
    model = train(settings, device, report)
    facts = {
        **_identity(settings),
        "seed": SEED,
        "held_out": held_out(model),
        "command": f"python benchmarks/demo.py --retrain {settings.base_steps}",
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    save_base(path, model, facts)


def held_out(model: TinyLM) -> dict[str, float]:
    """Nats per byte on the held-out part of each text that the model learned from."""
    return {name: evaluate(model, text) for name, text in data.corpora(held_out=True).items()}


def shipped(settings: Settings, device: str) -> TinyLM:
    """The shipped model, made at these sizes.

    Raises:
        ValueError: it is missing or was made at others.
    """
    return load_base(SHIPPED, device, **_identity(settings))[0]


def digest() -> str:
    """Of the shipped model: runs that started from another one are not mixed with those of this one."""
    return hashlib.sha256(SHIPPED.read_bytes()).hexdigest() if SHIPPED.exists() else "missing"


def _identity(settings: Settings) -> dict[str, int]:
    return {
        "width": settings.width,
        "layers": settings.layers,
        "heads": settings.heads,
        "steps": settings.base_steps,
        "batch": settings.base_batch,
    }
