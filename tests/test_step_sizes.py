"""How the rule chooses step sizes: pace, schedule, and the controller, which follows the hypergradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rule_helpers import corrections_of, draw, fresh, rms, run, step
from torch import Tensor

from learned_optim.config import NetworkConfig
from learned_optim.network import BOUND, LEAD, OptimizerNetwork

MOMENTUM = NetworkConfig().momentum
MOST_AGREEMENT = math.sqrt((1 + MOMENTUM) / (1 - MOMENTUM))  # of gradients that are all the same


def schedule_alone(network: OptimizerNetwork) -> None:
    """Neither the controller nor the pace changes a step."""
    network.controller.log_rate.fill_(-math.inf)
    network.controller.shrink.zero_()
    network.controller.power.zero_()


def paces(network: OptimizerNetwork, gradients: list[list[Tensor]]) -> list[list[float]]:
    """By step and tensor, from the updates' lengths."""
    for power in (1.0, 0.0):
        schedule_alone(network)
        network.controller.power.fill_(power)
        sizes = [list(map(rms, updates)) for updates in run(network, gradients[0], gradients, total_steps=1e6)[0]]
        if power:
            paced = sizes
    return [[one / other if other else 0.0 for one, other in zip(*pair, strict=True)] for pair in zip(paced, sizes, strict=True)]


def test_steps_are_longer_where_gradients_agree(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """As usual where they are noise, from the first step on, or turn back; the most that momentum allows where they stay."""
    noise = [draw([(20_000,)], generator) for _ in range(60)]
    scattered = [one for (one,) in paces(untrained, noise)]
    assert scattered == pytest.approx([1.0] * 60, rel=0.05)
    steady = [one for (one,) in paces(untrained, noise[:1] * 60)]
    assert all(later > earlier for earlier, later in itertools.pairwise(steady[:30]))
    assert steady[0] == pytest.approx(1)
    assert steady[-1] == pytest.approx(MOST_AGREEMENT, rel=0.02)
    turning = [one for (one,) in paces(untrained, [[(-1) ** t * noise[0][0]] for t in range(60)])]
    assert turning == pytest.approx([1.0] * 60)


def test_steps_get_shorter_where_gradients_vanish(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """A direction of fixed length would go on along a momentum that is all but gone."""
    noise = [draw([(20_000,)], generator) for _ in range(90)]
    vanishing = [one for (one,) in paces(untrained, noise[:60] + [[0.1 * one] for (one,) in noise[60:]])]
    size = math.sqrt(0.01 / (0.01 + 0.99 * 0.99**30 * (1 - 0.99**60) / (1 - 0.99**90)))
    assert vanishing[-1] == pytest.approx(size, rel=0.1)


def test_agreement_is_half_a_tensors_own_and_half_everybodys(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """The geometric mean; tensors that never had a gradient have no say."""
    steady, noise, silent = draw([(9_000,)], generator)[0], draw([(9_000,)] * 60, generator), torch.zeros(9)
    steadily, noisily = paces(untrained, [[steady, one] for one in noise])[-1]
    alone, beside = (paces(untrained, [[steady, *more]] * 60)[-1][0] for more in ([], [silent]))
    assert alone == beside == pytest.approx(MOST_AGREEMENT, rel=0.02)
    everyone = (MOST_AGREEMENT + 1) / 2
    assert (steadily, noisily) == pytest.approx((math.sqrt(MOST_AGREEMENT * everyone), math.sqrt(everyone)), rel=0.05)


def test_step_size_anneals_to_a_known_horizon(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """It stays for two fifths of the way, falls from there, ends near zero, and does not come back after the horizon."""
    schedule_alone(untrained)
    params, gradients = draw([(9,)], generator), [draw([(9,)], generator) for _ in range(50)]
    sizes = [rms(updates[0]) for updates in run(untrained, params, gradients, total_steps=40.0)[0]]
    assert sizes[:17] == pytest.approx([sizes[0]] * 17, rel=1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes[17:40]))
    assert sizes[39] < 0.05 * sizes[0]
    assert all(size <= sizes[39] for size in sizes[40:])


@pytest.mark.parametrize(("horizon", "share"), [(20, 1), (200, 1), (3200, 0.5)])
def test_steps_of_long_runs_are_shorter(untrained: OptimizerNetwork, generator: torch.Generator, horizon: float, share: float) -> None:
    schedule_alone(untrained)
    params, gradients = draw([(9,), (6, 4)], generator), [draw([(9,), (6, 4)], generator)]
    first, expected = (run(untrained, params, gradients, total_steps=total)[0][0] for total in (horizon, 100.0))
    torch.testing.assert_close(first, [share * change for change in expected])


def test_step_size_decays_slowly_without_a_horizon(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    schedule_alone(untrained)
    params, gradients = draw([(9,)], generator), [draw([(9,)], generator) for _ in range(40)]
    sizes = [rms(updates[0]) for updates in run(untrained, params, gradients)[0]]
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes))
    assert sizes[-1] > 0.7 * sizes[0]


@pytest.mark.parametrize("horizon", [20.0, math.inf])
def test_steps_grow_while_gradients_agree_and_shrink_where_they_turn_back(untrained: OptimizerNetwork, horizon: float) -> None:
    """The hypergradient, against the formula of `Controller`, where cosines are 1 or -1. What counts is their mean, over some ten steps."""
    untrained.controller.log_rate.fill_(math.log(0.3))
    untrained.controller.log_patience.fill_(math.log(10))
    grad = [torch.tensor([1.0, -2.0, 3.0])]
    state, momentum, trend, corrections, rises = fresh(grad, untrained), 0.0, 0.0, [], []
    for age in range(1, 17):
        sign = 1 if age <= 4 else -math.copysign(1, momentum)
        _, state = step(untrained, grad, [sign * grad[0]], state, horizon)
        corrections.append(corrections_of(state).item())
        cosine = 0 if age == 1 else math.copysign(1, sign * momentum)
        momentum += (1 - MOMENTUM) * (sign - momentum)
        trend += (cosine - trend) / min(age, 10)
        fading = 1 / (1 + age / 10)
        bold = 2 * fading if math.isfinite(horizon) else fading**2
        bouncing = min(max(-trend / BOUND, 0), 1) / (age + LEAD)
        rises.append((1 - (age - 1) / horizon) * (0.3 * bold * max(trend, 0) - 0.5 * bouncing))
    assert min(rises) < 0 < max(rises)
    assert corrections == pytest.approx(list(itertools.accumulate(rises)), rel=1e-4)


def test_scatter_moves_no_step_size(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """Cosines of few coordinates scatter widely about zero, where gradients are noise; counted one by one they would add up to growth."""
    grads = [draw([(3,)] * 20, generator) for _ in range(300)]
    correction = corrections_of(run(untrained, grads[0], grads, total_steps=1e6)[1])
    assert correction.mean().abs() < 0.5  # one by one, above 1


@pytest.mark.parametrize("horizon", [1e6, math.inf])
def test_steps_shrink_where_gradients_are_noise_that_turns_back(
    untrained: OptimizerNetwork, generator: torch.Generator, horizon: float
) -> None:
    """However late: as one over the root of the time, beside what the schedule does; and no faster where they turn back all of it."""

    def shrinkage(gradients: list[list[Tensor]]) -> float:
        early, late = (corrections_of(run(untrained, gradients[0], gradients[:count], horizon)[1]).item() for count in (200, 400))
        return early - late

    noise = draw([(4000,)] * 401, generator)
    pairs = itertools.pairwise(noise)
    expected = 0.5 * math.log((400 + LEAD) / (200 + LEAD))
    assert shrinkage([[new - 0.3 * old] for old, new in pairs]) == pytest.approx(expected, rel=0.02)
    assert shrinkage([[(-1.0) ** t * one] for t, one in enumerate(noise[:1] * 400)]) == pytest.approx(expected, rel=0.02)


def test_the_correction_is_bounded_and_acts_on_the_step_size(untrained: OptimizerNetwork) -> None:
    untrained.controller.log_rate.fill_(math.log(5))
    untrained.controller.power.zero_()
    grads = [[torch.tensor([1.0, -2.0, 3.0])]] * 9
    history, state = run(untrained, grads[0], grads, total_steps=1e6)
    assert corrections_of(state).item() == pytest.approx(3)
    assert rms(history[-1][0]) == pytest.approx(math.exp(3) * rms(history[0][0]), rel=1e-3)


def test_the_correction_is_half_a_tensors_own_and_half_everybodys(untrained: OptimizerNetwork) -> None:
    """Beside a tensor whose gradient agrees, one whose gradient is orthogonal to the last one is corrected by a quarter, not by nothing."""
    gradients = [[torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]]
    _, state = run(untrained, gradients[0], gradients, total_steps=1e6)
    agreeing, turning = corrections_of(state).tolist()
    assert turning == pytest.approx(agreeing / 3, rel=1e-4)  # (0 + 1/2) / 2 against (1 + 1/2) / 2


def test_correcting_ends_with_a_known_horizon(untrained: OptimizerNetwork) -> None:
    grads = [[torch.tensor([1.0, -2.0, 3.0])]] * 30
    corrections = [corrections_of(run(untrained, grads[0], grads[:count], total_steps=10.0)[1]).item() for count in (5, 11, 30)]
    assert 0 < corrections[0] < corrections[1] == corrections[2]


def test_horizon_may_differ_between_tensors(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw([(9,)] * 3, generator), [draw([(9,)] * 3, generator) for _ in range(10)]
    short, long, unknown = map(rms, run(untrained, params, gradients, [10.0, 100.0, math.inf])[0][-1])
    assert short < 0.25 * long
    assert short < 0.25 * unknown
