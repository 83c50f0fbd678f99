"""Infinities and NaN on the way: GradScaler, which skips steps, and directions that are not finite."""

import pytest
import torch

from gradproj.directions import directions
from training import (
    assert_same,
    descend,
    gradients,
    loss,
    model_and_batches,
    parameters,
    protect,
    protecting,
    stored,
    train_by_hand,
    twins,
)

INNER = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),  # takes grad_scale and found_inf, and unscales itself
}


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("inner", INNER)
def test_grad_scaler(inner, unscale, wrapping):
    """A scaler marks the object that it is given: the mark must reach the optimizer that unscales."""
    model, twin, batches = twins()
    opt, protected = wrapping(INNER[inner](model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        with protected.protect():
            scaler.scale(loss(model, x, 1.0)).backward()
        opt.zero_grad()
        scaler.scale(loss(model, y)).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    by_hand = train_by_hand(twin, INNER[inner](twin.parameters()), batches)
    assert_same(parameters(model), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("inner", INNER)
def test_grad_scaler_skips_an_inf_in_the_gradient(inner, unscale, wrapping):
    """The step is skipped, the directions stay, and the next step is projected. A fused optimizer is called all the
    same and finds the inf itself: the update is zero, and must stay it."""
    model, x = model_and_batches()
    opt, protected = wrapping(INNER[inner](model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    protect(model, protected, x[0])
    before = parameters(model)
    scaler.scale(loss(model, x[1])).backward()
    model[0].weight.grad[0, 0] = torch.inf
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert_same(before, parameters(model))
    assert scaler.get_scale() == 4.0
    opt.zero_grad()
    scaler.scale(loss(model, x[2])).backward()
    scaler.step(opt)
    assert protected.last.applied and protected.last.finite
    assert all(p.isfinite().all() and not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("at", [None, 0, 1], ids=["alone", "oldest", "between"])
def test_a_direction_that_is_not_finite_is_dropped(at, inner, bad, wrapping):
    """An overflow in the capability loss would make every Gram non-finite, and so leave every later step unprotected:
    the step is the one without that direction."""
    model, twin, x = twins()
    opt, protected = wrapping(INNER[inner](model.parameters()), 3)
    other, reference = wrapping(INNER[inner](twin.parameters()), 3)
    for i in range(1 if at is None else 3):
        protect(model, protected, x[i], scale=bad if i == (at or 0) else 1.0)
        if i != (at or 0):
            protect(twin, reference, x[i])
    loss(model, x[4]).backward()
    loss(twin, x[4]).backward()
    with pytest.warns(
        RuntimeWarning, match=rf"1 of \d directions \(number {at or 0}, .*was dropped: look at the capability loss"
    ):
        opt.step()
    other.step()
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)
    assert len(stored(protected)) == len(stored(reference)) == (0 if at is None else 2)
    if at is not None:
        assert torch.allclose(protected.last.weights, reference.last.weights)


@pytest.mark.filterwarnings("error")
def test_a_gradient_that_is_not_finite_drops_no_direction(wrapping):
    model, x, opt, protected = protecting(wrapping, 2, blocks=2)
    (loss(model, x[2]) * torch.inf).backward()
    protected.project()
    assert not protected.last.finite and not protected.last.applied
    descend(model, opt, x[3])
    assert protected.last.finite and protected.last.gram.shape == (3, 3)


@pytest.mark.parametrize("by", ["protect", "step"])
def test_where_reading_synchronises_it_is_dropped_one_call_later(by, monkeypatch, wrapping):
    """As on a GPU: the projection itself reads nothing and leaves the gradient untouched."""
    monkeypatch.setattr(directions, "_reads_for_free", lambda t: False)
    model, x, opt, protected = protecting(wrapping, 2, blocks=0)
    protect(model, protected, x[0], scale=torch.inf)
    loss(model, x[1]).backward()
    grads = gradients(model)
    opt.step()
    assert_same(grads, [p.grad for p in model.parameters()])
    assert len(stored(protected)) == 1
    then = {"protect": lambda: protect(model, protected, x[2]), "step": opt.step}[by]
    with pytest.warns(RuntimeWarning, match="1 of 1 directions"):
        then()
    assert len(stored(protected)) == (by == "protect")


@pytest.mark.gpu
def test_on_a_gpu_the_step_that_meets_it_does_not_synchronise(wrapping):
    model, x = model_and_batches()
    model.cuda()
    x = [batch.cuda() for batch in x]
    opt, protected = wrapping(model, 2)
    protect(model, protected, x[0])
    protect(model, protected, x[1], scale=torch.inf)
    loss(model, x[2]).backward()
    protected.project()  # loads kernels, whose first launch synchronises
    opt.zero_grad()
    loss(model, x[2]).backward()
    protected.unprotect()
    protect(model, protected, x[0])
    protect(model, protected, x[1], scale=torch.inf)
    grads = gradients(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(grads, [p.grad for p in model.parameters()])
    with pytest.warns(RuntimeWarning, match=r"1 of 2 directions \(number 1, "):
        opt.step()
    assert protected.last.applied and len(stored(protected)) == 1
