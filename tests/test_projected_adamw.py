"""ProjectedAdamW: the optimizer that is made from a class, parameters with names, and a file."""

import io

import pytest
import torch
from torch import nn

from gradproj import NullSpace, ProjectedAdamW, ProjectedOptimizer

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 3, 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), convolution, nn.Flatten(), nn.LayerNorm(18), nn.Tanh(), nn.Linear(18, 5)
    )


@pytest.fixture
def saved(tmp_path):
    """The file of a protection, the inputs that it protects, and what the model makes of them."""
    model, few = network(), torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    protection = NullSpace(model, share=0.9)
    with protection.capture():
        model(few).square().sum().backward()
    protection.save(tmp_path / "few.safetensors")
    return tmp_path / "few.safetensors", few, model(few).detach()


def train(model, opt, steps=10):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        opt.zero_grad()
        (model(torch.randn(16, 12, generator=rng)) - 1.0).square().mean().backward()
        opt.step()


def groups(model):
    named = list(model.named_parameters())
    return [{"params": named[:3]}, {"params": named[3:], "lr": 0.003}]


WAYS = {
    "the model": lambda model: model,
    "names": lambda model: model.named_parameters(),
    "names of a wrapper": lambda model: [(f"_orig_mod.{n}", p) for n, p in model.named_parameters()],
    "groups of names": groups,
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_wrapper(saved, way):
    path, few, before = saved
    model, twin = network(), network()
    opt = ProjectedAdamW(WAYS[way](model), path, **SETTINGS)
    plain = torch.optim.AdamW(groups(twin) if way == "groups of names" else twin.parameters(), **SETTINGS)
    train(model, opt)
    train(twin, ProjectedOptimizer(plain, NullSpace.load(path, twin)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(model(few), before, rtol=0, atol=1e-5)
    assert not torch.equal(model[1].weight, network()[1].weight)  # and yet it learns


def test_resumes_bit_for_bit_and_takes_schedulers(saved):
    path, _, _ = saved
    model, twin = network(), network()
    opt = ProjectedAdamW(model.named_parameters(), path, **SETTINGS)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
    train(model, opt)
    schedule.step()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    twin.load_state_dict(loaded["model"])
    again = ProjectedAdamW(twin.named_parameters(), path, **SETTINGS)
    again.load_state_dict(loaded["opt"])
    train(model, opt)
    train(twin, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_it_cannot_find_is_named(saved):
    path, _, _ = saved
    model = network()
    with pytest.raises(ValueError, match="finds its layer by name.*pass the model or model.named_parameters"):
        ProjectedAdamW(model.parameters(), path)
    with pytest.raises(ValueError, match="no parameter '5.weight'"):
        ProjectedAdamW(model[:5].named_parameters(), path)
    with pytest.raises(ValueError, match="'5.weight' has shape .* but the basis '5' is of one with"):
        ProjectedAdamW(nn.Sequential(*model[:5], nn.Linear(18, 6)).named_parameters(), path)


def test_a_conv1d_is_found_by_its_parameters(tmp_path):
    """Its weight lies transposed, which a square one does not tell: the file does."""
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 6))
    protection = NullSpace(model, share=0.5)
    with protection.capture():
        model(torch.randn(8, 6)).square().sum().backward()
    protection.save(tmp_path / "conv1d.safetensors")
    for given in (model, model.named_parameters()):
        opt = ProjectedAdamW(given, tmp_path / "conv1d.safetensors", lr=0.1)
        assert len(opt.protection) == 1
        x = torch.randn(4, 6)
        (model(x) - 1).square().mean().backward()
        opt.step()
        for name, basis in protection.bases.items():
            made = torch.cat([model[0].weight, model[0].bias[None]]).T @ basis.vectors
            assert (made - basis.target).abs().max() < 1e-5, name
