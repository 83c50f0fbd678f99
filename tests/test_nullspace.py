"""NullSpace: what layers compute on the captured inputs stays, whatever the optimizer does."""

import copy
import io

import pytest
import torch
from torch import nn

import gradproj
from gradproj import NullSpace, ProjectedOptimizer
from training import adamw, assert_same, parameters, wrapped

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5))


def captured(model, x, **settings):
    protection = NullSpace(model, **settings)
    with protection.capture():
        model(x).square().sum().backward()
    return protection


def protecting(x, wrapping=wrapped, optimizer=adamw, model=None, **settings):
    """A model, its optimizer, the protection of what it computes on x, and that."""
    model = network().to(x.dtype) if model is None else model
    protection = captured(model, x, **{"share": 0.9, **settings})
    before = model(x).detach()
    opt, _ = wrapping(optimizer(model), protection=protection)
    return model, opt, protection, before


def train(model, opt, steps, seed=1, each=lambda: None, shape=(16, 12)):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        x = torch.randn(shape, generator=rng).to(next(model.parameters()).dtype)
        (model(x) - 1.0).square().mean().backward()
        opt.step()
        each()


def sgd(model):
    """Its step is its gradient: exact in gradient space too."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linear_network_keeps_its_outputs_on_a_subspace(name, wrapping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 15, bias=False), nn.Linear(15, 6, bias=False))
    inputs, fresh = torch.randn(50, 3) @ torch.randn(3, 20), torch.randn(50, 20)  # three dimensions of twenty
    elsewhere = model(fresh).detach()
    optimizer = lambda m: OPTIMIZERS[name](m.parameters())
    model, opt, _, before = protecting(inputs, wrapping, optimizer, model, share=0.5)
    train(model, opt, 100, shape=(8, 20))
    assert (model(inputs) - before).abs().max() < 1e-5 * before.abs().max()
    assert (model(fresh) - elsewhere).abs().max() > 0.1  # and it has learnt


@pytest.mark.parametrize(
    ("settings", "dtype", "tolerance"),
    [({}, torch.float32, 1e-4), ({"space": "gradient"}, torch.float32, 1e-4),
     ({}, torch.bfloat16, 0.1), ({}, torch.float64, 1e-9)],
    ids=str,
)  # fmt: skip
def test_a_nonlinear_network_keeps_what_it_computed(few, settings, dtype, tolerance, wrapping):
    """All other parameters are held, so activations do not move, and bases do not go stale."""
    few = few.to(dtype)
    model, opt, _, before = protecting(few, wrapping, sgd, **settings)
    train(model, opt, 100)
    assert (model(few) - before).abs().max() < tolerance
    assert (model(torch.randn(16, 12).to(dtype)) - 1.0).square().mean() < 0.5


def test_every_weight_keeps_its_products_after_each_step(few):
    model, opt, protection, _ = protecting(few, share=0.3)

    def check():
        for layer in protection.matrices:
            basis = protection.bases[layer.name]
            whole = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()
            left = (whole @ basis.vectors.double() - basis.target.double()).norm()
            assert left <= 1e-6 * max(1.0, float(basis.target.norm()))

    train(model, opt, 10, each=check)
    assert opt.last.names == ("0", "2", "4") and (opt.last.moved > 0).all()
    fixed = sum(basis.rank * basis.curvature.outputs for basis in protection.bases.values())
    assert 0 < fixed <= 0.3 * sum(layer.numel for layer in protection.matrices)


def test_every_eighth_step_and_pin_now(few):
    model, opt, _, before = protecting(few, every=8)
    train(model, opt, 11)
    assert (model(few) - before).abs().max() > 1e-3
    assert opt.state_dict()["null_space"]["steps_since_pin"] == 3
    opt.pin()
    assert (model(few) - before).abs().max() < 1e-4
    assert opt.state_dict()["null_space"]["steps_since_pin"] == 0


def test_wide_layers_are_sketched(few, monkeypatch):
    """Twice the rank that they may keep, and as exact where the inputs have no more dimensions than that."""
    monkeypatch.setattr("gradproj.nullspace.moments.WIDE", 16)
    model, opt, protection, before = protecting(few, max_rank=6)
    assert [protection._sketch(layer) for layer in protection.matrices] == [None, 12, 12]
    assert [basis.rank for basis in protection.bases.values()] == [4, 4, 4]
    train(model, opt, 20)
    assert (model(few) - before).abs().max() < 1e-3


def test_a_convolution(wrapping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    x = torch.randn(1, 3, 4, 4)
    model, opt, _, before = protecting(x, wrapping, model=model)
    train(model, opt, 20, shape=(4, 3, 6, 6))
    assert (model(x) - before).abs().max() < 1e-3


class WithRest(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.layer = nn.Embedding(9, 12), nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, tokens):
        return self.layer(self.norm(self.embed(tokens)))


@pytest.mark.parametrize("rest", ["hold", "train"])
def test_the_rest_is_held_or_let_go_with_one_warning(rest, recwarn):
    torch.manual_seed(0)
    model, tokens = WithRest(), torch.arange(4)
    held = model.embed.weight.clone(), model.norm.weight.clone()
    model, opt, _, before = protecting(tokens, optimizer=lambda m: adamw(m, weight_decay=0.5), model=model, rest=rest)
    for _ in range(3):
        opt.zero_grad()
        (model(torch.arange(9)) - 1.0).square().mean().backward()
        opt.step()
        assert all(p.grad is not None for p in model.parameters())  # set aside and put back
    same = torch.equal(held[0], model.embed.weight) and torch.equal(held[1], model.norm.weight)
    texts = [str(w.message) for w in recwarn if "not covered" in str(w.message)]
    assert same == (rest == "hold") and len(texts) == (rest == "train")
    if rest == "train":
        assert "embed.weight" in texts[0] and "norm.bias" in texts[0]
    else:
        assert (model(tokens) - before).abs().max() < 1e-5


def test_layer_wise_learning_rates(few):
    model = network()
    protection = captured(model, torch.randn(100, 12), share=0.05)
    groups = protection.param_groups(lr=0.1, damping=0.3)
    total = sum(p.numel() for g in groups for p in g["params"])
    assert sum((1 - g["lr"] / 0.1) * p.numel() for g in groups for p in g["params"]) / total == pytest.approx(0.3)
    assert len(groups) <= 16
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    opt = ProjectedOptimizer(inner, protection)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    train(model, opt, 2, each=schedule.step)
    for now, then in zip(inner.param_groups, protection.param_groups(lr=0.1, damping=0.3), strict=True):
        assert now["lr"] == pytest.approx(then["lr"] / 4)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_without_damping_it_is_the_plain_optimizer(few):
    model, twin = network(), network()
    protection = captured(model, few, share=0.1)
    groups = protection.param_groups(lr=0.01, damping=0.0)
    assert len(groups) == 1
    train(model, torch.optim.AdamW(groups), 3)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 3)
    assert_same(parameters(model), parameters(twin))


def test_held_parameters_are_in_no_group_and_decay_by_a_predicate():
    model = WithRest()
    protection = captured(model, torch.arange(4), share=0.5)
    groups = protection.param_groups(lr=0.01, damping=0.0, weight_decay=0.1)
    assert [[p.shape for p in g["params"]] for g in groups] == [[(12, 12)], [(12,)]]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    protection = captured(model, torch.arange(4), share=0.5, rest="train")
    assert sum(len(g["params"]) for g in protection.param_groups(lr=0.01)) == 5
    with pytest.raises(RuntimeError, match=r"run capture\(\) first"):
        NullSpace(model).param_groups(lr=0.1)


def test_checkpoint_and_file(few, tmp_path, wrapping):
    model, opt, protection, _ = protecting(few, wrapping, share=0.3)
    train(model, opt, 3)
    protection.save(tmp_path / "bases.safetensors")  # pins first
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    train(model, opt, 5, seed=2)
    for way in ("state", "file"):
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        twin = network()
        twin.load_state_dict(saved["model"])
        again = NullSpace(twin) if way == "state" else NullSpace.load(tmp_path / "bases.safetensors", twin)
        resumed = ProjectedOptimizer(adamw(twin), again)
        keys = saved["opt"].keys() - ({"null_space"} if way == "file" else set())
        resumed.load_state_dict({k: saved["opt"][k] for k in keys})
        train(twin, resumed, 5, seed=2)
        assert_same(parameters(model), parameters(twin))
    smaller = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 23))
    with pytest.raises(
        ValueError, match=r"'2.weight' has shape \(23, 24\), but the basis '2' is of one with \(24, 24\)"
    ):
        NullSpace.load(tmp_path / "bases.safetensors", smaller)
    with pytest.raises(ValueError, match="no parameter '2.weight'"):
        NullSpace.load(tmp_path / "bases.safetensors", smaller[:1])


def test_copies_go_on_alone(few):
    model, opt, _, before = protecting(few)
    twin, twin_opt = copy.deepcopy((model, opt))
    train(twin, twin_opt, 10)
    assert (twin(few) - before).abs().max() < 1e-4
    assert_same(parameters(model), parameters(network()))
    train(model, opt, 10)
    assert_same(parameters(model), parameters(twin))


def test_report(few):
    protection = captured(network(), few, share=0.2)
    assert "| 2 | 24 x 25 |" in protection.report() and "dimensions fixed" in str(protection)
    assert "nothing captured yet" in repr(NullSpace(network()))


def test_a_skipped_step_changes_nothing(few):
    for fused in (False, True):
        model, opt, _, y = protecting(few, optimizer=lambda m, fused=fused: adamw(m, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = parameters(model)
        scaler.scale(model(few).sum()).backward()
        model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        assert_same(before, parameters(model))
        opt.zero_grad()
        scaler.scale((model(torch.randn(8, 12)) - 1).square().mean()).backward()
        scaler.step(opt)
        assert not torch.equal(before[0], model[0].weight) and (model(few) - y).abs().max() < 1e-4


def test_a_closure(few):
    model, opt, _, before = protecting(few, optimizer=lambda m: torch.optim.LBFGS(m.parameters(), max_iter=5))
    x = torch.randn(16, 12)

    def closure():
        opt.zero_grad()
        value = (model(x) - 1.0).square().mean()
        value.backward()
        return value

    first = opt.step(closure)
    assert closure() < first and (model(few) - before).abs().max() < 1e-4


def test_a_compiled_step(few, inductor):
    model, opt, _, before = protecting(few, optimizer=sgd)
    (model(torch.randn(16, 12)) - 1.0).square().mean().backward()
    torch.compile(opt.step)()
    assert (model(few) - before).abs().max() < 1e-4


def test_capture_leaves_gradients_alone(few):
    model = network()
    model(few).sum().backward()
    before = [p.grad for p in model.parameters()]
    protection = captured(model, few)
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ZeroDivisionError), protection.capture():
        model(few).sum().backward()
        raise ZeroDivisionError
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    protection.clear()
    assert len(protection) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"share": 0.0}, "share must be between 0 and 1"), ({"share": 1.0}, "share must be between 0 and 1"),
     ({"max_rank": 0}, "max_rank must be >= 1"), ({"space": "update"}, 'space must be "weights" or "gradient"'),
     ({"rest": "freeze"}, 'rest must be "hold" or "train"'), ({"every": 0}, "every must be >= 1"),
     ({"modules": lambda name, _: False}, "no matrix to protect")],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NullSpace(network(), **settings)


def test_bad_captures(few):
    model = network()
    protection = NullSpace(model, share=0.75)
    protection.share = 1.5  # as it may grow from capture to capture
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 1.5"), protection.capture():
        pass
    protection.share = 0.9
    message = r"received a gradient: call loss.backward\(\) inside the block"
    with pytest.raises(RuntimeError, match=message), protection.capture():
        pass
    other = WithRest()
    reached = NullSpace(other)
    with pytest.raises(RuntimeError, match="no product of an input with a parameter that trains"), reached.capture():
        other.embed(torch.arange(3)).sum().backward()
    with pytest.raises(RuntimeError, match="layer 0 were not finite"), protection.capture():
        model(few * torch.inf).sum().backward()
    assert len(protection) == 0
    with protection.capture(), pytest.raises(RuntimeError, match="inside another protect"):
        model(few).sum().backward()
        with protection.capture():
            pass
    model[0].weight = nn.Parameter(torch.randn(24, 11))
    opt = ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), protection)
    with pytest.raises(RuntimeError, match="layer 0 does not train what it trained.*has another size"):
        opt.pin()
    with pytest.raises(RuntimeError, match=r"project\(\): NullSpace with these settings acts inside step\(\)"):
        opt.project()


def test_pin_is_a_matter_of_null_spaces():
    opt = ProjectedOptimizer(torch.optim.SGD(network().parameters(), lr=0.1), gradproj.Directions())
    with pytest.raises(RuntimeError, match=r"pin\(\): Directions"):
        opt.pin()
