"""One run: a copy of the model, taught under a cure, and what it is then."""

import contextlib
import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradproj
from real_model import data, model
from real_model.settings import BATCH, TASKS, Cure


def loss(of: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats a token, of all tokens or of those that are labels."""
    logits = of(input_ids=tokens).logits[:, :-1]
    targets = (tokens if labels is None else labels)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=data.IGNORED)


@torch.no_grad()
def measure(of: nn.Module, task: str) -> dict[str, float]:
    """``target``: loss on held-out answers; ``code``, ``English``: on held-out text."""
    of.eval()
    rows = [data.examples(task, held_out=True)]
    rows += [(t, t) for t in (data.text(kind, held_out=True) for kind in ("code", "English"))]
    found = []
    for tokens, labels in rows:
        parts = [(loss(of, t, l).item(), len(t)) for t, l in zip(tokens.split(8), labels.split(8), strict=True)]
        found.append(sum(value * n for value, n in parts) / len(tokens))
    return dict(zip(("target", "code", "English"), found, strict=True))


def run(task: str, cure: Cure, seed: int) -> dict[str, Any]:
    """Teach, then measure.

    Returns:
        ``measured``: see :func:`measure`. ``cost``: CPU seconds of a step and of the capture, capability passes, and the bytes that
        are held beside the model: bases and targets.
    Raises:
        FloatingPointError: a loss is not finite, naming the step.
    """
    pupil = model.fresh(cure.lora, cure.rest == "train", seed)
    examples, answers = data.examples(task, held_out=False)
    capability = data.text(TASKS[task].capability, held_out=False)
    order, anchors = (torch.Generator().manual_seed(s + seed) for s in (1000, 2000))
    passes = 0

    def capability_loss() -> Tensor:
        nonlocal passes
        passes += 1
        tokens = capability[torch.randint(len(capability), (BATCH,), generator=anchors)]
        return loss(pupil, tokens, sampled(tokens, anchors) if cure.labels == "sampled" else None)

    start = time.process_time()
    protection, held = None, 0
    groups: Any = [p for p in pupil.parameters() if p.requires_grad]
    if cure.share:
        protection = gradproj.NullSpace(
            pupil, share=cure.share, max_rank=cure.max_rank, space=cure.space, rest=cure.rest
        )
        one = same_share_in_each_layer() if cure.allocation == "each" else contextlib.nullcontext()
        with one, protection.capture():
            for _ in range(cure.batches):
                capability_loss().backward()
        if cure.damping:
            groups = protection.param_groups(cure.lr, cure.damping)
    captured = time.process_time() - start
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=cure.lr, weight_decay=0.0)
    if protection is not None and cure.pinned:
        optimizer = gradproj.ProjectedOptimizer(optimizer, protection)
        held = held_bytes(protection)

    start = time.process_time()
    pupil.train()
    for step in range(cure.steps):
        which = torch.randint(len(examples), (BATCH,), generator=order)
        value = loss(pupil, examples[which], answers[which])
        if cure.kl:
            value = value + cure.kl * divergence(pupil, examples[which], answers[which])
        if cure.gamma:
            value = value + cure.gamma * capability_loss()
        if not value.isfinite():
            raise FloatingPointError(f"{task}, {cure.name}, seed {seed}: the loss of step {step} is {value.item()}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    step_s = (time.process_time() - start) / cure.steps
    cost = {"step_s": step_s, "capture_s": captured if cure.share else 0.0, "passes": passes, "held_bytes": held}
    return {"measured": measure(pupil, task), "cost": cost}


def divergence(pupil: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """KL(pupil || base) in nats, mean over the answers' tokens."""
    with torch.no_grad():
        before = model.base()(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    now = pupil(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    kl = (now.exp() * (now - before)).sum(-1)
    return kl[labels[:, 1:] != data.IGNORED].mean()


@torch.no_grad()
def sampled(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from what the base model predicts, in place of the text's own."""
    predicted = model.base()(input_ids=tokens).logits[:, :-1].softmax(-1)
    drawn = torch.multinomial(predicted.flatten(0, 1), 1, generator=generator)
    return torch.cat([tokens[:, :1], drawn.view(len(tokens), -1)], 1)


def same_share_in_each_layer() -> contextlib.AbstractContextManager:
    """The alternative to the package's one allocation over all layers, which has no setting of its own."""

    def ranks(layers, share):
        return [min(len(layer.values), int(share * layer.inputs)) for layer in layers]

    return mock.patch.object(gradproj.allocation, "ranks", ranks)


def held_bytes(protection: gradproj.NullSpace) -> int:
    """Eigenvectors that layers share count once."""
    tensors = [t for basis in protection.bases.values() for t in (basis.vectors, basis.target) if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
