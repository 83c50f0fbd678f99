"""A null space of LoRA adapters: blind to protected inputs, held where they add more, refused where they do more."""

import pytest
import torch
from torch import nn

import gradproj
from gradproj import NullSpace, ProjectedOptimizer
from test_promise import package, protecting, step_away


def adapted(**settings):
    peft = package("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 5))
    config = {"r": 4, "target_modules": ["0", "2"], **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def test_dora_is_refused_by_name():
    """It rescales what the base layer makes of protected inputs too."""
    with pytest.raises(NotImplementedError, match=r"0: .*DoRA.*use_dora=False"):
        NullSpace(adapted(use_dora=True))


def test_the_bias_of_an_adapter_is_held(few):
    model = adapted(lora_bias=True)
    protection, opt, before = protecting(model, few)
    step_away(model, opt)
    assert (model(few) - before).abs().max() < 1e-4
    names = [name for name, _ in protection.coverage.largest]
    assert protection.coverage.held == 24 + 5 and all(name.endswith("lora_B.default.bias") for name in names)


def test_an_adapter_under_dropout(few):
    """The proof multiplies what the adapter saw; the basis is of the inputs without dropout."""
    torch.manual_seed(0)
    model = adapted(lora_dropout=0.5).train()
    _, opt, before = protecting(model, few)
    step_away(model, opt)
    model.eval()
    assert (model(few) - before).abs().max() < 1e-4


def test_an_adapter_goes_on_where_it_was(few, tmp_path):
    """load() refused it, because its lora_B is not zero, and advised to merge it, which loses it."""
    peft = package("peft")
    model = adapted()
    protection, opt, before = protecting(model, few)
    step_away(model, opt)
    model.save_pretrained(tmp_path / "adapter")
    protection.save(tmp_path / "bases.safetensors")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 5))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    loaded = gradproj.NullSpace.load(tmp_path / "bases.safetensors", again)
    assert (again(few) - before).abs().max() < 1e-4
    step_away(again, ProjectedOptimizer(torch.optim.SGD(again.parameters(), lr=0.05), loaded))
    assert (again(few) - before).abs().max() < 1e-4
    with pytest.raises(NotImplementedError, match="has been trained already.*merge it first"), loaded.capture():
        again(few).sum().backward()
