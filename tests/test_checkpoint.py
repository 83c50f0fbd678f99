"""Protected directions in an optimizer's state_dict()."""

import io

import pytest
import torch

import gradproj
from training import assert_same, loss, model_and_batches, number_protected, protect, stored, train

INNER = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),  # without state of its own
}


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(wrapping, inner="adamw", seed=0, dtype=torch.float32, **kwargs):
    model, x = model_and_batches(seed)
    model.to(dtype)
    x = [batch.to(dtype) for batch in x]
    opt, projector = wrapping(INNER[inner](model.parameters()), **kwargs)
    train(model, opt, projector, x[:6])
    return model, x, opt, projector


@pytest.mark.parametrize("inner", INNER)
def test_directions_lie_beside_the_optimizer_s_own_state(inner, wrapping):
    model, _, opt, projector = trained(wrapping, inner, directions=2, save_directions=True)
    saved = opt.state_dict()["state"]
    own = {"step", "exp_avg", "exp_avg_sq"} if inner == "adamw" else {"momentum_buffer"}
    for i, p in enumerate(model.parameters()):
        assert saved[i].keys() - own == {"protected_0", "protected_1"}
        for k in range(2):
            assert torch.equal(saved[i][f"protected_{k}"], stored(projector)[k][p])  # the oldest first
    live = opt.state[model[0].weight]
    assert not any(str(name).startswith("protected") for name in live)  # in the checkpoint only


@pytest.mark.parametrize("inner", INNER)
def test_a_run_resumes_under_its_protection(inner, wrapping):
    model, x, opt, projector = trained(wrapping, inner, directions=2, method="conflict", save_directions=True)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, _ = model_and_batches(seed=1)
    twin_opt, twin_projector = wrapping(INNER[inner](twin.parameters()), directions=2, method="conflict")
    protect(twin, twin_projector, x[0])  # replaced by the checkpoint's
    twin.load_state_dict(saved["model"])
    twin_opt.load_state_dict(saved["opt"])
    for a, b in zip(stored(projector), stored(twin_projector), strict=True):
        assert_same(a.values(), b.values())
    results = []
    for m, o, p in ((model, opt, projector), (twin, twin_opt, twin_projector)):
        o.zero_grad()
        loss(m, x[7]).backward()
        o.step()
        results.append((p.last.gram, [w.detach() for w in m.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert not any(str(name).startswith("protected") for s in twin_opt.state.values() for name in s)


def test_they_keep_their_dtype(wrapping):
    """An optimizer casts the state that it loads to its parameter's dtype."""
    saved = trained(wrapping, dtype=torch.float64, save_directions=True)[2].state_dict()
    twin, _ = model_and_batches()
    twin_opt, twin_projector = wrapping(INNER["adamw"](twin.parameters()))
    twin_opt.load_state_dict(saved)
    assert all(t.dtype == torch.float64 for t in stored(twin_projector)[0].values())
    assert twin_opt.state[twin[0].weight]["exp_avg"].dtype == torch.float32


def test_they_are_saved_on_request_only(wrapping):
    _, _, opt, _ = trained(wrapping)
    assert opt.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_without_directions_leaves_them_alone(wrapping):
    _, _, old, _ = trained(wrapping)
    _, _, opt, projector = trained(wrapping, seed=1, save_directions=True)
    kept = [t.clone() for t in stored(projector)[0].values()]
    opt.load_state_dict(old.state_dict())
    assert_same(stored(projector)[0].values(), kept)


@pytest.mark.parametrize("inner", INNER)
def test_a_plain_optimizer_loads_a_checkpoint_with_directions(inner, wrapping):
    model, x, opt, _ = trained(wrapping, inner, save_directions=True)
    twin, _ = model_and_batches()
    results = []
    for with_directions in (True, False):
        twin.load_state_dict(model.state_dict())
        plain = INNER[inner](twin.parameters())
        saved = through_a_file(opt.state_dict())  # in memory the two would step the same tensors
        if not with_directions:
            saved["state"] = {
                i: {n: v for n, v in s.items() if "protected" not in n} for i, s in saved["state"].items()
            }
        plain.load_state_dict(saved)
        results.append(train(twin, plain, None, x[6:]))
    assert_same(*results)


def test_saved_before_the_first_step(wrapping):
    """Adam takes a state that is not empty for one that it has set up: the directions' entries alone must not reach it."""
    model, x = model_and_batches()
    opt, projector = wrapping(INNER["adamw"](model.parameters()), save_directions=True)
    protect(model, projector, x[0])
    twin, _ = model_and_batches()
    twin_opt, twin_projector = wrapping(INNER["adamw"](twin.parameters()))
    twin_opt.load_state_dict(through_a_file(opt.state_dict()))
    assert number_protected(twin_projector) == 1
    assert not twin_opt.state
    assert_same(train(model, opt, None, x[2:]), train(twin, twin_opt, None, x[2:]))


def test_a_smaller_store_takes_the_newest(wrapping):
    model, x = model_and_batches()
    opt, projector = wrapping(INNER["sgd"](model.parameters()), directions=12, save_directions=True)
    for batch in x:  # twelve, so that protected_10 must not sort before protected_2
        protect(model, projector, batch)
    twin_opt, twin_projector = wrapping(INNER["sgd"](model.parameters()), directions=2)
    twin_opt.load_state_dict(opt.state_dict())
    for a, b in zip(stored(twin_projector), stored(projector)[-2:], strict=True):
        assert_same(a.values(), b.values())


def test_groups_and_missing_gradients(wrapping):
    model, x = model_and_batches()
    model[0].bias.requires_grad_(False)
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.2}]
    opt, projector = wrapping(torch.optim.SGD(groups, lr=0.1), save_directions=True)
    protect(model, projector, x[0])
    saved = opt.state_dict()
    assert {i for i, s in saved["state"].items() if "protected_0" in s} == {0, 1, 2}
    kept = {p: t.clone() for p, t in stored(projector)[0].items()}
    projector.unprotect()
    opt.load_state_dict(saved)
    assert {p: t.shape for p, t in stored(projector)[0].items()} == {p: t.shape for p, t in kept.items()}
    assert_same(stored(projector)[0].values(), kept.values())


def test_the_kept_gram_goes_with_the_directions_that_it_belonged_to(wrapping):
    """A checkpoint whose tensors were filled in place, and then loaded, must not meet inner products of the old ones."""
    model, x, opt, projector = trained(wrapping, directions=2, save_directions=True)
    saved = opt.state_dict()
    for s in saved["state"].values():
        s["protected_0"].mul_(3.0)
    opt.load_state_dict(saved)
    opt.zero_grad()
    loss(model, x[7]).backward()
    opt.step()
    for k, direction in enumerate(stored(projector)):
        length = sum(t.double().square().sum() for t in direction.values())
        assert projector.last.gram[1 + k, 1 + k].item() == pytest.approx(length.item(), rel=1e-5)


def test_what_does_not_fit_is_refused():
    model, x = model_and_batches()
    projector = gradproj.attach(INNER["sgd"](model.parameters()), directions=2)
    protect(model, projector, x[0])
    saved = projector.state_dict()
    kept = [t.clone() for t in stored(projector)[0].values()]
    other = gradproj.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="4 parameters, but the optimizer has 2"):
        other.load_state_dict(saved)
    saved["state"][1]["protected_0"] = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"direction 0 of parameter 1 has shape \(2,\), but the parameter has shape \(6,\)"
    ):
        projector.load_state_dict(saved)
    assert_same(stored(projector)[0].values(), kept)
    assert projector.state_dict()["state"].keys() == {0, 1, 2, 3}
