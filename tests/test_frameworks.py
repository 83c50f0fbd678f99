"""Other people's packages, the real ones: optimizers, and frameworks that own the training loop."""

import pytest
import torch

import gradproj
from training import (
    assert_same,
    closure,
    descend,
    direction,
    loss,
    model_and_batches,
    parameters,
    project_by_hand,
    protect,
    train,
    train_by_hand,
    twins,
)


def package(name):
    return pytest.importorskip(name, reason=f"needs the package {name}: pip install '.[test]'")


@pytest.mark.parametrize("name", ["Lion", "AdaBelief", "Adan", "Lamb"])
def test_pytorch_optimizer(name, wrapping):
    optimizer = getattr(package("pytorch_optimizer"), name)
    model, twin, batches = twins()
    result = train(model, *wrapping(optimizer(model.parameters(), lr=0.01)), batches)
    assert_same(result, train_by_hand(twin, optimizer(twin.parameters(), lr=0.01), batches))


def test_schedulefree(wrapping):
    """Its parameters are an average in eval() and not in train(): modes that the wrapper has to leave alone."""
    optimizer = package("schedulefree").AdamWScheduleFree
    model, twin, batches = twins()
    inner, plain = (optimizer(m.parameters(), lr=0.01, warmup_steps=2) for m in (model, twin))
    inner.train()
    plain.train()
    assert_same(train(model, *wrapping(inner), batches), train_by_hand(twin, plain, batches))
    inner.eval()
    plain.eval()
    assert_same(parameters(model), parameters(twin))


def distance(some, others):
    return max((a - b).abs().max() for a, b in zip(some, others, strict=True))


@pytest.mark.filterwarnings("ignore:NullSpace. no product", "ignore:step.. before anything was captured")
@pytest.mark.parametrize("origin, name", [("schedulefree", "AdamWScheduleFree"), ("schedulefree", "SGDScheduleFree"),
                                          ("pytorch_optimizer", "SPlus")])  # fmt: skip
def test_weights_that_are_evaluated_instead_of_those_that_are_trained(origin, name, wrapping):
    """eval() put an average in place that nothing had pinned: outputs moved by 0.7 without a word. What is held must
    not move either, though the optimizer has trained it before the capture."""
    model, batches = model_and_batches()
    x, optimizer = batches[0][:2], getattr(package(origin), name)(model.parameters(), lr=0.05)
    protection = gradproj.NullSpace(model, share=0.6, modules=lambda name, _: name == "0")
    opt, _ = wrapping(optimizer, protection=protection)
    opt.train()
    for batch in batches[:3]:
        descend(model, opt, batch, target=1.0)
    with protection.capture():
        loss(model, x).backward()
    before = model(x).detach()
    evaluated = []
    for batch in batches:
        descend(model, opt, batch, target=2.0)
        assert (model(x) - before).abs().max() < 1e-5
        trained = parameters(model)
        opt.eval()
        assert (model(x) - before).abs().max() < 1e-5
        evaluated.append(distance(parameters(model), trained))
        opt.train()
        assert (model(x) - before).abs().max() < 1e-5
    assert max(evaluated) > 1e-3


def test_modes_are_forwarded_where_there_are_any(wrapping):
    model, _ = model_and_batches()
    optimizer = package("schedulefree").SGDScheduleFree(model.parameters(), lr=0.1)
    opt, protected = wrapping(optimizer, protection=gradproj.NullSpace(model))
    assert callable(opt.eval) and callable(optimizer.eval)
    protected.detach()
    assert "eval" not in vars(optimizer)
    assert not hasattr(wrapping(torch.optim.SGD(model.parameters(), lr=0.1))[0], "eval")


UNHEARD = {
    "SAM": (TypeError, r"SAM.second_step\(\) calls no step hooks but .* base_optimizer: pass that AdamW"),
    "Lookahead": (TypeError, "Lookahead wraps an optimizer .*: pass the optimizer that it wraps"),
    "LayerWiseDummyOptimizer": (NotImplementedError, "changes weights during the backward pass"),
    "LOMO": (NotImplementedError, "changes weights during the backward pass"),
}


class Lomo(torch.optim.Optimizer):
    """As in lomo-optim, of which the Trainer calls ``fused_backward``, never ``step``."""

    def fused_backward(self, loss, lr): ...


@pytest.mark.parametrize("name", UNHEARD)
def test_optimizers_that_change_weights_where_no_hook_is_called(name, wrapping):
    """Through the Trainer a null space leaked under LOMO, and under SAM by first_step() and second_step()."""
    model, _ = model_and_batches()
    p = list(model.parameters())
    optimizer = {
        "SAM": lambda: package("pytorch_optimizer").SAM(p, base_optimizer=torch.optim.AdamW, lr=0.1),
        "Lookahead": lambda: package("pytorch_optimizer").Lookahead(torch.optim.AdamW(p)),
        "LayerWiseDummyOptimizer": lambda: package("transformers").trainer_pt_utils.LayerWiseDummyOptimizer({}),
        "LOMO": lambda: Lomo(p, {}),
    }[name]()
    error, message = UNHEARD[name]
    with pytest.raises(error, match=message):
        wrapping(optimizer, protection=gradproj.NullSpace(model))


@pytest.mark.parametrize("steps", ["two", "closure"])
def test_sam_by_its_base_optimizer(steps, wrapping):
    model, batches = model_and_batches()
    x = batches[0][:2]
    sam = package("pytorch_optimizer").SAM(model.parameters(), base_optimizer=torch.optim.AdamW, lr=0.1)
    protection = gradproj.NullSpace(model, share=0.6)
    _, protected = wrapping(sam.base_optimizer, protection=protection)
    with protected.protect():
        loss(model, x).backward()
    before, weights = model(x).detach(), parameters(model)
    for batch in batches:
        run = closure(model, sam, batch, target=2.0)
        run()
        if steps == "two":
            sam.first_step(zero_grad=True)
            run()
            sam.second_step()
        else:
            sam.step(run)
    assert (model(x) - before).abs().max() < 1e-5 and distance(parameters(model), weights) > 0.01


def llama(**settings):
    transformers = package("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_null_space_of_a_language_model(tmp_path):
    """q, k, v share a basis, and so do gate and up; the head is tied to the embedding; padding does not count."""
    model = llama(tie_word_embeddings=True)
    tokens, mask = torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    protection = gradproj.NullSpace(model, share=0.95)
    with protection.capture():
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    assert len(protection) == 14 and "lm_head" not in protection.bases
    first = [protection.bases[f"model.layers.0.self_attn.{name}_proj"].vectors for name in "qkv"]
    assert len({u.untyped_storage().data_ptr() for u in first}) == 1
    assert all(basis.tokens <= 11 for basis in protection.bases.values())
    before = model(input_ids=tokens[:1]).logits[:, :-1].detach()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), protection)
    for _ in range(10):
        opt.zero_grad()
        batch = torch.randint(50, (4, 7))
        model(input_ids=batch, labels=batch).loss.backward()
        opt.step()
    assert (model(input_ids=tokens[:1]).logits[:, :-1] - before).abs().max() < 1e-4
    assert (
        model(input_ids=tokens[1:, 4:]).logits - llama(tie_word_embeddings=True)(input_ids=tokens[1:, 4:]).logits
    ).abs().max() > 0.01
    protection.save(tmp_path / "bases.safetensors")
    again = gradproj.NullSpace.load(tmp_path / "bases.safetensors", llama(tie_word_embeddings=True))
    assert again.report() == protection.report()  # the bytes too: what layers share is written, and held, once


def test_conv1d_of_transformers():
    """Its weight lies transposed."""
    conv1d = package("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    model = torch.nn.Sequential(conv1d(6, 4), torch.nn.Tanh(), conv1d(3, 6))
    x = torch.randn(2, 4)
    protection = gradproj.NullSpace(model, share=0.95)
    with protection.capture():
        model(x).square().sum().backward()
    before = model(x).detach()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), protection)
    for _ in range(10):
        opt.zero_grad()
        (model(torch.randn(8, 4)) - 1).square().mean().backward()
        opt.step()
    assert (model(x) - before).abs().max() < 1e-5
    assert (model(torch.randn(8, 4)) - 1).square().mean() < 1


def test_lora_becomes_blind_to_protected_inputs():
    """Exact: on protected inputs the adapted model is the base model, whatever the adapters learn."""
    peft = package("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    tokens = torch.randint(50, (1, 5))
    before = model(input_ids=tokens).logits.detach()
    protection = gradproj.NullSpace(model, share=0.95)
    with protection.capture():
        model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(trained, lr=0.05), protection)
    kept = model(input_ids=tokens).logits[:, :-1].detach()
    torch.testing.assert_close(kept, before[:, :-1], rtol=0, atol=1e-5)
    batch = torch.randint(50, (8, 7))
    losses = []
    for _ in range(20):
        opt.zero_grad()
        value = model(input_ids=batch, labels=batch).loss
        value.backward()
        opt.step()
        losses.append(value.item())
    assert (model(input_ids=tokens).logits[:, :-1] - kept).abs().max() < 1e-3
    assert losses[-1] < losses[0] - 0.1


def fit(tmp_path, model, training_step, on_train_batch_start, configure_optimizers, batches, **settings):
    """One epoch of a LightningModule made of these; returns the trainer."""
    lightning = package("lightning")
    hooks = {"on_train_batch_start": on_train_batch_start, "configure_optimizers": configure_optimizers}
    module = type("Module", (lightning.LightningModule,), {"training_step": training_step, **hooks})()
    module.model = model
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings |= {"accelerator": "cpu", "max_epochs": 1, **dict.fromkeys(quiet, False)}
    trainer = lightning.Trainer(default_root_dir=tmp_path, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.05])
def test_lightning_automatic_optimization(clip, wrapping, tmp_path):
    """The trainer calls step(closure) with zero_grad(), backward() and clipping inside the closure."""
    model, twin, batches = twins()
    opt, protected = wrapping(torch.optim.AdamW(model.parameters(), lr=0.01))
    logged = []
    opt.register_step_post_hook(lambda *_: logged.append(bool(protected.last.applied)))
    trainer = fit(
        tmp_path,
        model,
        lambda self, batch, index: loss(model, batch[1]),
        lambda self, batch, index: protect(model, protected, batch[0]),
        lambda self: {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1)},
        [torch.stack(pair) for pair in zip(batches[::2], batches[1::2], strict=True)],
        gradient_clip_val=clip,
    )
    assert logged == [True] * 6
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)["optimizer_states"][0]["state"][0]
    assert saved.keys() == {"step", "exp_avg", "exp_avg_sq", "protected_0"}

    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        d = direction(twin, x)
        plain.zero_grad()
        loss(twin, y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        project_by_hand(twin, d)
        plain.step()
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_lightning_protect_in_training_step_is_refused(wrapping, tmp_path):
    """training_step() runs inside the closure: the message names the hook that does not."""
    model, batches = model_and_batches()
    opt, protected = wrapping(model)

    def training_step(self, batch, index):
        protect(model, protected, batch)
        return loss(model, batch)

    with pytest.raises(RuntimeError, match=r"on_train_batch_start\(\)"):
        fit(tmp_path, model, training_step, lambda *_: None, lambda self: opt, batches)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before prepare()", "after prepare()"])
def test_accelerate(when, wrapping):
    """prepare() wraps the optimizer, reloads its state, and skips step() and zero_grad() while gradients accumulate."""
    accelerate = package("accelerate")
    model, twin, batches = twins()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    if when == "before prepare()":
        opt, protected = wrapping(opt)
    prepared, opt, schedule = accelerator.prepare(model, opt, torch.optim.lr_scheduler.StepLR(opt, 2))
    if when == "after prepare()":
        opt, protected = wrapping(opt)  # the hooks are on the optimizer in Accelerate's, which has none
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        with accelerator.accumulate(prepared):
            if accelerator.sync_gradients:
                with protected.protect():
                    accelerator.backward(loss(prepared, x, 1.0))
            accelerator.backward(loss(prepared, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
            opt.step()
            schedule.step()
            opt.zero_grad()
    assert {"protected_0", "exp_avg"} < opt.state_dict()["state"][0].keys()

    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    rate = torch.optim.lr_scheduler.StepLR(plain, 2)
    for i in range(0, len(batches), 4):
        ((loss(twin, batches[i + 1]) + loss(twin, batches[i + 3])) / 2).backward()
        d = direction(twin, batches[i + 2])
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        project_by_hand(twin, d)
        plain.step()
        rate.step()
        plain.zero_grad()
    assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-6)
