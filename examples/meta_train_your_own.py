"""Meta-trains the default weights on a problem of your own and compares them on fresh ones.

Optional arguments: meta-steps, and "user/name" to push the weights to the Hugging Face Hub with a model card of what was measured.
"""

import sys

import torch
from torch import Generator, nn
from torch.nn.functional import mse_loss

from learned_optim import LearnedOptimizer, load_network
from learned_optim.meta_train import MetaTrainConfig, ModuleTask, meta_train

STEPS, META_STEPS = 100, int(sys.argv[1]) if len(sys.argv) > 1 else 80  # some three minutes on one core


def mine(generator):  # your problem: a net that fits eight waves of random heights and frequencies
    x = torch.linspace(-3, 3, 128)[:, None]
    y = (torch.randn(8, generator=generator) * torch.sin(4 * x * torch.rand(8, generator=generator))).sum(1, keepdim=True)
    return ModuleTask(lambda: nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)), [(x, y / y.std())], mse_loss)


def final_loss(make_optimizer, seed):  # an ordinary training run
    task = mine(torch.manual_seed(1000 + seed))
    model, (x, y) = task.build(), task.batch(Generator())
    optimizer = make_optimizer(model.parameters())
    for _ in range(STEPS):
        model.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return mse_loss(model(x), y).item()


if __name__ == "__main__":
    config = MetaTrainConfig(meta_steps=META_STEPS, horizon_min=STEPS, horizon_max=STEPS, truncation=STEPS, horizon_known=1.0)
    folder = "runs/meta_train_your_own" if len(sys.argv) > 2 else None
    network = meta_train({"mine": mine}, config, network=load_network("default"), folder=folder, progress=print).network
    rows = {name: lambda p, w=w: LearnedOptimizer(p, w, total_steps=STEPS) for name, w in (("default", "default"), ("mine", network))}
    rows |= {f"AdamW {lr}": lambda p, lr=lr: torch.optim.AdamW(p, lr) for lr in (0.001, 0.003, 0.01, 0.03)}
    for name, make_optimizer in rows.items():
        losses = torch.tensor([final_loss(make_optimizer, seed) for seed in range(5)])
        print(f"{name:12} final loss {losses.mean():.4f} ± {losses.std():.4f} over 5 fresh problems")
    if folder:
        commit = network.push_to_hub(sys.argv[2], folder=folder)
        print(f'LearnedOptimizer(model.parameters(), "{sys.argv[2]}", revision="{commit}")')
