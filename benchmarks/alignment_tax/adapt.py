"""One run: a copy of the base model, aligned under a cure."""

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradproj
from alignment_tax import data, formulas
from alignment_tax.kfac import Kfac
from alignment_tax.settings import OBJECTIVES, Cure, Settings
from tiny_lm import TinyLM, loss


class Cost(NamedTuple):
    """What a run spent.

    Attributes:
        step_ms: mean time of a step, all capability batches included. On the CPU it is CPU time, which does not grow with what
            else the machine does; elsewhere wall time.
        capability_backwards: backward passes over capability batches in the whole run.
        extra_bytes: held from step to step beyond model, gradient and optimizer state: the base model, protected
            directions, a null space's bases and targets, K-FAC's bases,
            EWC's importance and copy of the parameters.
    """

    step_ms: float
    capability_backwards: int
    extra_bytes: int


class Capability:
    """Batches of what the base model learned from, the same for every cure of a seed, and how many backward passes they took."""

    def __init__(self, model: TinyLM, size: int, seed: int):
        self.model, self.size, self.backwards = model, size, 0
        self.generator = torch.Generator().manual_seed(2000 + seed)

    def loss(self) -> Tensor:
        return self.losses(1)[0]

    def losses(self, parts: int) -> list[Tensor]:
        """Of one batch, in so many parts: a backward pass each."""
        self.backwards += parts
        windows = data.pretraining_batch(self.size, self.generator).to(next(self.model.parameters()).device)
        return [loss(self.model, part) for part in windows.chunk(parts)]

    def backward(self, batches: int) -> None:
        for _ in range(batches):
            self.loss().backward()


class Ewc:
    """Diagonal importance of every parameter, from one backward pass a window, and where the parameters were."""

    def __init__(self, capability: Capability, batches: int):
        self.parameters = list(capability.model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.importance = [torch.zeros_like(p) for p in self.parameters]
        for _ in range(batches):
            for value in capability.losses(capability.size):
                for total, grad in zip(self.importance, torch.autograd.grad(value, self.parameters), strict=True):
                    total += grad.square()
        # In units of the mean, so that a lambda means the same for every model.
        mean = sum(t.sum() for t in self.importance) / sum(t.numel() for t in self.importance)
        for total in self.importance:
            total /= mean

    def penalty(self, strength: float) -> Tensor:
        return formulas.ewc_penalty(self.parameters, self.start, self.importance, strength)


def align(base: TinyLM, objective: str, cure: Cure, seed: int, settings: Settings) -> tuple[TinyLM, Cost]:
    """Align a copy of ``base``. Every cure sees the same batches of a seed, and the same capability batches at the same steps.

    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    device = next(base.parameters()).device
    model = copy.deepcopy(base)
    capability = Capability(model, settings.capability_batch, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    data.corpora(held_out=False), data.prose(held_out=False)  # read now, so that no step pays for it
    lr = cure.lr * getattr(settings, OBJECTIVES[objective].lr)

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    kfac = ewc = None
    if cure.kfac:
        kfac = Kfac(model, cure.kfac)
        with kfac.capture():
            capability.backward(cure.fill)
        model.zero_grad()
    if cure.frozen or cure.kfac:
        for p in _not_linear(model):
            p.requires_grad_(False)
    if cure.ewc:
        ewc = Ewc(capability, cure.fill)
    optimizer, protection = _optimizer(model, cure, lr, capability)
    spent, steps = clock() - start, round(cure.steps * settings.steps)
    for step in range(steps):
        batch = _batch(objective, settings.batch, generator, device)
        start = clock()
        if cure.method is not None and step % cure.every == 0:
            for _ in range(cure.fill if step == 0 else 1):
                with optimizer.protect():
                    capability.loss().backward()
        value = _alignment_loss(model, base, objective, cure.kl, batch, settings)
        if cure.gamma and step % cure.every == 0:
            value = formulas.ptx_loss(value, capability.loss(), cure.gamma)
        if ewc:
            value = value + ewc.penalty(cure.ewc)
        if not value.isfinite():
            raise FloatingPointError(
                f"{objective}, {cure.name}, seed {seed}: the loss of step {step} is {value.item()}"
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if kfac:
            kfac.scale_update()
        spent += clock() - start
    held = _held(model, protection) + (kfac.nbytes() if kfac else 0) + (2 * _bytes(model) if ewc else 0)
    held += _bytes(base) if objective == "dpo" or cure.kl else 0
    return model, Cost(1e3 * spent / steps, capability.backwards, held)


def _optimizer(model: TinyLM, cure: Cure, lr: float, capability: Capability) -> tuple[Any, Any]:
    """The optimizer, with its protection if there is one that acts at a step."""

    def adamw(parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    if cure.share:
        protection = gradproj.NullSpace(model, share=cure.share, **({"space": cure.space} if cure.space else {}))
        with protection.capture():
            capability.backward(cure.fill)
        inner = adamw(protection.param_groups(lr, cure.damping))
        return (gradproj.ProjectedOptimizer(inner, protection), protection) if cure.pinned else (inner, None)
    inner = adamw(p for p in model.parameters() if p.requires_grad)
    if cure.method is None:
        return inner, None
    directions = gradproj.Directions(cure.directions, cure.method)
    return gradproj.ProjectedOptimizer(inner, directions), directions


def _not_linear(model: nn.Module) -> list[nn.Parameter]:
    inside = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


class Batch(NamedTuple):
    """tokens: [sides, B, T], the chosen side first; mask: [sides, B, T - 1] or None, where every byte counts."""

    tokens: Tensor
    mask: Tensor | None


def _batch(objective: str, size: int, generator: torch.Generator, device: torch.device) -> Batch:
    if objective == "prose":
        return Batch(data.windows(data.prose(held_out=False), size, generator)[None].to(device), None)
    pairs = data.pairs(held_out=False)
    which = torch.randint(pairs.tokens.shape[1], (size,), generator=generator)
    sides = 2 if objective == "dpo" else 1
    return Batch(pairs.tokens[:sides, which].to(device), pairs.mask[:sides, which].to(device))


def _alignment_loss(model: TinyLM, base: TinyLM, objective: str, kl: float, batch: Batch, settings: Settings) -> Tensor:
    sides, tokens = len(batch.tokens), batch.tokens.flatten(0, 1)
    mask = None if batch.mask is None else batch.mask.flatten(0, 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    logprob = formulas.sequence_logprob(logits, targets, mask).view(sides, -1)
    if objective == "dpo" or kl:
        with torch.no_grad():
            base_logits = base(inputs)
    if objective == "dpo":
        base_logprob = formulas.sequence_logprob(base_logits, targets, mask).view(sides, -1)
        value = formulas.dpo_loss(*logprob, *base_logprob, beta=settings.dpo_beta)
    else:
        value = -logprob.sum() / (targets.numel() if mask is None else mask.sum())
    return value + kl * formulas.kl_penalty(logits, base_logits, mask) if kl else value


def _held(model: TinyLM, protection: gradproj.Directions | gradproj.NullSpace | None) -> int:
    if protection is None:
        return 0
    if isinstance(protection, gradproj.Directions):
        return _bytes(model) * len(protection)
    # Layers with the same inputs share eigenvectors: each storage counts once.
    tensors = [t for basis in protection.bases.values() for t in (basis.vectors, basis.target) if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _bytes(model: TinyLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def interpolated(base: TinyLM, tuned: dict[str, Any], alpha: float) -> TinyLM:
    model = copy.deepcopy(base)
    model.load_state_dict(formulas.interpolate(base.state_dict(), tuned, alpha))
    return model
