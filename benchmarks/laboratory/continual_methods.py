"""The ways to learn tasks one after the other that `make continual` compares, each as three hooks around a step."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradproj
from laboratory.continual_tasks import Mlp, Sequences, Task, tasks
from laboratory.cures import Cure
from laboratory.train import held_bytes, nbytes


class Plain:
    """Stochastic gradient descent, which is GPM's optimizer, and nothing else. The base of the others.

    Attributes:
        number: of the task that is learned.
        kept: tensors that are held from task to task, without what a protection holds.
    """

    kept: Sequence[Tensor] = ()
    protection: gradproj.Directions | gradproj.NullSpace | None = None

    def __init__(self, model: Mlp, cure: Cure, of: Sequences, seed: int):
        self.model, self.cure, self.of = model, cure, of
        self.number = 0
        self.optimizer: Any = torch.optim.SGD(model.parameters(), lr=cure.lr)
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(images, labels, self.number)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self, task: Task) -> None:
        """What is kept of a task that has been learned."""

    def ranks(self) -> dict[str, int]:
        """Of the bases, by layer."""
        return {}


class Ewc(Plain):
    """A pull towards the weights after the last task, by the sum of all tasks' diagonal importance.

    Source: Kirkpatrick et al. 2017; one penalty for all tasks as Huszar 2018 has it.
    """

    def finish(self, task: Task) -> None:
        parameters = [*self.model.parameters()]
        if not self.number:
            self.importance = [torch.zeros_like(p) for p in parameters]
        for image, label in zip(task.images[: self.of.kept], task.labels, strict=False):
            self.model.loss(image[None], label[None], self.number).backward()
            for total, p in zip(self.importance, parameters, strict=True):
                if p.grad is not None:
                    total.addcmul_(p.grad, p.grad, value=1 / self.of.kept)
            self.model.zero_grad()
        self.start = [p.detach().clone() for p in parameters]
        self.kept = [*self.importance, *self.start]

    def step(self) -> None:
        if self.number:
            with torch.no_grad():  # the gradient of formulas.ewc_penalty
                for p, start, importance in zip(self.model.parameters(), self.start, self.importance, strict=True):
                    if p.grad is not None:
                        p.grad.addcmul_(importance, p - start, value=self.cure.ewc)
        super().step()


class Replay(Plain):
    """Experience replay: each step also learns a batch of an earlier task, drawn from the memory."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.memory: list[tuple[Tensor, Tensor]] = []

    def finish(self, task: Task) -> None:
        part = self.of.memory // (self.number + 1)
        self.memory = [(x[:part].clone(), y[:part].clone()) for x, y in [*self.memory, task[:2]]]
        self.kept = [tensor for pair in self.memory for tensor in pair]

    def replayed(self) -> Tensor:
        number = int(torch.randint(len(self.memory), (), generator=self.generator))
        images, labels = self.memory[number]
        rows = torch.randint(len(labels), (self.of.batch,), generator=self.generator)
        return self.model.loss(images[rows], labels[rows], number)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        value = super().loss(images, labels)
        return value + self.cure.gamma * self.replayed() if self.memory else value


class FreshDirection(Replay):
    """A-GEM: the gradient loses what points against that of a batch from the memory, made anew in each step."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.protection = gradproj.Directions(1, "conflict")
        self.optimizer = gradproj.ProjectedOptimizer(self.optimizer, self.protection)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.memory:
            with self.optimizer.protect():
                self.replayed().backward()
        return Plain.loss(self, images, labels)


class KeptDirections(Plain):
    """What changes the outputs of finished tasks is projected off, one direction for each.

    OGD (Farajtabar et al. 2020) keeps 200 for each, of one image; here it is the mean over images of the gradient of
    the true class's logit.
    """

    def finish(self, task: Task) -> None:
        if not self.number:
            self.protection = gradproj.Directions(10, self.cure.method)
            self.optimizer = gradproj.ProjectedOptimizer(self.optimizer, self.protection)
        with self.optimizer.protect():
            logits = self.model(task.images[: self.of.kept], self.number)
            logits.gather(1, task.labels[: self.of.kept, None]).mean().backward()


class Gpm(Plain):
    """Gradient projection memory, by the paper's rule.

    Of the inputs that a layer had for some images of a finished task, the part outside its basis U is decomposed, and
    the leading left singular vectors join U until all of U holds the threshold's part of the inputs' squared norm
    (equations 5, 8, 9). Every gradient G of a later task becomes G - (G U) U^T (equation 6). A bias is a weight whose
    input is 1. The thresholds are the paper's of permuted MNIST, 0.95 of the pixels and 0.99 of what follows, or as
    far from 1 in the same proportion. A head that one task has for itself is not projected.

    Source: Saha et al. 2021.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        linear = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        self.layers = {n: layer for n, layer in linear.items() if len(self.model.heads) == 1 or "hidden" in n}
        self.bases = {n: torch.zeros(layer.in_features + 1, 0) for n, layer in self.layers.items()}
        self.inputs: dict[nn.Module, Tensor] = {}
        self.grads: dict[nn.Module, Tensor] = {}
        for layer in self.layers.values():
            layer.register_forward_hook(self._heard)

    def _heard(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            self.inputs[layer] = torch.cat([inputs[0].detach(), inputs[0].new_ones(len(inputs[0]), 1)], 1)
            output.register_hook(lambda grad: self.grads.__setitem__(layer, grad))

    def step(self) -> None:
        if self.number:
            for name, layer in self.layers.items():
                basis = self.bases[name]
                # G = y^T x, so that (G U) U^T = y^T (x U) U^T: ten rows instead of 256.
                x = self.inputs[layer]
                free = self.grads[layer].T @ (x - (x @ basis) @ basis.T)
                layer.weight.grad, layer.bias.grad = free[:, :-1].contiguous(), free[:, -1].contiguous()
        super().step()

    def finish(self, task: Task) -> None:
        self.model(task.images[: self.of.kept], self.number)
        for n, (name, layer) in enumerate(self.layers.items()):
            lost = (1 - self.cure.share) / (5 if n else 1)
            self.bases[name] = grown(self.bases[name], self.inputs[layer].T, 1 - lost)
        self.kept = [*self.bases.values()]

    def ranks(self) -> dict[str, int]:
        return {name: basis.shape[1] for name, basis in self.bases.items()}


def grown(basis: Tensor, inputs: Tensor, threshold: float) -> Tensor:
    """``basis`` [i, r] and the columns that it needs to hold ``threshold`` of the squared norm of inputs [i, n]."""
    rest = inputs - basis @ (basis.T @ inputs)
    vectors, values, _ = torch.linalg.svd(rest, full_matrices=False)
    total, missing = inputs.square().sum(), rest.square().sum()
    held = (total - missing + torch.cat([values.new_zeros(1), values.square().cumsum(0)])) / total
    count = int((held < threshold).sum())
    return torch.cat([basis, vectors[:, :count]], 1)[:, : len(basis)]


class Pinned(Plain):
    """gradproj.NullSpace, with a further capture after every task, on images of that task.

    ``share`` is for all tasks together, or grows by as much with every task.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.protection = gradproj.NullSpace(self.model, share=self.cure.share, every=self.of.every)

    def finish(self, task: Task) -> None:
        if self.cure.allocation == "a task":
            self.protection.share = min(0.99, self.cure.share * (self.number + 1))
        with self.protection.capture():
            for images, labels in zip(
                task.images[: self.of.kept].split(100), task.labels[: self.of.kept].split(100), strict=True
            ):
                self.loss(images, labels).backward()
        if self.number:
            self.optimizer.detach()
        groups = self.protection.param_groups(self.cure.lr, self.cure.damping)
        self.optimizer = gradproj.ProjectedOptimizer(torch.optim.SGD(groups), self.protection)

    def ranks(self) -> dict[str, int]:
        return {name: basis.rank for name, basis in self.protection.bases.items()}


METHODS: dict[str, type[Plain]] = {
    "plain": Plain,
    "EWC": Ewc,
    "replay": Replay,
    "GPM": Gpm,
    "Directions, fresh (A-GEM)": FreshDirection,
    "Directions, kept (OGD)": KeptDirections,
    "NullSpace, fixed share": Pinned,
    "NullSpace, share a task": Pinned,
}


def learn(of: Sequences, kind: str, cure: Cure, seed: int) -> dict[str, Any]:
    """One run: accuracies [task learned last][task] and their summary, after each task the ranks and the part of all
    weights that they fix, and what it cost. CPU time does not grow with what else the machine does."""
    torch.manual_seed(seed)
    model = Mlp(of.width, kind)
    method, known = METHODS[cure.family](model, cure, of, seed), []
    rows = {name: layer.out_features for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    accuracy, ranks, spent, finishing = [], [], 0.0, 0.0
    for method.number, task in enumerate(tasks(of, kind, seed)):
        start = time.process_time()
        for images, labels in zip(task.images.split(of.batch), task.labels.split(of.batch), strict=True):
            method.loss(images, labels).backward()
            method.step()
        learned = time.process_time()
        method.finish(task)
        finishing += time.process_time() - learned
        spent += time.process_time() - start
        known.append(task)
        ranks.append(method.ranks())
        accuracy.append([model.accuracy(t, n) for n, t in enumerate(known)])
    fixed = [
        sum(rows[n] * r for n, r in of_task.items()) / sum(p.numel() for p in model.parameters()) for of_task in ranks
    ]
    steps = sum(-(-len(t.labels) // of.batch) for t in known)
    cost = {
        "step_ms": 1e3 * spent / steps,
        "extra_bytes": nbytes(method.kept) + held_bytes(model, method.protection),
        "capture_s": finishing,
    }
    return {"measured": {**summary(accuracy), "accuracy": accuracy, "ranks": ranks, "fixed": fixed}, "cost": cost}


def summary(accuracy: list[list[float]]) -> dict[str, float]:
    """Of accuracies ``[i][j]`` on task j after task i has been learned.

    ``acc``: mean over tasks at the end; ``bwt``, backward transfer: mean over all but the last of what was gained on a
    task after it was learned (Lopez-Paz & Ranzato 2017, equations 2 and 3). ``learned``: mean over tasks right after
    each was learned (Riemer et al. 2019): what plasticity allows.
    """
    last, at_once = accuracy[-1], [row[-1] for row in accuracy]
    gained = [after - before for after, before in zip(last[:-1], at_once, strict=False)]
    return {
        "acc": sum(last) / len(last),
        "bwt": sum(gained) / len(gained),
        "learned": sum(at_once) / len(at_once),
    }
