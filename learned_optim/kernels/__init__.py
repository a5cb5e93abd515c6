"""Fast paths of the update rule. Each does in place what `learned_optim.rule.update` defines, and is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import ADAMW_UPDATE_RMS, Clock, Control, decide, vector_scale

SCALARS = 3


def scalars(clock: Clock) -> Tensor:
    """What the pass over coordinates needs to know of each tensor, (K, SCALARS)."""
    return torch.stack([1 / clock.correction1, 1 / clock.correction2, clock.mean], -1)


def read_once(network: OptimizerNetwork) -> list[Any]:
    """The weights that decide what tensors have once."""
    return [*network._parameters.values(), *network.controller._parameters.values()]


# What tensors have once, between the passes, as functions of tensors alone, so that they can be recorded: see `replay`.


def before_directions(network: OptimizerNetwork, layout: Layout, rows: Tensor, means: Tensor, total_steps: Tensor) -> Sequence[Tensor]:
    """Step sizes, `scalars`, and the control's new rows, (CONTROL, K)."""
    clock, step_size, control = decide(network, layout, means, Control.of(rows), total_steps)
    return step_size, scalars(clock), control.rows()


def before_update(
    network: OptimizerNetwork, mean_square: Tensor, orthogonal: Tensor, is_plain: Tensor, step_size: Tensor, rate: Tensor, decay: Tensor
) -> Sequence[Tensor]:
    """Each tensor's shrink and scale, (K, 2).

    Args:
        mean_square: of the directions, (K,).
        orthogonal: 1 of those that are orthogonalised, else 0, (K,).
    """
    gain = torch.where(orthogonal > 0, 1.0, vector_scale(network, mean_square, is_plain))
    scale = step_size * gain
    shrink = rate * decay * scale * mean_square.sqrt() / ADAMW_UPDATE_RMS
    return [torch.stack([shrink, -rate * scale], -1)]
