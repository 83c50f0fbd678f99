"""What no layer of a null space covers stands still, whatever writes to it, or is refused in words."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gradproj import NullSpace, ProjectedOptimizer, attach
from test_nullspace import captured
from test_promise import protecting, step_away


class MuonOfItsAuthors(torch.optim.Optimizer):
    """Gives parameters without a gradient one of zeros, and decays them."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05, "weight_decay": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(p.grad, alpha=-group["lr"])


class WithNorm(nn.Module):
    def __init__(self, tokens=9):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.layer = nn.Embedding(tokens, 12), nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, tokens):
        return self.layer(self.norm(self.embed(tokens)))


def embed_and_step(model, opt, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        (model(torch.arange(9)) - 1.0).square().mean().backward()
        opt.step()


def test_an_optimizer_that_writes_to_what_is_held(wrapping):
    """Small parameters are put back, and so are the caller's gradients."""
    model, tokens = WithNorm(), torch.arange(4)
    protection = captured(model, tokens, share=0.9)
    before = model(tokens).detach()
    opt, _ = wrapping(MuonOfItsAuthors(model.parameters()), protection=protection)
    embed_and_step(model, opt)
    assert (model(tokens) - before).abs().max() < 1e-4
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_held_and_large_is_refused_when_it_was_written():
    model = WithNorm(tokens=30_000)  # 1.4 MB
    protection = captured(model, torch.arange(4), share=0.9)
    opt = ProjectedOptimizer(MuonOfItsAuthors(model.parameters()), protection)
    with pytest.raises(RuntimeError, match=r"MuonOfItsAuthors.*embed.weight.*param_groups\(lr\)"):
        embed_and_step(model, opt)
    opt.detach()
    groups = protection.param_groups(lr=0.05, damping=0.0)  # the way out that the message names
    before = model(torch.arange(4)).detach()
    embed_and_step(model, ProjectedOptimizer(MuonOfItsAuthors(groups), protection))
    assert (model(torch.arange(4)) - before).abs().max() < 1e-4


def test_what_is_held_may_be_loaded_between_steps():
    """What was loaded is what is held from then on."""
    model = WithNorm()
    opt = ProjectedOptimizer(MuonOfItsAuthors(model.parameters()), captured(model, torch.arange(4), share=0.9))
    embed_and_step(model, opt)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    embed_and_step(model, opt)
    assert (model.norm.weight == 3.0).all()


def test_batch_norm_in_training_mode_is_refused_and_said(few):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
    protection = NullSpace(model, share=0.9)
    with pytest.raises(RuntimeError, match=r"running statistics of 1 .*eval\(\)"), protection.capture():
        model(few).square().sum().backward()
    model.eval()
    protection, opt, before = protecting(model, few)
    step_away(model, opt)
    assert (model(few) - before).abs().max() < 1e-4
    model.train()
    with pytest.warns(RuntimeWarning, match=r"running statistics of 1 .*eval\(\)"):
        step_away(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_away(model, opt)  # said once
    still = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12, track_running_stats=False))
    captured(still, few, share=0.9)


def test_held_gradients_do_not_pile_up_under_lbfgs():
    model, tokens = WithNorm(), torch.arange(4)
    protection = captured(model, tokens, share=0.9)
    opt = ProjectedOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=5), protection)
    before, most, calls = model(tokens).detach(), [], []

    def closure():
        opt.zero_grad()
        value = (model(torch.arange(9)) - 1.0).square().mean()
        value.backward()
        calls.append(value)
        most.append(len(protection._uncovered._grads))
        return value

    opt.step(closure)
    assert len(calls) > 2 and max(most) <= 3 and not len(protection._uncovered._grads)
    assert (model(tokens) - before).abs().max() < 1e-4 and all(p.grad is not None for p in model.parameters())


class Rectified(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.second(self.first(x).relu())


def inputs(tokens=4):
    return torch.randn(tokens, 12, generator=torch.Generator().manual_seed(1))


def walk(opt, value, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        value().backward()
        opt.step()


class Routed(Rectified):
    """The router's bias is a buffer, which the load of the experts moves: as in models without an auxiliary loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(12))

    def forward(self, x):
        return self.second(self.first(x).relu() * (self.first(x) + self.bias > 0))


def test_a_buffer_that_moves_is_told_of(wrapping):
    """What a model makes of captured inputs moved by it without a word."""
    model = Routed()
    protection = captured(model, inputs(), share=0.9)
    opt, _ = wrapping(torch.optim.AdamW(model.parameters(), lr=0.05), protection=protection)

    def value():
        return (model(torch.randn(5, 12)) - 1.0).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(opt, value)
        model.load_state_dict(model.state_dict())  # the same values
        walk(opt, value)
    model.bias += 1.0
    with pytest.warns(RuntimeWarning, match="bias changed since the capture began"):
        walk(opt, value, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        walk(opt, value)


@pytest.mark.filterwarnings("ignore:NullSpace. no product")
def test_a_buffer_that_moves_in_every_forward_pass_is_told_of(wrapping):
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(12, 12)), nn.Linear(12, 12))

    def steps():
        opt, protected = wrapping(
            torch.optim.AdamW(model.parameters()), protection=captured(model, inputs(), share=0.9)
        )
        walk(opt, lambda: model(torch.randn(5, 12)).square().mean(), steps=2)
        protected.detach()

    with pytest.warns(RuntimeWarning, match=r"0.weight_u, 0.weight_v changed since the capture began.*eval\(\)"):
        steps()
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed")
        steps()


@pytest.mark.parametrize("first", [True, False], ids=["the protected one steps first", "the other steps first"])
@pytest.mark.parametrize("rest", ["hold", "train"])
def test_a_second_optimizer_that_is_not_protected_is_told_of(wrapping, rest, first):
    """Muon steps the matrices and AdamW the rest: protected by the one, biases moved by the other without a word."""
    model = Rectified()
    protection = captured(model, inputs(), share=0.9, rest=rest)
    biases = [p for p in model.parameters() if p.ndim == 1]
    opt, protected = wrapping(torch.optim.SGD([p for p in model.parameters() if p.ndim == 2]), protection=protection)
    other = torch.optim.AdamW(biases)

    def walk_both(steps):
        for _ in range(steps):
            (model(torch.randn(5, 12)) - 1.0).square().mean().backward()
            for optimizer in (opt, other) if first else (other, opt):
                optimizer.step()
                optimizer.zero_grad()

    with pytest.warns(RuntimeWarning, match=r"first.bias, second.bias changed since the last step.*attach\(\["):
        walk_both(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        walk_both(2)
    protected.detach()
    before = model(inputs()).detach()
    attach([opt.optimizer if hasattr(opt, "optimizer") else opt, other], captured(model, inputs(), share=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk_both(3)
    assert (model(inputs()) - before).abs().max() < 1e-4


def test_what_no_optimizer_steps_is_told_of_only_if_it_moves(wrapping):
    """Pinning writes to what is covered, also by hand, and also to what no optimizer has."""
    model = Rectified()
    protection = captured(model, inputs(), share=0.9)
    opt, _ = wrapping(torch.optim.AdamW(model.second.parameters(), lr=0.05), protection=protection)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            walk(opt, lambda: (model(torch.randn(5, 12)) - 1.0).square().mean(), steps=1)
            protection.pin()
        model.load_state_dict({name: 2.0 * value for name, value in model.state_dict().items()})
        protection.clear()
        with protection.capture():  # of the weights as they are now
            model(inputs()).square().sum().backward()
        walk(opt, lambda: (model(torch.randn(5, 12)) - 1.0).square().mean())


@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, prune.identity])
def test_a_weight_that_is_computed_since_the_capture_is_refused(wrapping, computed):
    model = Rectified()
    opt, _ = wrapping(torch.optim.AdamW(model.parameters(), lr=0.05), protection=captured(model, inputs(), share=0.9))
    computed(model.first, "weight")
    model(torch.randn(5, 12)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="first.weight is no parameter of the model any more"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("rest", ["hold", "train"])
def test_what_an_optimizer_steps_of_another_module_learns(wrapping, rest):
    """A critic beside the model stood still without a word."""
    model, critic = Rectified(), nn.Linear(12, 1)
    protection = captured(model, inputs(), share=0.9, rest=rest)
    before, weight = model(inputs()).detach(), critic.weight.detach().clone()
    optimizer = torch.optim.AdamW([*model.parameters(), *critic.parameters()], lr=0.05)
    opt, _ = wrapping(optimizer, protection=protection)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(opt, lambda: (critic(model(torch.randn(5, 12))) - 1.0).square().mean())
    assert (critic.weight - weight).abs().max() > 0.01
    assert (model(inputs()) - before).abs().max() < 1e-4


@pytest.mark.parametrize("rest", ["hold", "train"])
def test_what_trains_only_since_the_capture_is_told_of(wrapping, rest):
    """A layer that was unfrozen after the capture stood still without a word."""
    model = Rectified()
    model.first.requires_grad_(False)
    protection = captured(model, inputs(), share=0.9, rest=rest)
    opt, protected = wrapping(torch.optim.AdamW(model.second.parameters(), lr=0.05), protection=protection)

    def value():
        return (model(torch.randn(5, 12)) - 1.0).square().mean()

    walk(opt, value)
    model.first.requires_grad_(True)
    opt.add_param_group({"params": list(model.first.parameters())})
    then = {"hold": "they stand still", "train": "nothing of them is protected"}[rest]
    with pytest.warns(RuntimeWarning, match=f"first.weight, first.bias did not train yet .*{then}: capture again"):
        walk(opt, value, steps=1)
    with protected.protect():
        model(inputs()).sum().backward()
    before, weight = model(inputs()).detach(), model.first.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(opt, value)
    assert (model.first.weight - weight).abs().max() > 0.01
    assert (model(inputs()) - before).abs().max() < 1e-4


def test_a_file_without_a_layer_that_trains(tmp_path):
    """As a capture says of what it holds, so does a file that is loaded."""
    model = Rectified()
    model.first.requires_grad_(False)
    captured(model, inputs(), share=0.9).save(tmp_path / "capability.safetensors")
    with pytest.warns(RuntimeWarning, match=r"48% of the weights .* stand still: first.weight \(144\)"):
        NullSpace.load(tmp_path / "capability.safetensors", Rectified())
