"""What the families share: random choices, and data that are split into a part for training and one for validation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from ..tasks import ModuleTask, Sampler

Option = TypeVar("Option")

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)
VALIDATION = 8  # one example in so many is for validation


def choose(generator: Generator, options: Sequence[Option]) -> Option:
    return options[int(torch.randint(len(options), (), generator=generator))]


def sampler(inputs: Tensor, targets: Tensor, size: int) -> Sampler:
    """Draws batches of `size` examples with replacement."""

    def sample(generator: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[index], targets[index]

    return sample


def supervised(
    build: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, size: int, criterion: Callable[[Tensor, Tensor], Tensor]
) -> ModuleTask:
    """A task on examples in random order, the last of which are for validation."""
    border = len(inputs) - max(1, len(inputs) // VALIDATION)
    return ModuleTask(build, sampler(inputs[:border], targets[:border], size), criterion, sampler(inputs[border:], targets[border:], size))


def mlp_module(sizes: Sequence[int], activation: Callable[[], nn.Module], norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.LayerNorm(fan_out)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
