"""The promise as a property: whatever the model, what was captured stays; also through a further capture and a resume."""

import copy
from collections.abc import Callable

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradproj import NullSpace, ProjectedOptimizer

D, T = 24, 4  # width, tokens


def chunks(w: Tensor, x: Tensor) -> Tensor:
    a, b, c = w.chunk(3)
    return F.linear(x, a).tanh() * F.linear(x, b) + F.linear(x, c)


def attention(w: Tensor, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*F.linear(x, w).chunk(3, -1))


def recurrent(w: Tensor, x: Tensor) -> Tensor:
    states = [torch.zeros_like(x[:, 0])]
    for t in range(T):
        states.append(torch.tanh(states[-1] @ w[0] + x[:, t] @ w[1]))
    return torch.stack(states[1:], 1)


STEPS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((D, D), lambda w, x: F.linear(x, w)),
    "on two inputs": ((D, D), lambda w, x: F.linear(x, w) + F.linear(x.roll(1, 1), w)),
    "after itself": ((D, D), lambda w, x: F.linear(F.linear(x, w).tanh(), w)),
    "right": ((D, D), lambda w, x: x @ w),
    "left": ((D, D), lambda w, x: (w @ x.mT).mT),
    "einsum": ((D, D), lambda w, x: torch.einsum("btd,de->bte", x, w)),
    "addmm": ((D, D), lambda w, x: torch.addmm(x.new_zeros(D), x.flatten(0, 1), w).view_as(x)),
    "chunks": ((3 * D, D), chunks),
    "attention": ((3 * D, D), attention),
    "bmm": ((4, D, D), lambda w, x: torch.bmm(x.flatten(0, 1).expand(4, -1, -1), w).sum(0).view_as(x)),
    "slices": ((T, D, D), lambda w, x: torch.stack([F.linear(x[:, t], w[t]) for t in range(T)], 1)),
    "recurrent": ((2, D, D), recurrent),
    "convolution": ((D, D, 3), lambda w, x: F.conv1d(x.mT, w, padding=1).mT),
    "groups": ((D, D // 4, 1), lambda w, x: F.conv1d(x.mT, w, groups=4).mT),
}


class Drawn(nn.Module):
    """Steps with a residual. Some are checkpointed, some multiply their input by the weight of an earlier one too."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(STEPS[name][0]) / 5) for name, _, _ in steps)
        self.shared, self.out = nn.Parameter(torch.randn(D, D) / 5), nn.Linear(D, 8)

    def step(self, i: int, x: Tensor) -> Tensor:
        name, also, _ = self.steps[i]
        y = STEPS[name][1](self.weights[i], x)
        return y + F.linear(x, self.shared) if also else y

    def forward(self, x: Tensor) -> Tensor:
        for i, (_, _, checkpointed) in enumerate(self.steps):
            x = x + torch.tanh(checkpoint(self.step, i, x, use_reentrant=False) if checkpointed else self.step(i, x))
        return self.out(x)


def learn(model: nn.Module, optimizer) -> None:
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(4, T, D)) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.tuples(st.sampled_from([*STEPS]), st.booleans(), st.booleans()), min_size=2, max_size=6))
def test_what_was_captured_stays(steps):
    torch.manual_seed(len(steps))
    model, few = Drawn(steps), torch.randn(2, 1, T, D).unbind()
    free = copy.deepcopy(model)
    before = [free(x).detach() for x in few]
    learn(free, torch.optim.AdamW(free.parameters(), lr=9e-3))
    moved = max((free(x) - y).abs().max().item() for x, y in zip(few, before, strict=True))

    def protecting(model: nn.Module) -> ProjectedOptimizer:
        return ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), NullSpace(model, share=0.99))

    optimizer, captured = protecting(model), []
    for x in few:
        with optimizer.protect():
            model(x).square().mean().backward()
        captured.append(model(x).detach())
        learn(model, optimizer)
        again = copy.deepcopy(model)
        resumed = protecting(again)
        resumed.load_state_dict(optimizer.state_dict())
        model, optimizer = again, resumed
    learn(model, optimizer)
    assert max((model(x) - y).abs().max().item() for x, y in zip(few, captured, strict=True)) < 2e-3 * moved
