"""Fast paths of the update rule. Each does in place what `learned_optim.rule.update` defines, and is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import ADAMW_UPDATE_RMS, Clock, Control, decide, follow, vector_scale

SCALARS = 8


def scalars(clock: Clock, steady: Tensor, inertia: Tensor) -> Tensor:
    """What the pass over coordinates needs to know of each tensor, (K, SCALARS)."""
    of_clock = 1 / clock.correction1, 1 / clock.correction2, clock.mean, clock.share, clock.portion, clock.kept
    return torch.stack([*of_clock, steady, inertia], -1)


def read_once(network: OptimizerNetwork) -> list[Any]:
    """The weights that decide what tensors have once."""
    return [*network._parameters.values(), *network.controller._parameters.values()]


# What tensors have once, between the passes, as functions of tensors alone, so that they can be recorded: see `replay`.


def before_directions(network: OptimizerNetwork, layout: Layout, rows: Tensor, means: Tensor, total_steps: Tensor) -> Sequence[Tensor]:
    """Step sizes, `scalars`, and the clock and the control as they are then."""
    clock, step_size, steady, inertia, control = decide(network, layout, means, Control.of(rows), total_steps)
    return step_size, scalars(clock, steady, inertia), *clock, *control


def before_update(
    network: OptimizerNetwork, mean_square: Tensor, orthogonal: Tensor, is_plain: Tensor, step_size: Tensor, rate: Tensor, decay: Tensor
) -> Sequence[Tensor]:
    """What gives directions their length, (K,), and each tensor's shrink and scale, (K, 2).

    Args:
        mean_square: of the directions, (K,).
        orthogonal: 1 of those that are orthogonalised, else 0, (K,).
    """
    gain = torch.where(orthogonal > 0, 1.0, vector_scale(network, mean_square, is_plain))
    scale = step_size * gain
    shrink = rate * decay * scale * mean_square.sqrt() / ADAMW_UPDATE_RMS
    return gain, torch.stack([shrink, -rate * scale], -1)


def after_update(moved: Tensor, gain: Tensor, roots: Tensor, *numbers: Tensor) -> Sequence[Tensor]:
    """The control's new rows, (CONTROL, K).

    Args:
        moved: means of the directions' sketch and of their square, (BUCKETS + 1, K).
        roots: of the tensors' sizes, (K,).
        numbers: clock and control.
    """
    clock, control = Clock(*numbers[: len(Clock._fields)]), Control(*numbers[len(Clock._fields) :])
    return [follow(control, clock, moved[:-1] * gain * roots, moved[-1] * gain.square()).rows()]
