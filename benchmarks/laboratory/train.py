"""One run: a copy of the base model, taught under a cure. The same loop for every model, objective and cure."""

import contextlib
import copy
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradproj
from laboratory import formulas
from laboratory.cures import Cure
from laboratory.kfac import Kfac
from laboratory.model import Batch, Model, Objective


class Cost(NamedTuple):
    """What a run spent.

    Attributes:
        step_ms: mean time of a step, all capability batches included. On the CPU it is CPU time, which does not grow
            with what else the machine does; elsewhere wall time.
        capability_backwards: backward passes over capability batches in the whole run.
        extra_bytes: held from step to step beyond model, gradient and optimizer state: the base model, protected
            directions, a null space's bases and targets, K-FAC's and OSF's bases, EWC's importance and copy of the
            parameters.
        capture_s: the part of the time that was spent before the first step, in seconds.
    """

    step_ms: float
    capability_backwards: int
    extra_bytes: int
    capture_s: float


class Capability:
    """Batches of a text that the base model knows, the same for every cure of a seed; counts their backward passes."""

    def __init__(self, model: Model, pupil: nn.Module, text: str, seed: int):
        self.model, self.pupil, self.backwards = model, pupil, 0
        self.generator = torch.Generator().manual_seed(2000 + seed)
        self.batches = model.texts[text](model.capability_batch, self.generator)

    def loss(self, labels: str = "text") -> Tensor:
        return self.losses(1, labels)[0]

    def losses(self, parts: int, labels: str = "text") -> list[Tensor]:
        """Of one batch, in so many parts: a backward pass each."""
        self.backwards += parts
        tokens = next(self.batches).to(self.model.device)
        targets = tokens[:, 1:] if labels == "text" else self._sampled(tokens)
        return [
            F.cross_entropy(self.model.logits(self.pupil, t).flatten(0, 1), y.flatten())
            for t, y in zip(tokens.chunk(parts), targets.chunk(parts), strict=True)
        ]

    def divergence(self) -> Tensor:
        """KL(base model || pupil) on one batch: on text that the base model wrote, of its whole distribution."""
        self.backwards += 1
        tokens = next(self.batches).to(self.model.device)
        with torch.no_grad():
            base_logits = self.model.logits(self.model.base(), tokens)
        return formulas.kl_penalty(base_logits, self.model.logits(self.pupil, tokens))

    @torch.no_grad()
    def _sampled(self, tokens: Tensor) -> Tensor:
        predicted = self.model.logits(self.model.base(), tokens).softmax(-1).flatten(0, 1)
        return torch.multinomial(predicted.cpu(), 1, generator=self.generator).view(len(tokens), -1).to(tokens)

    def backward(self, batches: int, labels: str = "text") -> None:
        for _ in range(batches):
            self.loss(labels).backward()


class Ewc:
    """Diagonal importance of every parameter, from one backward pass a sequence, and where the parameters were."""

    def __init__(self, capability: Capability, batches: int):
        self.parameters = list(capability.pupil.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.importance = [torch.zeros_like(p) for p in self.parameters]
        for _ in range(batches):
            for value in capability.losses(capability.model.capability_batch):
                for total, grad in zip(self.importance, torch.autograd.grad(value, self.parameters), strict=True):
                    total += grad.square()
        # In units of the mean, so that a lambda means the same for every model.
        mean = sum(t.sum() for t in self.importance) / sum(t.numel() for t in self.importance)
        for total in self.importance:
            total /= mean

    def penalty(self, strength: float) -> Tensor:
        return formulas.ewc_penalty(self.parameters, self.start, self.importance, strength)


def train(
    model: Model,
    objective: str,
    cure: Cure,
    seed: int,
    watch: Callable[[int, nn.Module], object] = lambda *_: None,
) -> tuple[nn.Module, Cost]:
    """Every cure sees the same batches of a seed, and the same capability batches at the same steps.

    Args:
        watch: called with the number of steps made, after each, and the model; its time does not count.
    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    task, base, lr = model.objectives[objective], model.base(), cure.lr * model.lr(objective)
    text = cure.text or task.capability
    capability = Capability(model, base, text, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    # Texts are read now, and what a first optimizer imports (a second of CPU time), so that no step pays for it.
    task.batch(1, torch.Generator()), next(model.texts[text](1, torch.Generator().manual_seed(2000 + seed)))
    torch.optim.AdamW([nn.Parameter(torch.zeros(()))])
    if cure.lora or cure.osf:
        import peft  # noqa: F401

    clock = time.process_time if model.device == "cpu" else time.perf_counter
    start = clock()
    pupil = fresh(base, cure, seed, capability)
    kfac = ewc = None
    if cure.kfac:
        freeze(pupil)
        kfac = Kfac(pupil, cure.kfac, cure.elastic)
        with kfac.capture():
            capability.backward(cure.fill)
        pupil.zero_grad()
    if cure.ewc:
        ewc = Ewc(capability, cure.fill)
    optimizer, protection = optimizer_of(pupil, cure, lr, capability)
    spent = captured = clock() - start
    steps = round(cure.steps * model.steps)
    for step in range(steps):
        batch = task.batch(model.batch, generator)
        start = clock()
        if cure.method is not None and step % cure.every == 0:
            for _ in range(cure.fill if step == 0 else 1):
                with optimizer.protect():
                    capability.loss().backward()
        value = loss(model, pupil, task, cure.kl, batch)
        if cure.gamma and step % cure.every == 0:
            value = formulas.ptx_loss(value, capability.loss(), cure.gamma)
        if cure.distil and step % cure.every == 0:
            value = value + cure.distil * capability.divergence()
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
            kfac.scale()
        spent += clock() - start
        watch(step + 1, pupil)
    held = (
        held_bytes(pupil, protection) + (kfac.nbytes() if kfac else 0) + (2 * nbytes(pupil.parameters()) if ewc else 0)
    )
    held += nbytes(base.parameters()) if task.preferences or cure.kl or cure.distil else 0
    held += nbytes(pupil.buffers()) if cure.osf else 0
    return pupil, Cost(1e3 * spent / steps, capability.backwards, held, captured)


def fresh(base: nn.Module, cure: Cure, seed: int, capability: Capability | None = None) -> nn.Module:
    """A copy of which those parameters train that the cure says. ``capability``'s passes are then its own."""
    pupil = copy.deepcopy(base)
    if cure.lora or cure.osf:
        pupil = adapted(pupil, cure, seed, capability)
    elif cure.frozen:
        freeze(pupil)
    if capability is not None:
        capability.pupil = pupil
    return pupil


def adapted(pupil: nn.Module, cure: Cure, seed: int, capability: Capability | None) -> nn.Module:
    """With adapters of PEFT's on all linear layers but the head. Some run the capability through the model first."""
    import peft

    torch.manual_seed(seed)
    if cure.osf:
        return peft.get_peft_model(pupil, peft.OSFConfig(effective_rank=cure.osf, target_modules="all-linear"))
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    if not cure.init:
        return peft.get_peft_model(pupil, peft.LoraConfig(**settings))
    assert capability is not None
    capability.pupil = pupil
    linear = adaptable(pupil)

    @torch.no_grad()
    def run_model() -> None:
        for _ in range(cure.fill):
            capability.losses(capability.model.capability_batch)  # CorDA's hooks take one sequence at a time

    if cure.init == "null":
        moments = second_moments(linear, run_model)
        wrapped = peft.get_peft_model(pupil, peft.LoraConfig(**settings))
        start_in_null_space(wrapped, moments)
        return wrapped
    from peft.tuners.lora.corda import preprocess_corda

    settings["target_modules"] = list(linear)
    corda = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    config = peft.LoraConfig(**settings, init_lora_weights="corda", corda_config=corda)
    preprocess_corda(pupil, config, run_model)
    return peft.get_peft_model(pupil, config)


def adaptable(model: Any) -> dict[str, nn.Linear]:
    """The layers that PEFT calls all-linear, by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def second_moments(linear: dict[str, nn.Linear], run_model: Callable[[], None]) -> dict[str, Tensor]:
    """[inputs, inputs] of each layer: the sum of x x^T over what ``run_model`` feeds it."""
    moments = {name: m.weight.new_zeros(m.in_features, m.in_features) for name, m in linear.items()}

    def add(name: str, _, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        moments[name].addmm_(x.T, x)

    hooks = [m.register_forward_pre_hook(functools.partial(add, name)) for name, m in linear.items()]
    run_model()
    for hook in hooks:
        hook.remove()
    return moments


@torch.no_grad()
def start_in_null_space(model: Any, moments: dict[str, Tensor]) -> None:
    """LoRA-Null's initialisation (Tang et al. 2025): of each weight, its part on the inputs that are seen least.

    With U the eigenvectors of the rank smallest eigenvalues of the inputs' second moment, the adapter begins as
    W U U^T, split evenly by its singular values, and the frozen weight as what is left. Both adapters train.
    """
    for name, moment in moments.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        weight, scale = layer.base_layer.weight, layer.scaling["default"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        least = torch.linalg.eigh(moment).eigenvectors[:, : len(down)]
        left, values, right = torch.linalg.svd(weight @ least, full_matrices=False)
        root = (values / scale).sqrt()
        up.copy_(left * root)
        down.copy_(root[:, None] * (right @ least.T))
        weight -= scale * up @ down


def freeze(model: nn.Module) -> None:
    """Only linear layers train; not a head whose weights are an embedding's too."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in linear - embeddings)


def optimizer_of(pupil: nn.Module, cure: Cure, lr: float, capability: Capability) -> tuple[Any, Any]:
    """The optimizer, with its protection if there is one that acts at a step."""

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*late_apart(pupil, groups, cure.late)], lr=lr, weight_decay=0.0, fused=True)

    if cure.share:
        rest = "train" if cure.frozen is False else "hold"
        protection = gradproj.NullSpace(pupil, share=cure.share, max_rank=cure.max_rank, space=cure.space, rest=rest)
        one = same_share_in_each_layer() if cure.allocation == "each" else contextlib.nullcontext()
        with one, protection.capture():
            capability.backward(cure.fill, cure.labels)
        inner = adamw(protection.param_groups(lr, cure.damping))
        return (gradproj.ProjectedOptimizer(inner, protection), protection) if cure.pinned else (inner, None)
    inner = adamw([{"params": [p for p in pupil.parameters() if p.requires_grad], "lr": lr}])
    if cure.method is None:
        return inner, None
    directions = gradproj.Directions(cure.directions, cure.method)
    return gradproj.ProjectedOptimizer(inner, directions), directions


def late_apart(pupil: nn.Module, groups: list[dict[str, Any]], factor: float) -> Iterator[dict[str, Any]]:
    """The groups, those of the last third of the layers at another rate."""
    layer = {id(p): int(at[1]) for n, p in pupil.named_parameters() if (at := re.search(r"\blayers\.(\d+)\.", n))}
    first = 2 * (1 + max(layer.values(), default=0)) / 3
    for group in groups:
        for is_late, rate in ((False, group["lr"]), (True, factor * group["lr"])):
            mine = [p for p in group["params"] if (layer.get(id(p), 0) >= first) == is_late]
            if mine:
                yield {**group, "params": mine, "lr": rate}


def same_share_in_each_layer() -> contextlib.AbstractContextManager:
    """The alternative to the package's one allocation over all layers, which has no setting of its own."""

    def ranks(layers, share):
        return [min(len(layer.values), int(share * layer.inputs)) for layer in layers]

    return mock.patch("gradproj.nullspace.allocation.ranks", ranks)


def loss(model: Model, pupil: nn.Module, task: Objective, kl: float, batch: Batch) -> Tensor:
    """Of what is taught, with the divergence from the base model."""
    sides, tokens = len(batch.tokens), batch.tokens.flatten(0, 1).to(model.device)
    mask = None if batch.mask is None else batch.mask.flatten(0, 1).to(model.device)
    targets, logits = tokens[:, 1:], model.logits(pupil, tokens)
    logprob = formulas.sequence_logprob(logits, targets, mask).view(sides, -1)
    if task.preferences or kl:
        with torch.no_grad():
            base_logits = model.logits(model.base(), tokens)
    if task.preferences:
        base_logprob = formulas.sequence_logprob(base_logits, targets, mask).view(sides, -1)
        value = formulas.dpo_loss(*logprob, *base_logprob, beta=model.dpo_beta)
    else:
        value = _nats_a_token(logprob, mask, targets)
    if task.likelihood:
        value = value + task.likelihood * _nats_a_token(logprob[0], mask, targets)
    return value + kl * formulas.kl_penalty(logits, base_logits, mask) if kl else value


def _nats_a_token(logprob: Tensor, mask: Tensor | None, targets: Tensor) -> Tensor:
    """Of the first rows of a batch, as many as ``logprob`` has."""
    rows = logprob.numel()
    return -logprob.sum() / (targets[:rows].numel() if mask is None else mask[:rows].sum())


def held_bytes(pupil: nn.Module, protection: gradproj.Directions | gradproj.NullSpace | None) -> int:
    if protection is None:
        return 0
    if isinstance(protection, gradproj.Directions):
        return nbytes(p for p in pupil.parameters() if p.requires_grad) * len(protection)
    # Layers with the same inputs share eigenvectors: each storage counts once.
    tensors = [t for basis in protection.bases.values() for t in (basis.vectors, basis.target) if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def nbytes(parameters) -> int:
    return sum(p.nbytes for p in parameters)


def interpolated(base: nn.Module, tuned: dict[str, Tensor], alpha: float) -> nn.Module:
    model = copy.deepcopy(base)
    model.load_state_dict(formulas.interpolate(base.state_dict(), tuned, alpha))
    return model
