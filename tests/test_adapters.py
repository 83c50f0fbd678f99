"""A null space of LoRA adapters: blind to protected inputs, held where they add more, refused where they do more."""

import pytest
import torch
from torch import nn

import gradproj
from gradproj import NullSpace, ProjectedOptimizer
from language import language_model
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


def test_a_frozen_dora_beside_it_is_let_be(few):
    """It is part of what the layer computes, and does not train."""
    peft = package("peft")
    model = adapted(use_dora=True)
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "plain"])
    for name, p in model.named_parameters():
        p.requires_grad_("plain" in name)
    protection, opt, before = protecting(model, few)
    assert all("plain" in name for name in protection.bases)
    step_away(model, opt)
    assert (model(few) - before).abs().max() < 1e-4


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


@pytest.mark.parametrize("start", ["trained", "pissa", "olora", "gaussian"])
def test_an_adapter_that_does_not_start_at_zero_keeps_what_it_adds(start, few):
    """lora_B would go on to change what lora_A makes of protected inputs: both are matrices then. It was refused."""
    model = adapted() if start == "trained" else adapted(init_lora_weights=start)
    if start == "trained":
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for seed in range(3):
            opt.zero_grad()
            (model(torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))) - 1).square().mean().backward()
            opt.step()
    protection, opt, before = protecting(model, few[:2])
    both = any("lora_B" in name for name in protection.bases)
    assert both == (start != "gaussian")  # gaussian's lora_B is zero
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    step_away(model, opt, steps=10)
    assert (model(few[:2]) - before).abs().max() < 1e-4
    assert any(
        (p - w).abs().max() > 1e-3
        for p, w in zip([p for p in model.parameters() if p.requires_grad], weights, strict=True)
    )


OTHERS = {"IA3": {"feedforward_modules": []}, "OFT": {"oft_block_size": 4}, "Vera": {"r": 4}, "LoHa": {"r": 4},
          "AdaLora": {"total_step": 9}}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_are_refused_by_name(kind):
    peft = package("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24))
    model = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(target_modules=["2"], **OTHERS[kind]))
    with pytest.raises(NotImplementedError, match=rf"2: {kind.lower()}'s .* does not add B A x.*plain LoRA"):
        NullSpace(model)


def test_an_adapter_that_is_added_after_the_capture(few):
    """It stands still, which is told, until another capture has heard it; then it learns, and is blind."""
    peft, model = package("peft"), adapted()
    _, opt, before = protecting(model, few)
    step_away(model, opt)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    second = {name: p.requires_grad_(True) for name, p in model.named_parameters() if ".second." in name}
    opt.add_param_group({"params": list(second.values())})
    start = {name: p.detach().clone() for name, p in second.items()}

    def moved():
        return max((p - start[name]).abs().max() for name, p in second.items())

    with pytest.warns(RuntimeWarning, match=r"lora_A.second.weight.* did not train yet .*they stand still"):
        step_away(model, opt)
    assert moved() == 0 and (model(few) - before).abs().max() < 1e-4
    with opt.protect():
        model(few).square().sum().backward()
    step_away(model, opt)
    assert moved() > 1e-3 and (model(few) - before).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_that_are_learnt_are_refused(kind):
    """A prompt encoder is multiplied by captured inputs alone: it stood still without a word."""
    peft = package("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(NotImplementedError, match="the adapter 'default' is a prompt that is learnt"):
        NullSpace(peft.get_peft_model(language_model(), config))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adapters_of_convolutions(dims):
    peft = package("peft")
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(4, 8, 3, padding=1, stride=2), nn.Tanh(), conv(8, 4, 1))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], use_rslora=True))
    x = torch.randn(1, 4, *[4] * dims)
    protection, opt, before = protecting(model, x)
    assert all(basis.target is None for basis in protection.bases.values()) and protection.coverage.held == 0
    step_away(model, opt, shape=(8, 4, *[4] * dims))
    assert (model(x) - before).abs().max() < 1e-4
    assert any(p.detach().any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("learned", [False, True], ids=["fresh", "captured again"])
def test_an_adapter_of_an_embedding(learned, tmp_path):
    """Its lora_A is looked up, not multiplied by: captured tokens keep their columns, the others learn."""
    peft = package("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 5))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    tokens, others = torch.tensor([[1, 2, 3], [3, 5, 1]]), torch.tensor([0, 4, 6, 7, 8])

    def learn(opt):
        for _ in range(5):
            opt.zero_grad()
            (model(torch.arange(9)) - 1).square().mean().backward()
            opt.step()

    protection, opt, before = protecting(model, tokens, share=0.6)
    if learned:  # by now other columns are not zero, and what is captured then is as it is
        learn(opt)
        tokens, others = torch.cat([tokens, torch.tensor([[0, 7, 7]])]), torch.tensor([4, 6, 8])
        with protection.capture():
            model(tokens).square().sum().backward()
        before = model(tokens).detach()
    assert protection.coverage.held == 0 and protection.coverage.unused == 4 * len(others)
    assert f"| columns of {9 - len(others)} tokens |" in protection.report()
    protection.save(tmp_path / "bases.safetensors")
    away = model(others).detach()
    learn(opt)
    assert (model(tokens) - before).abs().max() < 1e-4
    assert (model(others) - away).abs().max() > 1e-2
    loaded = NullSpace.load(tmp_path / "bases.safetensors", model)
    assert loaded.coverage == protection.coverage


def test_adapters_of_a_base_in_four_bits():
    """QLoRA: what multiplies by the base layer is an operation of bitsandbytes'."""
    peft, bitsandbytes = package("peft"), package("bitsandbytes")
    torch.manual_seed(0)
    settings = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
    layers = bitsandbytes.nn.Linear4bit(64, 128, **settings), bitsandbytes.nn.Linear4bit(128, 32, **settings)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to("cpu")
    x = torch.randn(8, 64)
    model(x)  # quantises
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    protection, opt, before = protecting(model, x, share=0.5)
    assert len(protection) == 2
    step_away(model, opt, shape=(64, 64))
    assert (model(x) - before).abs().max() < 1e-4
