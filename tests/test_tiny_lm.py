"""The small model of the laboratory and the demo: its file, and the optimizer that it is trained with."""

import functools
import platform

import pytest
import safetensors.torch
import torch

from laboratory import small, tiny_lm

pytestmark = pytest.mark.slow


def test_shipped_base_model_has_the_losses_in_its_header():
    model, facts = tiny_lm.load_base(small.SHIPPED)
    assert facts["command"] == "python benchmarks/demo.py --retrain 4000" and facts["seed"] == 0 and facts["torch"]
    found = small.held_out(model)
    # Python's library is another text in every version; exercises and dialogue are made here.
    same_text = facts["python"].split(".")[:2] == platform.python_version().split(".")[:2]
    python = found.pop("Python"), facts["held_out"].pop("Python")
    assert python[0] == pytest.approx(python[1], abs=0.01 if same_text else 0.1)
    assert found == pytest.approx(facts["held_out"], abs=0.01)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4]), "is not a base model"),
        (lambda p: safetensors.torch.save_file({"w": torch.zeros(1)}, p), "is not a base model .KeyError: 'facts'"),
        (lambda p: None, "width is 16, expected 96"),
    ],
)
def test_base_model_that_cannot_be_used_says_what_to_do(tmp_path, spoil, reason):
    path = tmp_path / "base.safetensors"
    tiny_lm.save_base(path, tiny_lm.TinyLM(16, 1, 2), {"width": 16, "layers": 1, "heads": 2})
    spoil(path)
    with pytest.raises(ValueError, match=f"{reason}.*git, or train it again: make demo .*--retrain --base {path}"):
        tiny_lm.load_base(path, width=96)


def test_muon_goes_where_torch_goes():
    """torch's rounds to bfloat16, so the paths agree to a few percent of their length."""
    torch.manual_seed(0)
    starts = [torch.randn(s) for s in ((16, 16), (16, 48), (48, 16))]
    ends = []
    for make in (tiny_lm.Muon, functools.partial(torch.optim.Muon, weight_decay=0.0)):
        parameters = [torch.nn.Parameter(s.clone()) for s in starts]
        optimizer = make(parameters, lr=0.02)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        ends.append(parameters)
    for ours, theirs, start in zip(*ends, starts, strict=True):
        assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
