"""What the rule does with a set of optimizer weights, as a few numbers. Runs are kept for as long as these stay the same: a rule that was
changed is another optimizer, with the same weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, nn

from learned_optim import LearnedOptimizer, OptimizerNetwork

SHAPES = ((12, 8), (8, 12), (6, 4, 3, 3), (8,))
STEPS, LOOKS = 40, (3, 6, 12, 40)
HORIZONS = None, STEPS, 50 * STEPS
# By how much of one direction a step's gradient is; the rest is noise. Gradients that agree; that are noise; that agree at first, then turn
# back, then leap forth and back; that turn back while they get shorter. Warm-up and hypergradient have their say here.
SCENES: dict[str, Callable[[int], float]] = {
    "agree": lambda step: 1.0,
    "noise": lambda step: 0.0,
    "turn": lambda step: 0.7 if step <= 4 else -1.5 if step <= 7 else 1.5 * (-1) ** step,
    "shrink": lambda step: 1.5 if step <= 3 else -0.4 if step <= 12 else 0.1,
}
TRAINED = {"trained": "agree", "trained, and noise": "noise"}  # scenes with weights that are no longer as they were drawn
SAME = 2e-3  # relative; kernels and machines round by less


def behaviour(network: OptimizerNetwork) -> list[float]:
    """How far each of some tensors has gone at some moments of each scene, without a horizon, with one and with a far one."""
    torch.set_num_threads(1)
    found = []
    for name, horizon in itertools.product((*SCENES, *TRAINED), HORIZONS):
        scene, generator = TRAINED.get(name, name), Generator().manual_seed(0)
        directions = [torch.randn(shape, generator=generator) for shape in SHAPES]
        params = [nn.Parameter(torch.full(shape, float(name in TRAINED))) for shape in SHAPES]
        looked_at = [(param, param.detach().clone()) for param in params]
        optimizer = LearnedOptimizer(params, network, total_steps=horizon)
        for step in range(1, STEPS + 1):
            for param, direction in zip(params, directions, strict=True):
                param.grad = SCENES[scene](step) * direction + 0.6 * torch.randn(param.shape, generator=generator)
            optimizer.step()
            if step in LOOKS:
                found += [float(f"{(param.detach() - start).norm().item():.4g}") for param, start in looked_at]
    return found


def is_of(run: Mapping[str, Any], weights: str, numbers: Sequence[float]) -> bool:
    """Whether a run is a baseline's, or of these weights and a rule that does the same with them."""
    if "weights" not in run:
        return True
    theirs = run.get("behaviour", ())
    alike = len(theirs) == len(numbers) and all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(theirs, numbers, strict=True))
    return run["weights"] == weights and alike
