"""Specialises the default weights for your own problem. Arguments, optional: minutes, and the Hub's "user/name" to push them to.

pip install . -c constraints.txt
"""

import sys

import torch
from torch import nn

from learned_optim import LearnedOptimizer
from learned_optim.meta_train import ModuleTask, meta_train

STEPS, (MINUTES, *HUB) = 100, sys.argv[1:] or ["5"]


def mine(generator):  # your problem: a net that fits eight waves of random heights and frequencies
    x = torch.linspace(-3, 3, 128)[:, None]
    y = (torch.randn(8, generator=generator) * torch.sin(4 * x * torch.rand(8, generator=generator))).sum(1, keepdim=True)
    return ModuleTask(lambda: nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)), [(x, y / y.std())], nn.MSELoss())


def final_loss(make_optimizer, seed):  # an ordinary training run
    task = mine(torch.manual_seed(1000 + seed))
    model, (x, y) = task.build(), task.batch(None)
    optimizer = make_optimizer(model.parameters())
    for _ in range(STEPS):
        model.zero_grad()
        task.criterion(model(x), y).backward()
        optimizer.step()
    return task.criterion(model(x), y).item()


network = meta_train(mine, steps=STEPS, budget=f"{MINUTES} min", folder="runs/mine" if HUB else None).network
rows = {name: lambda p, w=w: LearnedOptimizer(p, w, total_steps=STEPS) for name, w in (("default", "default"), ("mine", network))}
rows |= {f"AdamW {lr}": lambda p, lr=lr: torch.optim.AdamW(p, lr) for lr in (0.003, 0.01, 0.03, 0.1)}
for name, make_optimizer in rows.items():  # on problems that meta-training has not seen
    losses = torch.tensor([final_loss(make_optimizer, seed) for seed in range(10)])
    print(f"{name:12} final loss {losses.mean():.4f} ± {losses.std():.4f} over 10 fresh problems")
if HUB:
    print("pushed as revision", network.push_to_hub(*HUB, folder="runs/mine"))
