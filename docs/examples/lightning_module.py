"""Lightning, automatic optimization: wrap in configure_optimizers, capture before training begins."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradproj


class Fit(lightning.LightningModule):
    def __init__(self, capability):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
        self.capability = capability

    def loss(self, x, y):
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, _):
        return self.loss(*batch)

    def configure_optimizers(self):
        self.protection = gradproj.NullSpace(self.net, share=0.5)  # <-
        return gradproj.ProjectedOptimizer(torch.optim.AdamW(self.net.parameters(), lr=1e-2), self.protection)  # <-

    def on_train_start(self):
        with self.protection.capture():  # <-
            for batch in self.capability:
                self.loss(*batch).backward()


def main():
    lightning.seed_everything(0, verbose=False)
    few = torch.randn(8, 16)
    capability = [(few, torch.zeros(8, 4))]
    data = DataLoader(TensorDataset(torch.randn(256, 16), torch.ones(256, 4)), batch_size=16)
    model = Fit(capability)
    before = model.net(few).detach()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, data)
    print(f"outputs on the capability's inputs moved by {(model.net(few) - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
