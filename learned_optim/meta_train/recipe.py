"""How to meta-train on somebody's own problem, where no configuration says it: evolution strategies over whole training runs.

One kind of problem and one length of run are all that these optimizer weights are for. So what counts is the loss at the end, and all of
them may change for it, the step sizes above all. Backprop through whole runs could see that too, but where steps are long its gradients are
chaotic. Evolution strategies (Salimans et al. 2017) smooth them, and need no more than training runs of any module. VeLO (Metz et al. 2022)
was meta-trained so, too, for all problems at once.

How many runs make a meta-step follows from the budget and from the time that a run takes, which is measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Generator

from ..network import OptimizerNetwork
from . import distributed
from .config import MetaTrainConfig
from .estimators import evolve
from .evaluate import LEARNING_RATES, MODES, REPLICAS
from .tasks import Family, ModuleTask, Task, sampled
from .unroll import begin

STEPS = 100  # of a training run, where nobody says
META_STEPS = 300  # at most
ENOUGH = 40  # meta-steps that a budget should have room for, before each of them may take more runs
FEWEST = 10  # meta-steps, fewer of which are not worth beginning
EVALUATIONS = 8
SHARE = 0.05  # of the runs, for evaluations
PROBE = 3  # steps that are timed

# Pairs, replicas and unrolls of a meta-step. Fewer than FULL pairs say too little of the LSTM's weights, so these stay as they are.
SIZES = ((8, 2, 2), (8, 2, 1), (8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1))
FULL = 8


def recipe(
    families: Mapping[str, Family], network: OptimizerNetwork, steps: int, seconds: float | None, device: str | torch.device
) -> MetaTrainConfig:
    """A configuration for these families and this network.

    Args:
        steps: of a training run.
        seconds: the budget; None is no limit.

    Raises:
        ValueError: steps are none, or the budget has no room for enough training runs.
    """
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be an integer of at least 2, got {steps!r}")
    tasks = {name: sampled(family, Generator().manual_seed(0), 0) for name, family in families.items()}
    full = MetaTrainConfig(
        network=network.config,
        meta_steps=META_STEPS,
        estimators={"": "pes"},
        scales={"coordinate": 0.25},
        sigma=0.2,
        pairs=SIZES[0][0],
        replicas=SIZES[0][1],
        unrolls_per_step=SIZES[0][2],
        unrolls_per_family=SIZES[0][2],
        truncation=steps,
        horizon_min=steps,
        horizon_max=steps,
        curriculum=0.0,
        warm_restart=0.0,
        reparametrize=0.0,
        meta_loss="tail",
        validation=all(isinstance(task, ModuleTask) and task.held_out for task in tasks.values()),
        learning_rate=0.1,
        optimizer_options={"betas": [0.8, 0.95]},
        evaluate_every=META_STEPS // EVALUATIONS,
        held_out_tasks=4,
        checkpoint_every=5,
    )
    if seconds is None:
        return full
    run = max(distributed.gather({distributed.rank(): sum(time_of(task, network, full, device) for task in tasks.values())}).values())
    run *= steps / len(tasks)
    runs = seconds / run * distributed.world_size()
    fitting = [size for size in SIZES if runs >= ENOUGH * runs_of(size)] or SIZES[-1:]
    pairs, replicas, unrolls = fitting[0]
    meta_steps = runs / runs_of(fitting[0])
    if meta_steps < FEWEST:
        raise ValueError(
            f"a training run of {steps} steps takes {run:.3g} s here, and the budget of {seconds:g} s has room for {runs:.0f} of them; "
            f"meta-training needs {FEWEST * runs_of(fitting[0])} at least. Raise the budget, or lower steps"
        )
    once = len(LEARNING_RATES) * 2 * REPLICAS + (1 + EVALUATIONS) * len(MODES) * REPLICAS  # runs for one held-out task
    return replace(
        full,
        estimators={"": "pes"} if pairs == FULL else {"": "pes", "coordinate": "frozen"},
        pairs=pairs,
        replicas=replicas,
        unrolls_per_step=unrolls,
        unrolls_per_family=unrolls,
        evaluate_every=max(1, round(min(meta_steps, META_STEPS) / EVALUATIONS)),
        held_out_tasks=min(4, max(1, int(SHARE * runs / once / len(tasks)))),
    )


def runs_of(size: tuple[int, int, int]) -> int:
    """Training runs of a meta-step."""
    pairs, replicas, unrolls = size
    return 2 * pairs * replicas * unrolls


def time_of(task: Task, network: OptimizerNetwork, config: MetaTrainConfig, device: str | torch.device) -> float:
    """Seconds that a step of a training run takes among others side by side, as in a meta-step."""
    probe = replace(config, truncation=PROBE, replicas=1)
    unroll = begin(task, 0, None, 1, network.config, device, horizon=2 * PROBE, horizon_known=True)
    weights = dict(network.named_parameters())
    for _ in range(2):  # what is made once only is made in the first stretch
        began = time.perf_counter()
        unroll, _ = evolve(unroll, network, weights, probe, persistent=True)
    return (time.perf_counter() - began) / PROBE / (2 * probe.pairs)
