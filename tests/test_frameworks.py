"""Other people's packages, the real ones: optimizers, and frameworks that own the training loop."""

import pytest
import torch

import gradproj
from training import assert_same, loss, model_and_batches, parameters, protect, train, train_by_hand, twins


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.05])
def test_lightning_automatic_optimization(clip, wrapping, tmp_path):
    """The trainer calls step(closure) with zero_grad(), backward() and clipping inside the closure."""
    lightning = package("lightning")
    model, twin, batches = twins()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.logged = []

        def on_train_batch_start(self, batch, index):
            protect(self.model, self.projector, batch[0])

        def training_step(self, batch, index):
            return loss(self.model, batch[1])

        def configure_optimizers(self):
            opt, self.projector = wrapping(torch.optim.AdamW(self.model.parameters(), lr=0.01), save_directions=True)
            gradproj.log_to(self.projector, lambda values, step: self.logged.append(values["applied"]))
            return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1)}

    pairs = [torch.stack(pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=clip,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(pairs, batch_size=None))
    assert module.logged == [1.0] * 6
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)["optimizer_states"][0]["state"][0]
    assert saved.keys() == {"step", "exp_avg", "exp_avg_sq", "protected_0"}

    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        direction = torch.autograd.grad(loss(twin, x, 1.0), list(twin.parameters()))
        plain.zero_grad()
        loss(twin, y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        gradproj.project_([p.grad for p in twin.parameters()], direction)
        plain.step()
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_lightning_protect_in_training_step_is_refused(wrapping, tmp_path):
    """training_step() runs inside the closure: the message names the hook that does not."""
    lightning = package("lightning")
    model, batches = model_and_batches()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            protect(self.model, self.projector, batch)
            return loss(self.model, batch)

        def configure_optimizers(self):
            opt, self.projector = wrapping(torch.optim.SGD(self.model.parameters(), lr=0.1))
            return opt

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match=r"on_train_batch_start\(\)"):
        trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))


# --- Accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_accelerate(wrapping):
    """prepare() wraps the optimizer, reloads its state, and skips step() and zero_grad() while gradients accumulate."""
    accelerate = package("accelerate")
    model, twin, batches = twins()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    opt, projector = wrapping(torch.optim.AdamW(model.parameters(), lr=0.01), save_directions=True)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    prepared, opt, schedule = accelerator.prepare(model, opt, schedule)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        with accelerator.accumulate(prepared):
            if accelerator.sync_gradients:
                with projector.protect():
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
        direction = torch.autograd.grad(loss(twin, batches[i + 2], 1.0), list(twin.parameters()))
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        gradproj.project_([p.grad for p in twin.parameters()], direction)
        plain.step()
        rate.step()
        plain.zero_grad()
    assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-6)


def test_accelerate_s_own_wrapper_has_no_hooks_to_attach_to():
    accelerate = package("accelerate")
    model, _ = model_and_batches()
    opt = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        TypeError, match="AcceleratedOptimizer has no step hooks.*attach to the optimizer that it wraps"
    ):
        gradproj.attach(opt)
    gradproj.attach(opt.optimizer)
