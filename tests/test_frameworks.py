"""Other people's packages, the real ones: optimizers, and frameworks that own the training loop."""

import pytest
import torch

import gradproj
from training import (
    assert_same,
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


# --- optimizers -----------------------------------------------------------------------------------------------------


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


# --- Lightning ------------------------------------------------------------------------------------------------------


def fit(tmp_path, model, training_step, on_train_batch_start, configure_optimizers, batches, **settings):
    """One epoch of a LightningModule made of these; returns the trainer."""
    lightning = package("lightning")
    hooks = {"on_train_batch_start": on_train_batch_start, "configure_optimizers": configure_optimizers}
    module = type("Module", (lightning.LightningModule,), {"training_step": training_step, **hooks})()
    module.model = model
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.05])
def test_lightning_automatic_optimization(clip, wrapping, tmp_path):
    """The trainer calls step(closure) with zero_grad(), backward() and clipping inside the closure."""
    model, twin, batches = twins()
    opt, protected = wrapping(torch.optim.AdamW(model.parameters(), lr=0.01))
    logged = []
    gradproj.log_to(protected, lambda values, step: logged.append(values["applied"]))
    trainer = fit(
        tmp_path,
        model,
        lambda self, batch, index: loss(model, batch[1]),
        lambda self, batch, index: protect(model, protected, batch[0]),
        lambda self: {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1)},
        [torch.stack(pair) for pair in zip(batches[::2], batches[1::2], strict=True)],
        gradient_clip_val=clip,
    )
    assert logged == [1.0] * 6
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


# --- Accelerate -----------------------------------------------------------------------------------------------------


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
