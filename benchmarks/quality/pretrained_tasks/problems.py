"""What a task on a pretrained model consists of, and losses that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = Any


@dataclass
class Problem:
    """One seed's model and data.

    `evaluate` gives the loss on a fixed sample of the validation data, and the accuracy there: the share of right answers, or of the
    targets' variance that is explained where they are numbers.
    """

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Task:
    make: Callable[[int], Problem]
    steps: int


def problem(
    seed: int,
    model: nn.Module,
    train: Sequence[Tensor],
    validation: Sequence[Tensor],
    size: int,
    judge: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
) -> Problem:
    """`judge` gives the mean loss of a batch of the tensors and the accuracy of each example in it."""
    generator = Generator().manual_seed(seed)

    def batch() -> Batch:
        chosen = torch.randint(len(train[0]), (size,), generator=generator)
        return [part[chosen] for part in train]

    @torch.no_grad()
    def evaluate(model: nn.Module) -> tuple[float, float]:
        training = model.training
        model.eval()
        found = [judge(model, parts) for parts in zip(*(part.split(64) for part in validation), strict=True)]
        model.train(training)
        sizes = [len(part) for part in validation[0].split(64)]
        means = [sum(float(one[i].mean()) * size for one, size in zip(found, sizes, strict=True)) / sum(sizes) for i in (0, 1)]
        return means[0], means[1]

    return Problem(model.train(), batch, lambda model, batch: judge(model, batch)[0], evaluate)


def classified(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    *inputs, targets = batch
    logits = model(*inputs).float()
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float()


def fitted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of targets with a variance of one."""
    *inputs, targets = batch
    errors = (model(*inputs).float()[:, 0] - targets).square()
    return errors.mean(), 1 - errors
