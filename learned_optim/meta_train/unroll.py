"""Training runs of optimizees, step by step: what every estimator of the meta-gradient runs.

Shapes: `R` optimizees (replicas) of one task, trained side by side; `P` perturbed networks (particles), each with optimizees of its own;
`...` is (R,) or (P, R). `K` tensors of one optimizee, with `N` coordinates laid end to end.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from ..config import NetworkConfig
from ..features import ABSOLUTE_FLOOR, Layout
from ..rule import State, init_state
from .tasks import Batch, Buffers, Task

# The optimizer: gradients (..., N), state and horizons (..., K) -> what to add to the parameters, and the new state.
Rule = Callable[[Layout, Tensor, State, Tensor], tuple[Tensor, State]]

# From so many coordinates on, optimizees run one after the other: there is nothing left to win by batching them, and not every module
# that is large can be vmapped.
VMAP_LIMIT = 2**21


class Optimizees(NamedTuple):
    """All that a training step reads and writes."""

    params: Tensor  # (..., N)
    state: State  # of the optimizer
    buffers: Buffers  # of the modules, (..., *shape); the meta-gradient takes them as constants

    def differentiable(self) -> list[Tensor]:
        """What the meta-gradient flows through, from step to step."""
        return [self.params, *self.state.values()]

    def map(self, function: Callable[[Tensor], Tensor]) -> Optimizees:
        state, buffers = ({key: function(value) for key, value in tensors.items()} for tensors in (self.state, self.buffers))
        return Optimizees(function(self.params), state, buffers)


@dataclass(frozen=True)
class Unroll:
    """Optimizees of one task, part-way through their training. Its seed decides its batches, whenever and wherever they are drawn."""

    task: Task
    seed: int
    optimizees: Optimizees
    first_loss: Tensor  # (R,), at the start of training
    horizon: int  # optimizee steps in all
    horizon_known: bool  # whether the optimizer network is told
    gradient_noise: float = 0.0  # standard deviation, in units of each tensor's gradient RMS
    validation: bool = False  # whether losses are measured on validation data
    step: int = 0  # optimizee steps done

    @property
    def layout(self) -> Layout:
        return Layout.of(tuple(self.task.shapes.values()), self.optimizees.params.device)

    def advanced(self, optimizees: Optimizees, steps: int) -> Unroll:
        return replace(self, optimizees=optimizees.map(Tensor.detach), step=self.step + steps)

    def batch(self, t: int, validation: bool = False) -> Batch:
        """The batch of step `t` for each replica; tensors (R, ...)."""
        generator = Generator().manual_seed(derive_seed(self.seed, "validation" if validation else "batch", t))
        draw = self.task.validation_batch if validation else self.task.batch
        batches = [draw(generator) for _ in range(self.first_loss.numel())]
        return tuple(torch.stack(parts).to(self.first_loss.device) for parts in zip(*batches, strict=True))

    def measure(self, t: int, optimizees: Optimizees) -> Tensor:
        """The loss that counts in the meta-loss, at step `t`, before the step; (...)."""
        batch = self.batch(t, self.validation)
        return losses(self.task, optimizees, batch, derive_seed(self.seed, "measure", t), training=not self.validation)[0]

    def train_step(self, t: int, optimizees: Optimizees, rule: Rule, create_graph: bool = False) -> tuple[Tensor, Optimizees]:
        """One training step of all optimizees.

        Args:
            create_graph: keep second derivatives, so that the step can be differentiated exactly.

        Returns:
            the loss that counts in the meta-loss (...), before the step, and the optimizees after it.
        """
        params, state, buffers = optimizees
        seed = derive_seed(self.seed, "step", t)
        with torch.enable_grad():
            differentiable = params.requires_grad
            leaf = params if differentiable else params.detach().requires_grad_()
            loss, new_buffers = losses(self.task, Optimizees(leaf, state, buffers), self.batch(t), seed)
            (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=create_graph, retain_graph=differentiable)
        if self.gradient_noise:
            grad = grad + self.gradient_noise * self._noise(grad, seed)
        horizon = self.horizon if self.horizon_known else math.inf
        total_steps = grad.new_full((*grad.shape[:-1], len(self.layout.sizes)), horizon)
        change, new_state = rule(self.layout, grad, state, total_steps)
        # Unless validation data are asked for, the loss that the gradient is taken of counts: it, too, is on data not trained on yet.
        if self.validation:
            loss = self.measure(t, optimizees)
        return loss, Optimizees(params + change, new_state, {key: value.detach() for key, value in new_buffers.items()})

    def _noise(self, grad: Tensor, seed: int) -> Tensor:
        noise = torch.randn(grad.shape, generator=Generator().manual_seed(seed)).to(grad.device)
        return noise * self.layout.spread((self.layout.mean(grad.square()) + ABSOLUTE_FLOOR).sqrt())


def begin(
    task: Task, seed: int, initial: Tensor | None, replicas: int, config: NetworkConfig, device: torch.device | str, **options: object
) -> Unroll:
    """An unroll at its first step.

    Args:
        initial: parameters to start from, (N,) or (R, N); by default the task's own initialisation, fresh for each replica.
        options: the remaining fields of `Unroll`.
    """
    generator = Generator().manual_seed(derive_seed(seed, "init"))
    inits = [task.init(generator) for _ in range(replicas)]
    params = torch.stack([torch.cat([param.flatten() for param in params.values()]) for params, _ in inits]).to(device)
    if initial is not None:
        if initial.shape[-1] != params.shape[-1]:
            raise ValueError(
                f"the initial parameters are {initial.shape[-1]} numbers, but the task's are {params.shape[-1]}: {task.shapes}"
            )
        params = initial.detach().to(params).expand_as(params)
    buffers = {name: torch.stack([buffers[name] for _, buffers in inits]).to(device) for name in inits[0][1]}
    layout = Layout.of(tuple(task.shapes.values()), params.device)
    state = init_state(layout, config, (replicas,), params.dtype)
    unroll = Unroll(task, seed, Optimizees(params, state, buffers), torch.ones(replicas, device=device), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return replace(unroll, first_loss=unroll.measure(0, unroll.optimizees))


def losses(task: Task, optimizees: Optimizees, batch: Batch, seed: int, training: bool = True) -> tuple[Tensor, Buffers]:
    """Loss of each optimizee, (...), and its buffers after the forward pass.

    Args:
        batch: tensors (R, ...); particles share them.
        seed: of dropout and the like.
    """
    params, _, buffers = optimizees
    leading, count = params.shape[:-1], params.shape[:-1].numel()
    batch = tuple(part.expand(*leading, *part.shape[1:]).flatten(0, len(leading) - 1) for part in batch)
    rows = params.reshape(count, -1)
    flat_buffers = {key: value.flatten(0, len(leading) - 1) for key, value in buffers.items()}

    def loss(row: Tensor, buffers: Buffers, batch: Batch) -> tuple[Tensor, Buffers]:
        return task.loss(named(task, row), buffers, batch, training)

    with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []):
        # Not torch.manual_seed: it tells all kinds of devices, which takes a tenth of a small optimizee's step.
        torch.default_generator.manual_seed(seed)
        if params.is_cuda:
            torch.cuda.manual_seed(seed)
        if count > 1 and not is_large(optimizees):
            values, new_buffers = vmap(loss, randomness="different")(rows, flat_buffers, batch)
        else:
            each = [loss(*inputs) for inputs in zip(rows, unbind(flat_buffers, count), zip(*batch, strict=True), strict=True)]
            values = torch.stack([value for value, _ in each])
            new_buffers = {key: torch.stack([buffers[key] for _, buffers in each]) for key in buffers}
    return values.reshape(leading), {key: value.unflatten(0, leading) for key, value in new_buffers.items()}


def is_large(optimizees: Optimizees) -> bool:
    return optimizees.params.numel() >= VMAP_LIMIT


def unbind(tensors: Buffers, count: int) -> Iterator[Buffers]:
    return ({key: value[index] for key, value in tensors.items()} for index in range(count))


def named(task: Task, params: Tensor) -> dict[str, Tensor]:
    """Flat parameters (N,) as the task names and shapes them."""
    parts = params.split([shape.numel() for shape in task.shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(task.shapes.items(), parts, strict=True)}


def derive_seed(*path: object) -> int:
    """A seed for one purpose at one place, the same on every machine."""
    return zlib.crc32("/".join(map(str, path)).encode())
