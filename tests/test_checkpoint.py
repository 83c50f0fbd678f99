"""Protected directions in an optimizer's state_dict()."""

import io

import pytest
import torch

from training import assert_same, descend, model_and_batches, protect, protecting, stored, train

INNER = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),  # without state of its own
}
every_inner = pytest.mark.parametrize("inner", INNER)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(wrapping, inner="adamw", seed=0, model_dtype=torch.float32, count=1, **settings):
    model, x = model_and_batches(seed, model_dtype)
    opt, protected = wrapping(INNER[inner](model.parameters()), count, **settings)
    train(model, opt, protected, x[:6])
    return model, x, opt, protected


def assert_same_directions(a, b):
    for d, e in zip(a, b, strict=True):
        assert [t.dtype for t in d.values()] == [t.dtype for t in e.values()]
        assert_same(d.values(), e.values())


def names(state) -> set[str]:
    return {str(name) for entries in state.values() for name in entries}


@every_inner
def test_directions_lie_beside_the_optimizer_s_own_state(inner, wrapping):
    model, _, opt, protected = trained(wrapping, inner, count=2)
    saved = opt.state_dict()["state"]
    own = {"step", "exp_avg", "exp_avg_sq"} if inner == "adamw" else {"momentum_buffer"}
    for i, p in enumerate(model.parameters()):
        assert saved[i].keys() - own == {"protected_0", "protected_1"}
        for k in range(2):
            assert torch.equal(saved[i][f"protected_{k}"], stored(protected)[k][p])  # the oldest first
    assert names(opt.state) <= own  # in the checkpoint only


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded_by", ["the wrapper", "the optimizer before it is attached to", "a method of its own"])
@every_inner
def test_a_run_resumes_under_its_protection(inner, loaded_by, dtype, wrapping):
    """Trainer loads the optimizer's state before anybody can attach: the directions stayed in it, beside new ones, and
    three came back for one. The same with an optimizer that loads without torch's hooks, such as bitsandbytes'."""
    model, x, opt, protected = trained(wrapping, inner, count=2, method="conflict", dtype=dtype)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, _ = model_and_batches(seed=1)
    twin_opt = INNER[inner](twin.parameters())
    if loaded_by == "a method of its own":
        twin_opt.__class__ = type("Own", (type(twin_opt),), {"load_state_dict": load_without_hooks})
    before = twin_opt if loaded_by.startswith("the optimizer") else None
    if before is not None:
        before.load_state_dict(saved["opt"])
    twin_opt, twin_protected = wrapping(twin_opt, 2, "conflict", dtype=dtype)
    if before is None:
        protect(twin, twin_protected, x[0])  # replaced by the checkpoint's
        twin_opt.load_state_dict(saved["opt"])
    twin.load_state_dict(saved["model"])
    for m, o, p in ((model, opt, protected), (twin, twin_opt, twin_protected)):
        protect(m, p, x[8])
        descend(m, o, x[7])
    assert_same_directions(stored(protected), stored(twin_protected))
    assert torch.equal(protected.last.gram, twin_protected.last.gram)
    assert_same(model.parameters(), twin.parameters())
    assert not any("protected" in name for name in names(twin_opt.state))
    assert names(twin_opt.state_dict()["state"]) == names(opt.state_dict()["state"])


def load_without_hooks(self, state_dict):
    """Casts what it loads, and keeps all of it."""
    for p, (_, entries) in zip(self.param_groups[0]["params"], sorted(state_dict["state"].items()), strict=True):
        self.state[p] = {n: t.to(p.dtype) if isinstance(t, torch.Tensor) else t for n, t in entries.items()}


def test_they_keep_their_dtype(wrapping):
    """An optimizer casts the state that it loads to its parameter's dtype."""
    saved = trained(wrapping, model_dtype=torch.float64)[2].state_dict()
    twin, _ = model_and_batches()
    twin_opt, twin_protected = wrapping(INNER["adamw"](twin.parameters()))
    twin_opt.load_state_dict(saved)
    assert all(t.dtype == torch.float64 for t in stored(twin_protected)[0].values())
    assert twin_opt.state[twin[0].weight]["exp_avg"].dtype == torch.float32


def test_a_checkpoint_without_directions_leaves_them_alone(wrapping):
    _, _, old, old_protected = trained(wrapping)
    old_protected.unprotect()
    assert names(old.state_dict()["state"]) == {"step", "exp_avg", "exp_avg_sq"}
    _, _, opt, protected = trained(wrapping, seed=1)
    kept = stored(protected)
    opt.load_state_dict(old.state_dict())
    assert_same_directions(stored(protected), kept)


@every_inner
def test_a_plain_optimizer_loads_a_checkpoint_with_directions(inner, wrapping):
    model, x, opt, protected = trained(wrapping, inner)
    twin, _ = model_and_batches()
    results = []
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        plain = INNER[inner](twin.parameters())
        plain.load_state_dict(through_a_file(opt.state_dict()))  # in memory the two would step the same tensors
        results.append(train(twin, plain, None, x[6:]))
        protected.unprotect()
    assert_same(*results)


def test_saved_before_the_first_step(wrapping):
    """Adam takes any state that is not empty for its own, so it must not see a state of directions only."""
    model, x = model_and_batches()
    opt, protected = wrapping(INNER["adamw"](model.parameters()))
    protect(model, protected, x[0])
    saved = through_a_file(opt.state_dict())
    twin, _ = model_and_batches()
    twin_opt, twin_protected = wrapping(INNER["adamw"](twin.parameters()))
    twin_opt.load_state_dict(saved)
    assert len(stored(twin_protected)) == 1 and not twin_opt.state
    assert_same(train(model, opt, None, x[2:]), train(twin, twin_opt, None, x[2:]))


def test_a_smaller_store_takes_the_newest(wrapping):
    model, x, opt, protected = protecting(wrapping, 12, blocks=0)
    for batch in x:  # twelve, so that protected_10 must not sort before protected_2
        protect(model, protected, batch)
    twin_opt, twin_protected = wrapping(model, 2)
    for _ in range(2):
        twin_opt.load_state_dict(opt.state_dict())
        assert_same_directions(stored(twin_protected), stored(protected)[-2:])
    protected.unprotect()
    protect(model, protected, x[0])
    twin_opt.load_state_dict(opt.state_dict())  # fewer than before
    assert_same_directions(stored(twin_protected), stored(protected))


def test_groups_and_missing_gradients(wrapping):
    model, x = model_and_batches()
    model[0].bias.requires_grad_(False)
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.2}]
    opt, protected = wrapping(torch.optim.SGD(groups, lr=0.1))
    protect(model, protected, x[0])
    saved = opt.state_dict()
    assert {i for i, s in saved["state"].items() if "protected_0" in s} == {0, 1, 2}
    kept = stored(protected)
    protected.unprotect()
    opt.load_state_dict(saved)
    assert stored(protected)[0].keys() == kept[0].keys()
    assert_same_directions(stored(protected), kept)


def test_the_kept_gram_goes_with_the_directions_that_it_belonged_to(wrapping):
    """A checkpoint is filled in place and then loaded: the inner products of the old tensors must be gone."""
    model, x, opt, protected = trained(wrapping, count=2)
    saved = opt.state_dict()
    for s in saved["state"].values():
        s["protected_0"].mul_(3.0)
    opt.load_state_dict(saved)
    descend(model, opt, x[7])
    for k, d in enumerate(stored(protected)):
        length = sum(t.double().square().sum() for t in d.values())
        assert protected.last.gram[1 + k, 1 + k].item() == pytest.approx(length.item(), rel=1e-5)


def test_what_does_not_fit_is_refused(wrapping):
    model, _, opt, protected = protecting(wrapping, 2)
    saved, kept = opt.state_dict(), stored(protected)
    other, _ = wrapping(model[0])
    with pytest.raises(ValueError, match="4 parameters, but the optimizer has 2"):
        other.load_state_dict(saved)
    saved["state"][1] = {"protected_0": torch.ones(2)}
    message = r"direction 0 of parameter 1 has shape \(2,\), but the parameter has shape \(6,\)"
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same_directions(stored(protected), kept)
    assert opt.state_dict()["state"].keys() == {0, 1, 2, 3}
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    late.load_state_dict(saved)
    with pytest.raises(ValueError, match=message):
        wrapping(late)
    late.state.clear()
    wrapping(late)  # nothing was left behind
