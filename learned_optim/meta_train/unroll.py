"""Training runs that the meta-gradient flows through.

Shapes: `R` optimizees (replicas) of one task, trained side by side; `K` tensors of one optimizee, with `N` coordinates laid end to end; `T`
steps of a truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.func import vmap

from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import State, init_state, update
from .tasks import Batch, Task


@dataclass
class Unroll:
    """`R` optimizees of one task, part-way through their training."""

    task: Task
    params: Tensor  # (R, N)
    state: State
    step: int  # optimizee steps done
    horizon: int  # optimizee steps in all
    horizon_known: bool  # whether the optimizer network is told
    first_loss: Tensor  # (R,), at the start of training


def initial_params(task: Task, replicas: int, generator: Generator) -> Tensor:
    """Fresh parameters of `R` optimizees, (R, N)."""
    inits = [task.init(generator) for _ in range(replicas)]
    return torch.stack([torch.cat([param.flatten() for param in init.values()]) for init in inits])


def start(task: Task, network: OptimizerNetwork, params: Tensor, horizon: int, horizon_known: bool, generator: Generator) -> Unroll:
    """Optimizees with the given parameters, (R, N), and fresh optimizer state, on the network's device."""
    device = network.log_step_size.device
    params = params.to(device)
    layout = Layout.of(tuple(task.shapes.values()), device)
    state = init_state(layout, network.config, (len(params),), network.log_step_size.dtype)
    with torch.no_grad():
        first_loss = losses(task, params, draw(task, len(params), generator, device))
    return Unroll(task, params, state, 0, horizon, horizon_known, first_loss)


def draw(task: Task, replicas: int, generator: Generator, device: torch.device) -> Batch:
    """A batch for each replica; tensors (R, ...)."""
    batches = [task.batch(generator) for _ in range(replicas)]
    return tuple(torch.stack(parts).to(device) for parts in zip(*batches, strict=True))


def losses(task: Task, params: Tensor, batch: Batch) -> Tensor:
    """Training loss of each replica, (R,)."""
    parts = params.split([shape.numel() for shape in task.shapes.values()], -1)
    named = {
        name: part.unflatten(-1, shape) if shape else part[..., 0] for (name, shape), part in zip(task.shapes.items(), parts, strict=True)
    }
    return vmap(task.loss)(named, batch)


def advance(network: OptimizerNetwork, unroll: Unroll, batches: Sequence[Batch], *, first_order: bool) -> tuple[Unroll, Tensor]:
    """Trains the optimizees for `T` steps and keeps the graph from their losses to the network's weights.

    Each loss is measured on a batch that the optimizee has not been trained on yet.

    Args:
        batches: T + 1 batches, tensors (R, ...); the last one is for measuring alone.
        first_order: take the optimizees' gradients as constants (Andrychowicz et al. 2016); else differentiate through them too.

    Returns:
        the advanced unroll, without graph, and the losses after each step, (T, R).
    """
    params, state = unroll.params, unroll.state
    layout = Layout.of(tuple(unroll.task.shapes.values()), params.device)
    total_steps = torch.full_like(state["step"], unroll.horizon if unroll.horizon_known else torch.inf)

    measured = []
    params = params.detach().requires_grad_()
    for batch in batches[:-1]:
        loss = losses(unroll.task, params, batch)
        measured.append(loss)
        (grad,) = torch.autograd.grad(loss.sum(), params, create_graph=not first_order, retain_graph=True)
        change, state = update(network, layout, grad, params, state, total_steps)
        params = params + change
    measured.append(losses(unroll.task, params, batches[-1]))

    detached = {key: value.detach() for key, value in state.items()}
    step = unroll.step + len(batches) - 1
    advanced = Unroll(unroll.task, params.detach(), detached, step, unroll.horizon, unroll.horizon_known, unroll.first_loss)
    return advanced, torch.stack(measured[1:])
