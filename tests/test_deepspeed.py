"""A null space under DeepSpeed's engine, as it is installed: ZeRO on two processes without a GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gradproj
from gradproj.integrations.deepspeed import protect

FEW = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
STEPS = 5


def network():
    torch.manual_seed(0)
    hidden = nn.Linear(12, 24, bias=False)
    return nn.Sequential(hidden, nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 5, bias=False))


def protected(model):
    protection = gradproj.NullSpace(model, share=0.9, space="gradient")
    with protection.capture():
        model(FEW).square().sum().backward()
    return protection


def batch(step, rank):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_one_process_without_deepspeed(stage, tmp_path):
    """Two micro-batches a step on each of two ranks; outputs on the protected inputs stay."""
    pytest.importorskip("deepspeed")
    if " " in sys.prefix:
        pytest.skip("DeepSpeed compiles its communication on first use, and does not quote the environment's path")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(stage), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr

    model = network()
    before, protection = model(FEW).detach(), protected(model)
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), protection)
    for step in range(STEPS):
        for micro in range(2):
            for rank in range(2):
                ((model(batch(2 * step + micro, rank)) - 1.0).square().mean() / 4).backward()
        opt.step()
        opt.zero_grad()
    for rank in range(2):
        outputs, learned = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(outputs, before, rtol=0, atol=1e-5)
        torch.testing.assert_close(learned, model(batch(0, 0)).detach(), rtol=0, atol=1e-5)
    assert not torch.allclose(learned, network()(batch(0, 0)), atol=1e-2)


def one_rank(stage, folder):
    import deepspeed

    rank, model = int(os.environ["RANK"]), network()
    protect(protected(model))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # not by default
    }
    deepspeed.init_distributed("gloo")
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=opt, config=config)
    for step in range(2 * STEPS):
        engine.backward((engine(batch(step, rank)) - 1.0).square().mean())
        engine.step()
    with torch.no_grad():
        torch.save((engine(FEW), engine(batch(0, 0))), folder / f"{rank}.pt")
    time.sleep(0.5)  # gloo's threads must end before Python does: see benchmarks/torchrun_example.py


def test_adapters_stay_blind():
    """In gradient space too: an adapter began with what it was born with, and protected inputs saw it grow."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 5)), peft.LoraConfig(r=2, target_modules=["0"]))
    before, protection = model(FEW).detach(), protected(model)
    protect(protection)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        (model(batch(step, 0)) - 1.0).square().mean().backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(model(FEW), before, rtol=0, atol=1e-5)
    assert not torch.allclose(model(batch(0, 0)), model.get_base_model()[0].base_layer(batch(0, 0)), atol=1e-3)


def test_own_text_is_captured(monkeypatch):
    """Where nothing else has been; by several processes only if it is summed."""
    pytest.importorskip("transformers")
    from gradproj.hf import own_text
    from language import character_tokenizer, language_model

    model, tokenizer = language_model(hidden_size=128), character_tokenizer()
    protection = gradproj.NullSpace(model, share=0.3, space="gradient")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"call deepspeed.init_distributed\(\) first"):
        protect(protection, tokenizer)
    monkeypatch.delenv("WORLD_SIZE")
    torch.manual_seed(3)
    rows = own_text(model, tokenizer, seed=3)
    assert protect(protection, tokenizer) and max(b.tokens for b in protection.bases.values()) == 128 * 63
    expected = gradproj.NullSpace(language_model(hidden_size=128), share=0.3, space="gradient")
    with expected.capture():
        for few in rows.split(8):
            expected.model(input_ids=few, labels=few).loss.backward()
    for name, basis in expected.bases.items():
        assert torch.equal(protection.bases[name].vectors, basis.vectors)
    captured = dict(protection.bases)
    protect(protection, tokenizer)
    assert protection.bases == captured  # what has been captured is kept


def test_handles_take_it_off():
    model = network()
    handles = protect(protected(model))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(FEW).sum().backward()
        gradients.append(model[0].weight.grad.norm().item())
        for handle in handles:
            handle.remove()
    assert gradients[0] < 1e-5 * gradients[1]


def test_bad_input():
    with pytest.raises(TypeError, match="takes a gradproj.NullSpace, got Directions"):
        protect(gradproj.Directions())
    with pytest.raises(ValueError, match='use NullSpace\\(space="gradient"\\)'):
        protect(gradproj.NullSpace(network()))
    with pytest.raises(RuntimeError, match="run capture"):
        protect(gradproj.NullSpace(network(), space="gradient"))
    biased = nn.Sequential(nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"the bias of layer 0 trains.*requires_grad_\(False\)"):
        protect(protected(biased))
    model = network()
    protection = protected(model)
    model[0].weight.ds_id = 0
    with pytest.raises(RuntimeError, match="has prepared 0.weight already; call this before"):
        protect(protection)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
