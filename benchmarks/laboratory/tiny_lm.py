"""A byte-level language model small enough to train on two cores, and its file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laboratory.texts import CODE_FILES, CODE_HELD_OUT, source

CONTEXT = 128


def encode(text: str) -> Tensor:
    """[bytes] int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


class Text(NamedTuple):
    train: Tensor
    held_out: Tensor


def code() -> Text:
    """Python source, about 2 MB, with whole files held out."""
    return Text(encode(source(CODE_FILES)), encode(source(CODE_HELD_OUT)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.attend(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(y.transpose(1, 2).reshape(b, t, c))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class TinyLM(nn.Module):
    """A GPT on bytes: 0.26 million parameters with width 96 and two layers."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.02 / math.sqrt(2 * layers) if name.endswith(("merge.weight", "contract.weight")) else 0.02
                nn.init.normal_(p, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.norm(self.blocks(x)) @ self.token.weight.T


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized (Jordan, "Muon: an optimizer for hidden layers", 2024).

    ``torch.optim.Muon`` does the same with bfloat16 products, which take a second a step on a CPU without AVX-512.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(average, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``: five Newton-Schulz steps.

    They bring singular values to between 0.7 and 1.2, unless these are hundreds of times smaller than the norm.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide is matrix else x.T


def pretrain(model: TinyLM, draw: Callable[[], Tensor], steps: int, report: Callable[[int, Tensor], None]) -> None:
    """Muon on the matrices of the blocks, AdamW on the rest.

    Args:
        draw: gives the windows of a step.
        report: called after each step with its number, from 1, and its loss.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 20) * (1 - i / steps)) for o in optimizers
    ]
    for i in range(steps):
        for o in optimizers:
            o.zero_grad()
        value = loss(model, draw())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedules, strict=True):
            o.step()
            s.step()
        report(i + 1, value.detach())


def windows(text: Tensor, count: int) -> Tensor:
    """[count, CONTEXT + 1], evenly spaced over the text."""
    return text[torch.linspace(0, len(text) - CONTEXT - 1, count).long()[:, None] + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, count: int = 96) -> float:
    """Held-out nats per byte on the same windows every time."""
    return loss(model, windows(text, count).to(next(model.parameters()).device)).item()


def save_base(path: Path, model: TinyLM, facts: dict[str, Any]) -> None:
    """Write the weights, with ``facts`` in the header: width, layers and heads of the model, and how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"facts": json.dumps(facts)})


def load_base(path: Path, device: str = "cpu", **expected: int) -> tuple[TinyLM, dict[str, Any]]:
    """The model that ``save_base`` wrote, and its facts.

    Args:
        expected: facts that the caller relies on, as ``width=96``.
    Raises:
        ValueError: the file is missing, is no base model, or its facts are others. The message says what to do.
    """
    remedy = f"restore it with git, or train it again: make demo ARGS='--retrain --base {path}'"
    if not path.exists():
        raise ValueError(f"{path} is missing; {remedy}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        model = TinyLM(*(facts[k] for k in ("width", "layers", "heads"))).to(device)
        model.load_state_dict(safetensors.torch.load_file(path, device))
    except (safetensors.SafetensorError, KeyError, RuntimeError) as e:
        raise ValueError(f"{path} is not a base model ({type(e).__name__}: {e}); {remedy}") from None
    for name, value in expected.items():
        if facts.get(name) != value:
            raise ValueError(f"{path}: {name} is {facts.get(name)}, expected {value}; {remedy}")
    return model, facts
