"""The derivatives of the update rule that meta-training takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from rule_helpers import SHAPES, acting_network, draw, fresh, run, step
from torch import Tensor, nn

from learned_optim.network import OptimizerNetwork
from learned_optim.rule import Control


@pytest.mark.parametrize("size", [1, 7, 40])
def test_blocks_change_neither_updates_nor_derivatives(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, size: int) -> None:
    network, params = acting_network(torch.float64), draw(SHAPES, generator, torch.float64)
    gradients = [draw(SHAPES, generator, torch.float64) for _ in range(3)]

    def results() -> list[Tensor]:
        leaves = [grad.clone().requires_grad_() for grads in gradients for grad in grads]
        count = len(SHAPES)
        history, state = run(network, params, [leaves[begin : begin + count] for begin in range(0, len(leaves), count)])
        total = sum(change.square().sum() + change.sin().sum() for updates in history for change in updates)
        derivatives = torch.autograd.grad(total, [*network.parameters(), *leaves])
        with torch.no_grad():
            plain, _ = run(network, params, gradients)
        return [*itertools.chain(*history), *itertools.chain(*plain), *state.values(), *derivatives]

    whole = results()
    monkeypatch.setattr("learned_optim.rule.BLOCK", size)
    for blocked, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(blocked, expected, rtol=1e-9, atol=1e-10)


class Optimizee:
    """A small regression in float64 whose losses are summed over a short unroll."""

    def __init__(self, generator: torch.Generator) -> None:
        self.inputs, self.targets = draw([(6, 4), (6, 2)], generator, torch.float64)
        self.start = [0.5 * param for param in draw([(5, 4), (5,), (2, 5), ()], generator, torch.float64)]

    def loss(self, params: Sequence[Tensor]) -> Tensor:
        hidden = nn.functional.linear(self.inputs, params[0], params[1]).tanh()
        return (params[3] + nn.functional.linear(hidden, params[2]) - self.targets).square().mean()

    def meta_loss(self, network: OptimizerNetwork, total_steps: float, *, exact: bool = True) -> Tensor:
        """Losses after 1, 2 and 3 steps; not `exact` leaves out the optimizee's second derivatives."""
        params = [param.clone().requires_grad_() for param in self.start]
        state = fresh(params, network)
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            grads = torch.autograd.grad(self.loss(params), params, create_graph=True)
            grads = [grad if exact else grad.detach() for grad in grads]
            updates, state = step(network, params, grads, state, total_steps)
            params = [param + change for param, change in zip(params, updates, strict=True)]
            total = total + self.loss(params)
        return total


@pytest.mark.parametrize("total_steps", [math.inf, 5.0])
def test_meta_gradient_matches_finite_differences(generator: torch.Generator, total_steps: float) -> None:
    """In every tensor of the network, along a random direction, through the optimizee's second derivatives too."""
    network, optimizee = acting_network(torch.float64), Optimizee(generator)
    with torch.no_grad():
        network.log_step_size.fill_(math.log(1.5))  # far too long steps, so that the controller shortens them within the few there are
        network.controller.log_start.fill_(-0.05)  # and not at once as short as a warm-up makes them
    weights = dict(network.named_parameters())
    gradients = torch.autograd.grad(optimizee.meta_loss(network, total_steps), list(weights.values()))
    width = 1e-6
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * width)
            values.append(optimizee.meta_loss(network, total_steps).item())
        with torch.no_grad():
            weight.add_(direction, alpha=width)
        slope = (gradient * direction).sum().item()
        assert slope != 0, name
        assert (values[0] - values[1]) / (2 * width) == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_meta_gradient_sees_second_derivatives(generator: torch.Generator) -> None:
    """The exact gradient differs from the first-order one, so the path through the optimizee's gradient is really there."""
    network, optimizee = acting_network(torch.float64), Optimizee(generator)
    exact, first_order = (
        torch.autograd.grad(optimizee.meta_loss(network, math.inf, exact=flag), network.coordinate.skip)[0] for flag in (True, False)
    )
    assert (exact - first_order).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_update_passes_gradcheck(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """With respect to the gradient, the parameter and the state."""
    network = acting_network(torch.float64, hidden_units=2).requires_grad_(False)
    params = draw([shape], generator, torch.float64)
    _, state = run(network, params, [draw([shape], generator, torch.float64) for _ in range(2)])
    control = Control.of(state["control"])  # between fresh and trained, since below fresh is what cannot be seen, and has no derivative
    state["control"] = control._replace(trained=torch.where(control.trained == 0, 0.5, control.trained)).rows()

    def function(grad: Tensor, param: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        updates, new_state = step(network, [param], [grad], dict(zip(state, values, strict=True)))
        return (*updates, *new_state.values())

    arguments = [*draw([shape], generator, torch.float64), *params, *state.values()]
    assert torch.autograd.gradcheck(function, [argument.clone().requires_grad_() for argument in arguments])


@pytest.mark.parametrize("dead", ["everywhere", "one tensor", "some coordinates", "vanishing"])
def test_derivatives_are_finite_at_zero_second_moments(generator: torch.Generator, dead: str) -> None:
    """Dead units have exact zeros; one NaN there would end a meta-training run."""
    network, params = acting_network(), [param.requires_grad_() for param in draw(SHAPES, generator)]
    state, total = fresh(params, network), torch.zeros(())
    leaves = []
    for _ in range(3):
        grads = draw(SHAPES, generator)
        for k, grad in enumerate(grads):
            if dead == "everywhere" or (dead == "one tensor" and k == 4):
                grad.zero_()
            elif dead == "some coordinates" and grad.dim():
                grad[0] = 0
            elif dead == "vanishing":
                grad.mul_(1e-18)
            leaves.append(grad.requires_grad_())
        updates, state = step(network, params, grads, state)
        total = total + sum(change.square().sum() + change.sum() for change in updates)
    for gradient in torch.autograd.grad(total, [*network.parameters(), *params, *leaves], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
