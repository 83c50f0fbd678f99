"""Mistakes that users make with a NullSpace: the result is right, or an error says what to do."""

import warnings

import pytest
import torch
from torch import nn

import gradproj


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def few():
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(5))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def captured(model, few):
    protection = gradproj.NullSpace(model, share=0.9)
    with protection.capture():
        model(few).square().sum().backward()
    return protection


def step(model, opt):
    model(torch.ones(4, 6)).sum().backward()
    opt.step()
    opt.zero_grad()


def test_step_before_protect_says_so_once():
    """It was a plain step without a word, and so was the whole training."""
    model = network()
    opt = gradproj.ProjectedOptimizer(sgd(model), gradproj.NullSpace(model))
    with pytest.warns(RuntimeWarning, match="before anything was captured: a plain step"):
        step(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt)
        other = gradproj.ProjectedOptimizer(sgd(model), gradproj.NullSpace(model))
        other.unprotect()
        step(model, other)  # asked for


def test_a_model_that_is_not_the_optimizers():
    """Nothing was protected, and nothing said."""
    model, copy = network(), network()
    with pytest.raises(ValueError, match="of another model than the optimizer's.*from the same model"):
        gradproj.ProjectedOptimizer(sgd(model), gradproj.NullSpace(copy))
    step(model, gradproj.ProjectedOptimizer(sgd(model), gradproj.Directions()))  # nothing is left of the attempt


@pytest.mark.parametrize("wrap_first", [True, False])
def test_scheduler_made_before_or_after_wrapping(few, wrap_first):
    model = network().eval()
    before, inner = model(few).detach(), sgd(model)
    opt = gradproj.ProjectedOptimizer(inner, captured(model, few)) if wrap_first else None
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    opt = opt or gradproj.ProjectedOptimizer(inner, captured(model, few))
    step(model, opt)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(model(few), before, rtol=0, atol=1e-5)


def test_stepping_the_inner_optimizer_is_protected_too(few):
    model = network().eval()
    before, inner = model(few).detach(), sgd(model)
    opt = gradproj.ProjectedOptimizer(inner, captured(model, few))
    step(model, inner)
    torch.testing.assert_close(model(few), before, rtol=0, atol=1e-5)
    assert opt.last is not None


def test_parameters_frozen_after_the_capture(few):
    """A frozen layer stays as it is, by itself. The pin moved a frozen weight to make up for its bias."""
    model = network().eval()
    opt = gradproj.ProjectedOptimizer(sgd(model), captured(model, few))
    model[0].requires_grad_(False)
    kept, before = model[0].weight.clone(), model(few).detach()
    step(model, opt)
    assert torch.equal(model[0].weight, kept)
    torch.testing.assert_close(model(few), before, rtol=0, atol=1e-5)
    for half in ("weight", "bias"):
        model[0].requires_grad_(True)
        getattr(model[0], half).requires_grad_(False)
        kept = [p.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="layer 0 does not train what it trained.*capture again"):
            step(model, opt)
        assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))


def test_captured_in_evaluation_mode_trained_with_dropout(few):
    """The capture sees what the model sees then: without dropout, what it computes without."""
    model = network().eval()
    opt = gradproj.ProjectedOptimizer(sgd(model), captured(model, few))
    before = model(few).detach()
    model.train()
    for _ in range(3):
        step(model, opt)
    torch.testing.assert_close(model.eval()(few), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["unscale_ forgotten", "step past the scaler"])
def test_wrong_order_under_gradscaler(few, order):
    """A pin acts on weights: it holds whatever the gradients' scale. Stepping past the scaler is told by torch."""
    model = network().eval()
    before = model(few).detach()
    opt = gradproj.ProjectedOptimizer(sgd(model), captured(model, few))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(4, 6)).sum()).backward()
    if order == "unscale_ forgotten":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the scaled gradients: too small a step
        scaler.step(opt)
        scaler.update()
        torch.testing.assert_close(model(few), before, rtol=0, atol=1e-5)
    else:
        opt.step()
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.update()


def test_protect_without_backward_or_without_gradients(few):
    model = network()
    opt = gradproj.ProjectedOptimizer(sgd(model), gradproj.NullSpace(model))
    with pytest.raises(RuntimeError, match="none of the optimizer's 4 parameters received"), opt.protect():
        model(few)
    with pytest.raises(RuntimeError, match="does not require grad"), opt.protect(), torch.no_grad():
        model(few).sum().backward()
