"""Augmentation: tasks seen through a change of scale, batch size or number format, so that the network learns to do without them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .tasks import Batch, Buffers, Params, Task


class Wrapped:
    """A task as another one has it. Subclasses change what they must."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shapes = task.shapes

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        return self.task.init(generator)

    def batch(self, generator: Generator) -> Batch:
        return self.task.batch(generator)

    def validation_batch(self, generator: Generator) -> Batch:
        return self.task.validation_batch(generator)

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        return self.task.loss(params, buffers, batch, training)


class Reparametrized(Wrapped):
    """Each tensor is seen through a random scale: `theta = scale * phi`, with `phi` what is trained (Metz et al. 2022, "VeLO", task
    augmentation). It teaches the controller to find the size of a step, which the architecture would otherwise give away.

    Args:
        generator: draws the scales.
        spread: standard deviation of the scales' natural logarithms.
    """

    def __init__(self, task: Task, generator: Generator, spread: float) -> None:
        super().__init__(task)
        self.scales = {name: math.exp(spread * float(torch.randn((), generator=generator))) for name in task.shapes}

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        params, buffers = self.task.init(generator)
        return {name: param / self.scales[name] for name, param in params.items()}, buffers

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        return self.task.loss({name: param * self.scales[name] for name, param in params.items()}, buffers, batch, training)


class ScaledLoss(Wrapped):
    """The loss times a random constant.

    Args:
        generator: draws the constant.
        spread: standard deviation of its natural logarithm.
    """

    def __init__(self, task: Task, generator: Generator, spread: float) -> None:
        super().__init__(task)
        self.scale = math.exp(spread * float(torch.randn((), generator=generator)))

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        loss, buffers = self.task.loss(params, buffers, batch, training)
        return self.scale * loss, buffers


class Subbatched(Wrapped):
    """Training on a share of every batch; the first dimension of its tensors counts the examples."""

    def __init__(self, task: Task, share: float) -> None:
        super().__init__(task)
        self.share = share

    def batch(self, generator: Generator) -> Batch:
        batch = self.task.batch(generator)
        size = next(len(part) for part in tree_leaves(batch) if isinstance(part, Tensor) and part.ndim)
        count = max(1, math.ceil(self.share * size))

        def is_text(part: object) -> bool:
            return isinstance(part, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(part))

        def cut(part: Any) -> Any:
            by_example = part.ndim > 0 if isinstance(part, Tensor) else isinstance(part, list)
            return part[:count] if by_example and len(part) == size else part

        smaller: Batch = tree_map(cut, batch, is_leaf=is_text)
        return smaller


class InDtype(Wrapped):
    """Optimizees that compute in another floating-point format; their parameters are rounded to it, and the loss is float32 again."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        super().__init__(task)
        self.dtype = dtype

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        params = {name: param.to(self.dtype) for name, param in params.items()}
        batch = tree_map_only(Tensor, lambda part: part.to(self.dtype) if part.is_floating_point() else part, batch)
        loss, buffers = self.task.loss(params, buffers, batch, training)
        return loss.float(), buffers
