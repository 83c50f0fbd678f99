"""A capture proves that it heard every use of a parameter: what was heard takes it detached, and makes no gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradproj import NullSpace, ProjectedOptimizer
from test_nullspace import network
from test_promise import step_away


class Penalty(nn.Module):
    """The loss depends on a weight otherwise than by a product with an input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x))) + 0.01 * self.layer.weight.square().sum()


class PartlyPenalty(nn.Module):
    """Of a parameter of two slices, one is multiplied by, and the other is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Parameter(torch.randn(2, 12, 3))

    def forward(self, x):
        return x @ self.both[0] + 0.1 * self.both[1].sum()


@pytest.mark.parametrize(("model", "name"), [(Penalty(), "layer"), (PartlyPenalty(), "both")], ids=["whole", "slice"])
def test_a_use_that_was_not_heard_is_found_in_the_first_batch(model, name, few):
    protection, batches = NullSpace(model), []
    with pytest.raises(RuntimeError, match=rf"the gradient of {name}\b.*used elsewise.*modules="), protection.capture():
        for _ in range(2):
            batches.append(model(few).square().sum().backward())
    assert len(batches) == 0 and len(protection) == 0


def test_a_capture_makes_no_gradients_of_what_it_hears(few):
    """A third of a pass's work, and N bytes."""
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 3))
    with NullSpace(model, share=0.9).capture():
        model(few).square().sum().backward()
        with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["1.weight", "1.bias"]


def test_the_way_out_that_the_message_names(few):
    model = Penalty()
    without = NullSpace(model, modules=lambda n, _: n != "layer", share=0.9)
    with pytest.warns(RuntimeWarning, match="layer.weight"), without.capture():
        model(few).square().sum().backward()
    before = model(few).detach()
    step_away(model, ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), without))
    assert (model(few) - before).abs().max() < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_proof_under_gradient_checkpointing(reentrant, few):
    """Calls are made twice."""
    few = few.requires_grad_()
    model = network()
    with NullSpace(model, share=0.9).capture():
        checkpoint(model, few, use_reentrant=reentrant).square().sum().backward()
    model = Penalty()
    with pytest.raises(RuntimeError, match=r"layer\.weight.*used elsewise"), NullSpace(model).capture():
        checkpoint(model, few, use_reentrant=reentrant).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_proof_is_exact(dtype):
    """It finds a use of a thousandth of a layer's own, in every dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype)
    x = torch.randn(2000, 64).to(dtype)

    def run(extra):
        protection = NullSpace(model, share=0.5)
        with protection.capture():
            y = model(x)
            ((y.float() - y.float().mean()) ** 2).mean().mul(64.0).backward(retain_graph=True)
            if extra:
                (model(x).float().mean() + extra * model[2].weight.float().sin().mean()).backward()

    run(0.0)
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        run(1e-3)
