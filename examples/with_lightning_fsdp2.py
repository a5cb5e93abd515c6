"""Lightning with FSDP2: parameters, gradients and optimizer state are spread over its processes, two of them. Optional argument: steps.

pip install . lightning -c constraints.txt
"""

import sys

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from with_lightning import Regression

STEPS, DEVICES = int(sys.argv[1]) if len(sys.argv) > 1 else 200, 2


class Sharded(Regression):
    def configure_model(self):
        if not isinstance(self.net, FSDPModule):  # Lightning comes here before each test too
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # of a large model each block first


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(1024, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, inputs.sin().sum(1, keepdim=True)), batch_size=32)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        devices=DEVICES,
        strategy=ModelParallelStrategy(data_parallel_size=DEVICES, tensor_parallel_size=1),
        default_root_dir="runs/with_lightning_fsdp2",
        logger=False,
        enable_progress_bar=False,
    )
    model = Sharded()
    (before,) = trainer.test(model, loader, verbose=False)
    trainer.fit(model, loader)
    (after,) = trainer.test(model, loader, verbose=False)
    if trainer.is_global_zero:
        print(f"loss {before['loss']:.3f} before, {after['loss']:.3f} after {STEPS} steps")
