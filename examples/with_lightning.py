"""LearnedOptimizer in Lightning, which tells it how many steps training will have. Optional argument: steps.

pip install . lightning -c constraints.txt
"""

import sys

import lightning
import torch
from torch.nn import functional as F

from learned_optim import LearnedOptimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))

    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def test_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        return LearnedOptimizer(self.parameters(), total_steps=int(self.trainer.estimated_stepping_batches))


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(1024, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, inputs.sin().sum(1, keepdim=True)), batch_size=32)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", default_root_dir="runs/with_lightning", logger=False, enable_progress_bar=False
    )
    model = Regression()
    (before,) = trainer.test(model, loader, verbose=False)
    trainer.fit(model, loader)
    (after,) = trainer.test(model, loader, verbose=False)
    print(f"loss {before['loss']:.3f} before, {after['loss']:.3f} after {STEPS} steps")
