"""Slots: places for unrolls of one family, one unroll after the other.

What a slot does next is decided by seeds: the run's, the slot's, and how many unrolls it has begun. So a slot is saved as a few numbers and
tensors, and its task is sampled again from its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor

from ..network import OptimizerNetwork
from .augment import InDtype, Reparametrized, ScaledLoss, Subbatched
from .config import MetaTrainConfig
from .estimators import Estimate, Weights, estimator
from .tasks import Family, Task, sampled
from .unroll import Optimizees, Unroll, begin, derive_seed


@dataclass
class Slot:
    """A place for unrolls of one family under one estimator.

    Args:
        family: the family's name in `families`.
        index: which of the family's slots this is.
        begun: unrolls begun so far.
        sampled: `begun` at the time when the present task was sampled.
        unroll: the present one; None before the first, and after one that was dropped.
    """

    families: Mapping[str, Family]
    config: MetaTrainConfig
    estimator: str
    family: str
    index: int
    begun: int = 0
    sampled: int = 0
    unroll: Unroll | None = None

    def seed(self, purpose: str, count: int) -> int:
        """A seed for one purpose at one point of the slot's life."""
        return derive_seed(self.config.seed, self.estimator, self.family, self.index, purpose, count)

    def estimate(self, network: OptimizerNetwork, weights: Weights, initial: Tensor | None, meta_step: int) -> Estimate:
        """Advances the unroll by a stretch and estimates the meta-gradient by `weights`. Where the last unroll has reached its horizon, a
        new one begins, from the initial parameters (N,) if there are any."""
        if self.unroll is None or self.unroll.step == self.unroll.horizon:
            self.unroll = self._begin(network, initial, meta_step)
        self.unroll, estimate = estimator(self.estimator)(self.unroll, network, weights, self.config)
        return estimate

    def _begin(self, network: OptimizerNetwork, initial: Tensor | None, meta_step: int) -> Unroll:
        """A new horizon, and a new task or, as in fine-tuning, the trained optimizees of the last one with fresh optimizer state."""
        config = self.config
        generator = Generator().manual_seed(self.seed("begin", self.begun))
        chance, warm, known, cut, noise = torch.rand(5, generator=generator).tolist()
        grown = min(1.0, (meta_step + 1) / (config.curriculum * config.meta_steps)) if config.curriculum else 1.0
        horizon = round(config.horizon_min * (config.horizon_max / config.horizon_min) ** (chance * grown))
        if self.begun == 0 and config.truncation < horizon:  # cut short, so that the slots fall out of step
            horizon = max(config.truncation, round(horizon * cut))
        if self.unroll is not None and initial is None and warm < config.warm_restart:
            task, initial = self.unroll.task, self.unroll.optimizees.params
            initial = initial[0] if initial.ndim == 3 else initial  # of one of the particles
        else:
            self.sampled = self.begun
            task = self._sample_task()
        self.begun += 1
        return begin(
            task,
            self.seed("unroll", self.begun),
            initial,
            config.replicas,
            network.config,
            network.log_step_size.device,
            horizon=horizon,
            horizon_known=known < config.horizon_known,
            gradient_noise=config.gradient_noise * max(0.0, 2 * noise - 1),  # none in half of the unrolls
            validation=config.validation,
        )

    def _sample_task(self) -> Task:
        """A task of the family, in half of the cases through the augmentations that the configuration asks for."""
        config, seed = self.config, self.seed("task", self.sampled)
        generator = Generator().manual_seed(seed)
        task = sampled(self.families[self.family], generator, seed)
        changed, share, precision = torch.rand(3, generator=generator).tolist()
        if changed < 0.5 and config.reparametrize:
            task = Reparametrized(task, generator, config.reparametrize)
        if changed < 0.5 and config.loss_scale:
            task = ScaledLoss(task, generator, config.loss_scale)
        if changed < 0.5 and config.subbatch < 1:
            task = Subbatched(task, config.subbatch + (1 - config.subbatch) * share)
        return InDtype(task, torch.bfloat16) if precision < config.bfloat16 else task

    def state_dict(self) -> dict[str, Any]:
        """The slot as plain values and CPU tensors."""
        going = None
        if self.unroll is not None:
            going = {field.name: getattr(self.unroll, field.name) for field in fields(Unroll) if field.name != "task"}
            going["first_loss"] = going["first_loss"].cpu()
            going["optimizees"] = self.unroll.optimizees.map(Tensor.cpu)._asdict()
        return {"begun": self.begun, "sampled": self.sampled, "unroll": going}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Undoes `state_dict`."""
        self.begun, self.sampled = state["begun"], state["sampled"]
        self.unroll = None
        if state["unroll"] is not None:
            going = dict(state["unroll"])
            going["optimizees"] = Optimizees(**going["optimizees"]).map(lambda tensor: tensor.to(device))
            going["first_loss"] = going["first_loss"].to(device)
            self.unroll = Unroll(task=self._sample_task(), **going)
