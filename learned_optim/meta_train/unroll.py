"""Training runs that the meta-gradient flows through.

Shapes: `R` optimizees (replicas) of one task, trained side by side by `vmap`; `T` steps of a truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.func import vmap

from ..network import OptimizerNetwork
from ..rule import State, init_state, update
from .tasks import Batch, Params, Task


@dataclass
class Unroll:
    """`R` optimizees of one task, part-way through their training. Every tensor of `params` and `states` leads with R."""

    task: Task
    params: Params
    states: list[State]
    step: int  # optimizee steps done
    horizon: int  # optimizee steps in all
    horizon_known: bool  # whether the optimizer network is told
    first_loss: Tensor  # (R,), at the start of training


def start(task: Task, network: OptimizerNetwork, replicas: int, horizon: int, horizon_known: bool, generator: Generator) -> Unroll:
    """Fresh optimizees with fresh optimizer state, on the network's device."""
    device = network.log_step_size.device
    inits = [task.init(generator) for _ in range(replicas)]
    params = {name: torch.stack([init[name] for init in inits]).to(device) for name in inits[0]}
    states = [vmap(lambda param: init_state(param, network.config))(param) for param in params.values()]
    with torch.no_grad():
        first_loss = vmap(task.loss)(params, draw(task, replicas, generator, device))
    return Unroll(task, params, states, 0, horizon, horizon_known, first_loss)


def draw(task: Task, replicas: int, generator: Generator, device: torch.device) -> Batch:
    """A batch for each replica; tensors (R, ...)."""
    batches = [task.batch(generator) for _ in range(replicas)]
    return tuple(torch.stack(parts).to(device) for parts in zip(*batches, strict=True))


def advance(
    network: OptimizerNetwork, unroll: Unroll, batches: Sequence[Batch], *, first_order: bool, keep_graph: bool
) -> tuple[Unroll, Tensor]:
    """Trains the optimizees for `T = len(batches)` steps and keeps the graph from their losses to the network's weights.

    The loss before each step is measured on a batch that the optimizee has not yet been trained on; the last one, after the last step, on
    the first batch of the stretch.

    Args:
        batches: one a step, tensors (R, ...).
        first_order: take the optimizees' gradients as constants (Andrychowicz et al. 2016); else differentiate through them too.
        keep_graph: False for a forward run alone.

    Returns:
        the advanced unroll, without graph, and the losses after each step, (T, R).
    """
    params, states = unroll.params, unroll.states
    names = list(params)
    horizon = float(unroll.horizon) if unroll.horizon_known else None
    losses = vmap(unroll.task.loss)

    def rule(grads: list[Tensor], params: list[Tensor], states: list[State]) -> tuple[list[Tensor], list[State]]:
        return update(network, grads, params, states, [horizon] * len(params))

    measured = []
    with torch.enable_grad():
        for step, batch in enumerate(batches):
            if not params[names[0]].requires_grad:
                params = {name: param.detach().requires_grad_() for name, param in params.items()}
            loss = losses(params, batch)
            measured.append(loss if keep_graph else loss.detach())
            exact = keep_graph and not first_order
            grads = torch.autograd.grad(loss.sum(), list(params.values()), create_graph=exact, retain_graph=keep_graph)
            with torch.set_grad_enabled(keep_graph):
                updates, states = vmap(rule)(list(grads), list(params.values()), states)
                params = {name: param + change for (name, param), change in zip(params.items(), updates, strict=True)}
        with torch.set_grad_enabled(keep_graph):
            measured.append(losses(params, batches[0]))

    detached = {name: param.detach() for name, param in params.items()}
    states = [{key: value.detach() for key, value in state.items()} for state in states]
    advanced = Unroll(unroll.task, detached, states, unroll.step + len(batches), unroll.horizon, unroll.horizon_known, unroll.first_loss)
    return advanced, torch.stack(measured[1:])
