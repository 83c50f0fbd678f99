"""Lightning with a null space: a callback captures before training begins and attaches to the module's optimizer."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradproj
from gradproj.integrations.lightning import ProtectCallback


class Fit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))

    def loss(self, x, y):
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, _):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def main():
    lightning.seed_everything(0, verbose=False)
    few = torch.randn(8, 16)
    capability = [(few, torch.zeros(8, 4))]
    data = DataLoader(TensorDataset(torch.randn(256, 16), torch.ones(256, 4)), batch_size=16)
    model = Fit()
    before = model.net(few).detach()
    protect = ProtectCallback(
        gradproj.NullSpace(model.net, share=0.5), capability, lambda m, batch: m.loss(*batch)
    )  # <-
    trainer = lightning.Trainer(
        max_epochs=3,
        callbacks=[protect],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    print(f"outputs on the capability's inputs moved by {(model.net(few) - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
