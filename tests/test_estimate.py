"""What a null space would take, computed from shapes, against what one takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gradproj import NullSpace
from gradproj.nullspace.moments import Moment
from test_promise import package


def llama():
    transformers = package("transformers")
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(hidden_size=48, intermediate_size=96, **settings)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("sketched", [False, True], ids=["exact", "sketched"])
def test_a_language_model(sketched, monkeypatch):
    """Bytes gathered are equal, multiply-adds and bytes held within 15 %."""
    if sketched:
        monkeypatch.setattr("gradproj.nullspace.moments.WIDE", 64)
        monkeypatch.setattr("gradproj.nullspace.moments.SKETCH", 24)
    model = llama()
    protection = NullSpace(model, share=0.2)
    expected = protection.estimate()
    assert expected == NullSpace(llama().to("meta"), share=0.2).estimate()

    gathered, eigenvalues = [], Moment.eigenvalues

    def counted(moment, count):
        gathered.append(moment.sum.nbytes)
        return eigenvalues(moment, count)

    monkeypatch.setattr(Moment, "eigenvalues", counted)
    with protection.capture():
        for seed in range(4):
            tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(seed))
            model(input_ids=tokens, labels=tokens).loss.backward()
    assert (expected.matrices, expected.gathered) == (len(protection), sum(gathered))
    assert expected.weights == sum(matrix.numel for matrix in protection.matrices)
    bases = protection.bases.values()
    storages = {b.vectors.untyped_storage().data_ptr(): b.vectors.untyped_storage().nbytes() for b in bases}
    held = sum(storages.values()) + sum(b.target.nbytes for b in bases)
    assert held == pytest.approx(expected.held, rel=0.15)
    work = sum(2 * matrix.numel * protection.bases[matrix.name].rank for matrix in protection.matrices)
    assert work == pytest.approx(expected.multiply_adds, rel=0.15)
    assert f"| {expected.matrices} |" in str(expected)


def test_the_documented_model_of_seven_billion_weights():
    transformers = package("transformers")
    with torch.device("meta"):
        config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.lm_head.requires_grad_(False)
    documented = (Path(__file__).parent.parent / "docs" / "protections.md").read_text()
    for share in (0.05, 0.02):
        row = str(NullSpace(model, share=share).estimate()).split("\n")[-1]
        assert f"| Llama 7B, {share} {row}" in documented


def test_experts_on_the_meta_device():
    """128 exact moments of a layer's width would be too many: those of experts are sketched, by their share."""
    transformers = package("transformers")
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    settings |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(hidden_size=640, intermediate_size=64, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    found = NullSpace(model, share=0.05).estimate()
    assert found.matrices == 4 + 1 + 2 * 16 + 1
    attention, lm_head, down = 640 * 640 + 64 * 64 + 640 * 640, 640 * 640, 16 * 32 * 32
    assert found.gathered == 4 * (attention + lm_head + down + 16 * 640 * 2 * 64)


def test_experts_on_a_cpu():
    """In float32 too, and all of them, though eight tokens reach some."""
    transformers = package("transformers")
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    settings |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(hidden_size=32, intermediate_size=64, **settings)
    )
    assert NullSpace(model).estimate().matrices == 4 + 1 + 2 * 16 + 1


def test_it_leaves_no_trace():
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 5)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    NullSpace(model, share=0.1).estimate(lambda model: model(torch.zeros(2, 12)))
    assert model.training and model[1].training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_another_forward_pass():
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5))
    found = NullSpace(model, share=0.1).estimate(lambda model: model(torch.zeros(1, 12)))
    assert found.weights == 24 * 13 + 5 * 25 and found.gathered == 4 * (13**2 + 25**2)
