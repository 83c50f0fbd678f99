"""One run: a copy of the base model, aligned under a cure."""

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradproj
from alignment_tax import data
from alignment_tax.settings import Cure, Settings
from gradproj import tax
from tiny_lm import TinyLM, loss


class Cost(NamedTuple):
    """What a run spent.

    Attributes:
        step_ms: mean wall time of a step, all capability batches included.
        capability_backwards: backward passes over capability batches in the whole run.
        extra_bytes: held from step to step beyond model, gradient and optimizer state: the base model, protected
            directions, the copy of the parameters that update space needs.
    """

    step_ms: float
    capability_backwards: int
    extra_bytes: int


def align(base: TinyLM, objective: str, cure: Cure, seed: int, settings: Settings) -> tuple[TinyLM, Cost]:
    """Align a copy of ``base``. Every cure sees the same requests of a seed, and the same capability batches at the same steps.

    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    device = next(base.parameters()).device
    model = copy.deepcopy(base)
    requests, anchors = (torch.Generator().manual_seed(s + seed) for s in (1000, 2000))
    pairs = data.pairs(held_out=False)
    lr = {"dpo": settings.lr_dpo, "sft": settings.lr_sft}[objective]
    optimizer = gradproj.ProjectedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
        gradproj.Directions(cure.directions, cure.method or "conflict", space=cure.space),
    )

    def capability_loss() -> Tensor:
        nonlocal backwards
        backwards += 1
        return loss(model, data.pretraining_batch(settings.capability_batch, anchors).to(device))

    times, backwards = [], 0
    for step in range(settings.steps):
        which = torch.randint(pairs.tokens.shape[1], (settings.batch,), generator=requests)
        tokens, mask = pairs.tokens[:, which].to(device), pairs.mask[:, which].to(device)
        start = time.perf_counter()
        if cure.method is not None and step % cure.every == 0:
            for _ in range(cure.fill if step == 0 else 1):
                with optimizer.protect():
                    capability_loss().backward()
        value = _alignment_loss(model, base, objective, cure.kl, tokens, mask, settings)
        if cure.gamma and step % cure.every == 0:
            value = tax.ptx_loss(value, capability_loss(), cure.gamma)
        if not value.isfinite():
            raise FloatingPointError(
                f"{objective}, {cure.name}, seed {seed}: the loss of step {step} is {value.item()}"
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    held = _bytes(model) * (len(optimizer.protection) + (cure.space == "update"))
    held += _bytes(base) if objective == "dpo" or cure.kl else 0
    return model, Cost(1e3 * sum(times) / len(times), backwards, held)


def _alignment_loss(
    model: TinyLM, base: TinyLM, objective: str, kl: float, tokens: Tensor, mask: Tensor, settings: Settings
) -> Tensor:
    """tokens: [2, B, T], chosen and rejected; mask: [2, B, T - 1]."""
    if objective == "sft":
        tokens, mask = tokens[:1], mask[:1]
    sides = len(tokens)
    tokens, mask = tokens.flatten(0, 1), mask.flatten(0, 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    logprob = tax.sequence_logprob(logits, targets, mask).view(sides, -1)
    if objective == "dpo" or kl:
        with torch.no_grad():
            base_logits = base(inputs)
    if objective == "dpo":
        base_logprob = tax.sequence_logprob(base_logits, targets, mask).view(sides, -1)
        value = tax.dpo_loss(*logprob, *base_logprob, beta=settings.dpo_beta)
    else:
        value = -logprob.sum() / mask.sum()
    return value + kl * tax.kl_penalty(logits, base_logits, mask) if kl else value


def _bytes(model: TinyLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def interpolated(base: TinyLM, tuned: dict[str, Any], alpha: float) -> TinyLM:
    model = copy.deepcopy(base)
    model.load_state_dict(tax.interpolate(base.state_dict(), tuned, alpha))
    return model
