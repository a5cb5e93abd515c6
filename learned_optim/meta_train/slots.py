"""Slots: places for unrolls of one family, one unroll after the other.

What a slot does next is decided by a generator that is seeded by the slot and by how many unrolls it has begun. So a slot is saved as a few
numbers and tensors, and its task is sampled again from its seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator

from ..network import OptimizerNetwork
from .config import MetaTrainConfig
from .tasks import Family, Reparametrized, Task
from .unroll import Unroll, initial_params, start


@dataclass
class Slot:
    """A place for unrolls of one family.

    Args:
        family: the family's name in `families`.
        index: which of the family's slots this is.
        begun: unrolls begun so far.
        sampled: `begun` at the time when the present task was sampled.
        unroll: the present one; None before the first, and after one that was dropped.
    """

    families: Mapping[str, Family]
    config: MetaTrainConfig
    family: str
    index: int
    begun: int = 0
    sampled: int = 0
    unroll: Unroll | None = None

    def generator(self, purpose: str, count: int) -> Generator:
        """Random numbers for one purpose at one point of the slot's life."""
        key = f"{self.config.seed}/{self.family}/{self.index}/{purpose}/{count}"
        return Generator().manual_seed(zlib.crc32(key.encode()))

    def current(self, network: OptimizerNetwork, meta_step: int) -> Unroll:
        """The unroll to go on with; a new one where the last has reached its horizon."""
        if self.unroll is None or self.unroll.step == self.unroll.horizon:
            self.unroll = self._begin(network, meta_step)
        return self.unroll

    def _begin(self, network: OptimizerNetwork, meta_step: int) -> Unroll:
        """A new horizon, and a new task or, as in fine-tuning, the trained optimizees of the last one with fresh optimizer state."""
        config, generator = self.config, self.generator("begin", self.begun)
        chance, warm, known, cut = torch.rand(4, generator=generator).tolist()
        grown = min(1.0, 2 * (meta_step + 1) / config.meta_steps)
        horizon = round(config.horizon_min * (config.horizon_max / config.horizon_min) ** (chance * grown))
        if self.begun == 0 and config.truncation < horizon:  # cut short, so that the slots fall out of step
            horizon = max(config.truncation, round(horizon * cut))
        if self.unroll is not None and warm < config.warm_restart:
            task, params = self.unroll.task, self.unroll.params
        else:
            self.sampled = self.begun
            task = self._sample_task()
            params = initial_params(task, config.replicas, generator)
        self.begun += 1
        return start(task, network, params, horizon, known < config.horizon_known, generator)

    def _sample_task(self) -> Task:
        generator = self.generator("task", self.sampled)
        task = self.families[self.family](generator)
        if self.config.reparametrize and torch.rand((), generator=generator) < 0.5:
            task = Reparametrized(task, generator, self.config.reparametrize)
        return task

    def state_dict(self) -> dict[str, Any]:
        """The slot as plain values and tensors."""
        unroll = self.unroll
        going = None if unroll is None else {field.name: getattr(unroll, field.name) for field in fields(unroll) if field.name != "task"}
        return {"begun": self.begun, "sampled": self.sampled, "unroll": going}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        self.begun, self.sampled = state["begun"], state["sampled"]
        self.unroll = None if state["unroll"] is None else Unroll(task=self._sample_task(), **state["unroll"])
