"""What meta-training trains on: the task protocol, tasks made of an `nn.Module`, and augmentation.

A *task* is one training problem: an architecture, its data and its loss. A *family* samples tasks. Everything random comes from the
generator that is handed in, so a task is made again from its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]


class Task(Protocol):
    """One training problem. `loss` must be pure, so that `torch.func.vmap` can run many optimizees of one task at once."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' names and shapes, in the order of `init`."""
        ...

    def init(self, generator: Generator) -> Params:
        """Fresh parameters of one optimizee, by name."""
        ...

    def batch(self, generator: Generator) -> Batch:
        """A training batch: tensors whose shapes never change."""
        ...

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Training loss, shape (); twice differentiable where exact meta-gradients are wanted."""
        ...


Family = Callable[[Generator], Task]


class ModuleTask:
    """A task made of an `nn.Module`.

    Args:
        build: makes the module with fresh parameters. It may use torch's global generator, which is seeded for the call and restored.
        sample: draws a batch.
        criterion: loss () of the module's output for `batch[:-1]` against the target `batch[-1]`.

    A parameter that the module uses twice (tied weights) is one entry, under its first name.
    """

    def __init__(
        self, build: Callable[[], nn.Module], sample: Callable[[Generator], Batch], criterion: Callable[[Any, Tensor], Tensor]
    ) -> None:
        self.build = build
        self.module = build()
        self.shapes = {name: param.shape for name, param in self.module.named_parameters()}
        self.sample = sample
        self.criterion = criterion
        buffers = [name for name, _ in self.module.named_buffers()]
        if buffers:
            raise ValueError(f"a task's module must not have buffers, got {buffers}; build BatchNorm with track_running_stats=False")

    def init(self, generator: Generator) -> Params:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(generator))
            return {name: param.detach() for name, param in self.build().named_parameters()}

    def batch(self, generator: Generator) -> Batch:
        return self.sample(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.criterion(functional_call(self.module, params, batch[:-1], tie_weights=True), batch[-1])


class Reparametrized:
    """A task whose tensors are each seen through a random scale: `theta = scale * phi`, with `phi` what is trained (Metz et al. 2022,
    "VeLO", task augmentation). It teaches the controller to find the size of a step, which the architecture would otherwise give away.

    Args:
        task: the task to change.
        generator: draws the scales.
        spread: standard deviation of the scales' natural logarithms.
    """

    def __init__(self, task: Task, generator: Generator, spread: float) -> None:
        self.task = task
        self.shapes = task.shapes
        self.scales = {name: math.exp(spread * float(torch.randn((), generator=generator))) for name in task.shapes}

    def init(self, generator: Generator) -> Params:
        return {name: param / self.scales[name] for name, param in self.task.init(generator).items()}

    def batch(self, generator: Generator) -> Batch:
        return self.task.batch(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.task.loss({name: param * self.scales[name] for name, param in params.items()}, batch)


def draw_seed(generator: Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
