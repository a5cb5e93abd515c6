"""Fast paths of the update rule. Each does in place what `learned_optim.rule.update` defines, and is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import Clock

SCALARS = 8


def scalars(clock: Clock, steady: Tensor, inertia: Tensor) -> Tensor:
    """What the pass over coordinates needs to know of each tensor, (K, SCALARS)."""
    of_clock = 1 / clock.correction1, 1 / clock.correction2, clock.mean, clock.share, clock.portion, clock.kept
    return torch.stack([*of_clock, steady, inertia], -1)
