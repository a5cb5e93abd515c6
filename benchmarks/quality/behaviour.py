"""What the rule does with a set of optimizer weights, as a few numbers. Runs are kept for as long as these stay the same: a rule that was
changed is another optimizer, with the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, nn

from learned_optim import LearnedOptimizer, OptimizerNetwork

SHAPES = ((12, 8), (8, 12), (6, 4, 3, 3), (8,))
STEPS, LOOKS = 90, (3, 30, 90)
SAME = 0.02  # relative; kernels and machines round, over so many steps by less


def behaviour(network: OptimizerNetwork) -> list[float]:
    """How far each of some tensors has moved on the way to a target, by noisy gradients, at three moments; without and with a horizon."""
    torch.set_num_threads(1)
    found = []
    for horizon in (None, STEPS):
        generator = Generator().manual_seed(0)
        targets = [torch.randn(shape, generator=generator) for shape in SHAPES]
        params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        optimizer = LearnedOptimizer(params, network, total_steps=horizon)
        for step in range(1, STEPS + 1):
            for param, target in zip(params, targets, strict=True):
                param.grad = param.detach() - target + 0.3 * torch.randn(param.shape, generator=generator)
            optimizer.step()
            if step in LOOKS:
                found += [float(f"{param.detach().norm().item():.4g}") for param in params]
    return found


def is_of(run: Mapping[str, Any], weights: str, numbers: Sequence[float]) -> bool:
    """Whether a run is a baseline's, or of these weights and a rule that does the same with them."""
    if "weights" not in run:
        return True
    theirs = run.get("behaviour", ())
    alike = len(theirs) == len(numbers) and all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(theirs, numbers, strict=True))
    return run["weights"] == weights and alike
