"""The callback inside the real Lightning Trainer."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradproj

lightning = pytest.importorskip("lightning")
from gradproj.hf import own_text
from gradproj.integrations.lightning import ProtectCallback
from language import character_tokenizer, language_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FEW = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))


class Module(lightning.LightningModule):
    def __init__(self, automatic=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
        self.automatic_optimization = automatic

    def loss(self, x):
        return (self.net(x) - 1.0).square().mean()

    def training_step(self, batch, _):
        loss = self.loss(batch[0])
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.1)


class Save(lightning.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def fit(module, folder, callback, epochs=2, **settings):
    data = TensorDataset(torch.randn(64, 12, generator=torch.Generator().manual_seed(1)))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, callbacks=[callback, Save()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=16), **settings)


def callback(module, seen=None):
    def loss(module, batch):
        if seen is not None:
            seen.append(batch)
        return module.net(batch).square().sum()

    return ProtectCallback(gradproj.NullSpace(module.net, share=0.9), [FEW], loss)


@pytest.mark.parametrize("automatic", [True, False])
def test_what_was_captured_stays(tmp_path, automatic):
    module = Module(automatic)
    before = module.net(FEW).detach()
    protect = callback(module)
    for _ in range(2):  # a second fit() attaches anew, and keeps what the first has captured
        fit(module, tmp_path, protect)
    torch.testing.assert_close(module.net(FEW), before, rtol=0, atol=1e-5)
    assert not torch.equal(module.net[0].weight, Module().net[0].weight)


class Language(Module):
    def __init__(self):
        super().__init__()
        self.net = language_model(hidden_size=128)

    def loss(self, x):
        tokens = (x.abs() * 10).long() % 50
        return self.net(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("mixed", [False, True])
def test_own_text_is_captured(tmp_path, mixed):
    """Alone, or in addition to data."""
    module, tokenizer, data = Language(), character_tokenizer(), torch.randint(50, (2, 7))
    torch.manual_seed(3)
    rows = [own_text(module.net, tokenizer, 1, seed=3), *([data] if mixed else [])]
    settings = {"data": [data], "loss": lambda module, batch: module.net(batch, labels=batch).loss} if mixed else {}
    protect = ProtectCallback(gradproj.NullSpace(module.net, share=0.9), tokenizer=tokenizer, own=1, **settings)
    fit(module, tmp_path, protect)
    fresh, other = Language().net, torch.randint(50, (4, 9))
    moved = (module.net(other).logits - fresh(other).logits).abs().max()
    assert moved > 0.03
    for kept in rows:
        assert (module.net(kept).logits - fresh(kept).logits)[:, :-1].abs().max() < 0.02 * moved
    assert ProtectCallback(gradproj.NullSpace(fresh), tokenizer=tokenizer).own == 128


def test_resumes_with_the_checkpoints_bases(tmp_path):
    whole, resumed, seen = Module(), Module(), []
    fit(whole, tmp_path / "whole", callback(whole), epochs=4)
    fit(resumed, tmp_path / "resumed", callback(resumed, seen), epochs=4, ckpt_path=tmp_path / "whole" / "1.ckpt")
    assert not seen
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bad_protection():
    with pytest.raises(TypeError, match="must be a NullSpace, got Directions.*on_train_batch_start"):
        ProtectCallback(gradproj.Directions(), [], None)
    protection = gradproj.NullSpace(Module().net)
    with pytest.raises(TypeError, match="needs the model's tokenizer: pass tokenizer="):
        ProtectCallback(protection)
    with pytest.raises(TypeError, match="data need a loss"):
        ProtectCallback(protection, [FEW])
