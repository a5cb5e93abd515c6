"""LearnedOptimizer in a training loop of one's own with accelerate, checkpoints included. Optional argument: steps.

    pip install . accelerate -c constraints.txt

On several processes, and with FSDP2, which spreads parameters, gradients and optimizer state over GPUs (on CPUs accelerate does not):

    accelerate launch --num_processes 2 examples/with_accelerate.py
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP examples/with_accelerate.py
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F

from learned_optim import LearnedOptimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200

if __name__ == "__main__":
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    inputs = torch.randn(1024, 8)
    data = torch.utils.data.TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = LearnedOptimizer(model.parameters(), total_steps=STEPS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))

    losses = []
    while len(losses) < 2 * STEPS:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state("runs/with_accelerate")  # load_state refuses other optimizer weights
    accelerator.print(f"loss {losses[0]:.3f} at the first step, {sum(losses[-32:]) / 32:.3f} over the last epoch")
    accelerator.end_training()
