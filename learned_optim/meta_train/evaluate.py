"""Evaluation on held-out tasks, beside tuned AdamW: what decides which of a run's weights are kept.

Shapes: `T` steps, `R` replicas (seeds) of a task, `N` coordinates.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import State, init_state, update
from . import distributed
from .config import MetaTrainConfig
from .tasks import Family, sampled
from .unroll import Optimizees, Rule, Unroll, begin, derive_seed

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
REPLICAS = 2
FLOOR = 0.01  # in units of the first loss: tasks that are solved do not decide
MODES = {"no horizon": False, "horizon": True}

Curves = dict[str, list[float]]  # mean loss over the replicas after each step


class Evaluation:
    """Held-out tasks, `config.held_out_tasks` of each family, that are trained for `config.horizon_max` steps.

    Args:
        families: the tasks are sampled from seeds that meta-training never uses.
        adamw: AdamW's curve with its best learning rate and schedule on each task, where an earlier evaluation has found them out.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        config: MetaTrainConfig,
        device: torch.device | str,
        adamw: dict[str, list[float]] | None = None,
    ) -> None:
        self.unrolls: dict[int, Unroll] = {}
        numbered = itertools.product(families.items(), range(1, config.held_out_tasks + 1))
        tasks = {name if number == 1 else f"{name} {number}": family for (name, family), number in numbered}
        self.names = list(tasks)
        for index, (name, family) in enumerate(tasks.items()):
            if distributed.is_mine(index):
                seed = derive_seed(config.seed, "held out", name)
                task = sampled(family, Generator().manual_seed(seed), seed)
                options = {"horizon": config.horizon_max, "horizon_known": False, "validation": config.validation}
                self.unrolls[index] = begin(task, seed, None, REPLICAS, config.network, device, **options)
        self.adamw = adamw or self._over_tasks(best_adamw)

    def __call__(self, network: OptimizerNetwork) -> dict[str, Any]:
        """Trains the tasks with the network.

        Returns:
            "score", the geometric mean over tasks and modes of the final loss over AdamW's, below 1 where the network is ahead; "ratios",
            the same for each task and mode; and "curves".
        """

        def curves(unroll: Unroll) -> Curves:
            rule = functools.partial(update, network)
            params, _, buffers = unroll.optimizees
            state = init_state(unroll.layout, network.config, params)  # the network may be another one than the config's
            fresh = replace(unroll, optimizees=Optimizees(params, state, buffers))
            return {mode: train(fresh, rule, known) for mode, known in MODES.items()}

        found = self._over_tasks(curves)
        ratios = {name: {mode: final(curve) / final(self.adamw[name]) for mode, curve in modes.items()} for name, modes in found.items()}
        logs = [math.log(ratio) for modes in ratios.values() for ratio in modes.values()]
        return {"score": math.exp(sum(logs) / len(logs)), "ratios": ratios, "curves": found}

    def _over_tasks(self, function: Any) -> dict[str, Any]:
        """`function` of every task's unroll, by the family's name; the processes share the tasks out."""
        found = distributed.gather({index: function(unroll) for index, unroll in self.unrolls.items()})
        return {self.names[index]: value for index, value in found.items()}


def train(unroll: Unroll, rule: Rule, horizon_known: bool) -> list[float]:
    """Trains for the horizon. Returns the loss after each step over the first one, the mean over the replicas."""
    unroll = replace(unroll, horizon_known=horizon_known)
    now, losses = unroll.optimizees, []
    with torch.no_grad():
        for t in range(unroll.horizon):
            loss, now = unroll.train_step(t, now, rule)
            losses.append(loss.detach())
        losses.append(unroll.measure(unroll.horizon, now))
    relative = (torch.stack(losses[1:]) / unroll.first_loss).mean(1)
    return [float(f"{value:.5g}") for value in relative.tolist()]


def final(curve: Sequence[float]) -> float:
    """What a run ends at: the mean over the last tenth of its steps, on top of a floor; infinite where it diverged."""
    tail = curve[-max(1, len(curve) // 10) :]
    value = FLOOR + sum(tail) / len(tail)
    return value if math.isfinite(value) else math.inf


def best_adamw(unroll: Unroll) -> list[float]:
    """AdamW's curve with the best of five learning rates, constant or with a cosine to zero."""
    grid = itertools.product(LEARNING_RATES, (False, True))
    return min((train(unroll, adamw(unroll, lr, cosine), False) for lr, cosine in grid), key=final)


def adamw(unroll: Unroll, lr: float, cosine: bool) -> Rule:
    """`torch.optim.AdamW` in the place of the rule. It is elementwise, so all replicas are one parameter (R, N)."""
    leaf = nn.Parameter(unroll.optimizees.params.clone())
    optimizer = torch.optim.AdamW([leaf], lr=lr)
    schedule = CosineAnnealingLR(optimizer, unroll.horizon) if cosine else None

    def rule(layout: Layout, grad: Tensor, state: State, total_steps: Tensor) -> tuple[Tensor, State]:
        before, leaf.grad = leaf.detach().clone(), grad
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return leaf.detach() - before, state

    return rule
