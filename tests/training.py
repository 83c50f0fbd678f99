"""A small model, and the two ways to protect its training."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

import gradproj

# How the protection gets onto an optimizer: what is stepped afterwards, and what has protect(), project() and last.
WRAPPINGS: dict[str, Callable] = {
    "wrapped": lambda optimizer, protection: (gradproj.ProjectedOptimizer(optimizer, protection),) * 2,
    "attached": lambda optimizer, protection: (optimizer, gradproj.attach(optimizer, protection)),
}


def model_and_batches(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return model, [torch.randn(5, 4) for _ in range(12)]


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def protect(model, projector, x, scale=1.0):
    with projector.protect():
        (scale * loss(model, x, 1.0)).backward()


def stored(projector) -> list[dict[Tensor, Tensor]]:
    """The directions, oldest first: parameter -> its gradient."""
    projector = getattr(projector, "projector", projector)
    parameters = projector.parameters()
    rows = projector._directions.rows(parameters)
    return [{p: t for p, t in zip(parameters, row, strict=True) if t is not None} for row in rows]


def number_protected(projector) -> int:
    return len(getattr(projector, "projector", projector))


def train(model, optimizer: Optimizer, projector, batches, scheduler=None, each_step=lambda: None):
    """One fresh direction a step, unless ``projector`` is None. Returns the parameters."""
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        if projector is not None:
            protect(model, projector, x)
        optimizer.zero_grad()
        loss(model, y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        each_step()
    return parameters(model)


def train_by_hand(model, optimizer: Optimizer, batches):
    """The same with the plain optimizer, each closure's gradients projected explicitly."""
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        direction = torch.autograd.grad(loss(model, x, 1.0), list(model.parameters()))
        optimizer.zero_grad()
        loss(model, y).backward()
        gradproj.project_([p.grad for p in model.parameters()], direction)
        optimizer.step()
    return parameters(model)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b, rtol=0.0, atol=0.0):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def twins(seed=0):
    """Two equal models and their batches."""
    model, batches = model_and_batches(seed)
    return model, copy.deepcopy(model), batches
