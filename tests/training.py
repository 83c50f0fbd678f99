"""A small model, the two ways to protect its training, and the same by hand."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

import gradproj
from gradproj.protection import Protection


def _built(optimizer, settings, named) -> tuple[Optimizer, Protection]:
    if isinstance(optimizer, torch.nn.Module):
        optimizer = torch.optim.SGD(optimizer.parameters(), lr=0.1)
    return optimizer, named["protection"] if named.keys() == {"protection"} else gradproj.Directions(*settings, **named)


def projected(optimizer, *settings, **named) -> gradproj.ProjectedOptimizer:
    """``optimizer``, or SGD with the parameters of a model, under ``Directions(*settings, **named)`` or
    ``protection=``."""
    return gradproj.ProjectedOptimizer(*_built(optimizer, settings, named))


def _attached(optimizer, *settings, **named):
    optimizer, protection = _built(optimizer, settings, named)
    return optimizer, gradproj.attach(optimizer, protection)


# Called as projected() is; each returns what is stepped, and what has protect(), project() and last.
WRAPPINGS: dict[str, Callable] = {
    "wrapped": lambda *settings, **named: (projected(*settings, **named),) * 2,
    "attached": _attached,
}


def adamw(model, lr=0.01, **settings) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, **settings)


wrapped = WRAPPINGS["wrapped"]


def model_and_batches(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).to(dtype)
    return model, [torch.randn(5, 4).to(dtype) for _ in range(12)]


def twins(seed=0):
    """Two equal models and their batches."""
    model, batches = model_and_batches(seed)
    return model, copy.deepcopy(model), batches


def protecting(wrapping, *settings, blocks=1, optimizer=lambda model: model, **named):
    """A small model, its batches, what is stepped, and what has protected the gradients of the first ``blocks``
    batches."""
    model, x = model_and_batches()
    opt, protected = wrapping(optimizer(model), *settings, **named)
    for batch in x[:blocks]:
        protect(model, protected, batch)
    return model, x, opt, protected


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def protect(model, protected, x, scale=1.0):
    with protected.protect():
        (scale * loss(model, x, 1.0)).backward()


def direction(model, x) -> tuple[Tensor, ...]:
    """What protect() takes."""
    return torch.autograd.grad(loss(model, x, 1.0), list(model.parameters()))


def stored(protected) -> list[dict[Tensor, Tensor]]:
    """The directions, oldest first: parameter -> its gradient."""
    protection = protected.protection
    parameters = protection.parameters()
    return [{p: t for p, t in zip(parameters, row, strict=True) if t is not None} for row in protection.rows()]


def closure(model, optimizer: Optimizer, x, target=0.0, then=lambda: None):
    """What makes the gradients of one batch."""

    def run():
        optimizer.zero_grad()
        value = loss(model, x, target)
        value.backward()
        then()
        return value

    return run


def descend(model, optimizer: Optimizer, x, target=0.0, then=lambda: None) -> None:
    """Gradients of one batch, and the step."""
    closure(model, optimizer, x, target, then)()
    optimizer.step()


def train(model, optimizer: Optimizer, protected, batches, scheduler=None, each_step=lambda: None):
    """One fresh direction a step, unless ``protected`` is None. Returns the parameters."""
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        if protected is not None:
            protect(model, protected, x)
        descend(model, optimizer, y)
        if scheduler is not None:
            scheduler.step()
        each_step()
    return parameters(model)


def train_by_hand(model, optimizer: Optimizer, batches):
    """The same with the plain optimizer, its gradients projected explicitly."""
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        d = direction(model, x)
        descend(model, optimizer, y, then=lambda d=d: project_by_hand(model, d))
    return parameters(model)


def project_by_hand(model, *directions, **settings):
    return gradproj.project_([p.grad for p in model.parameters()], *directions, **settings)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_same(a, b, rtol=0.0, atol=0.0):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
