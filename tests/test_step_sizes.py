"""How the rule chooses step sizes: pace, schedule, and the controller, which follows the hypergradient and the path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rule_helpers import corrections_of, draw, fresh, layout_of, rms, run, step
from torch import Tensor

from learned_optim.config import NetworkConfig
from learned_optim.features import BUCKETS, GRADIENT_BOUND, Layout
from learned_optim.network import BOUND, BRAKE, LEAD, LEAP, PATH_LEAD, OptimizerNetwork
from learned_optim.rule import CONTROL, Clock, Control, follow, straightness

MOMENTUM = NetworkConfig().momentum
MOST_AGREEMENT = math.sqrt((1 + MOMENTUM) / (1 - MOMENTUM))  # of gradients that are all the same


def schedule_alone(network: OptimizerNetwork) -> None:
    """Neither the controller nor the pace changes a step."""
    network.controller.log_rate.fill_(-math.inf)
    network.controller.shrink.zero_()
    network.controller.bend.zero_()
    network.controller.brake.zero_()
    network.controller.inertia.zero_()
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


def test_the_last_gradient_has_less_say_where_gradients_turn_back(untrained: OptimizerNetwork) -> None:
    """Beside the momentum, by the square of twice the agreement; seen in one coordinate of a hundred whose gradient does not turn."""
    untrained.coordinate.skip.fill_(1.0)
    signs = torch.ones(100)
    gradients = [[(-1.0) ** t * signs] for t in range(200)]
    gradients[-1] = [gradients[-1][0].clone()]
    gradients[-1][0][-1] *= -1
    *_, last = run(untrained, gradients[0], gradients, total_steps=1e6)[0]
    new, before = 1 - MOMENTUM, MOMENTUM * (1 - MOMENTUM) / (1 + MOMENTUM)
    turning, going_on = new - before, new + before  # sizes of the momentum
    steady = (2 * MOST_AGREEMENT) ** 2 * (0.99 * turning**2 + 0.01 * going_on**2)
    fast = 1 / math.sqrt(1 + 1 / GRADIENT_BOUND**2)
    assert -last[0][-1] / last[0][0] == pytest.approx((going_on + steady * fast) / (turning + steady * fast), rel=0.01)


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
    untrained.controller.bend.zero_()
    grad = [torch.tensor([1.0, -2.0, 3.0])]
    state, momentum, trend, corrections, rises = fresh(grad, untrained), 0.0, 0.0, [], []
    for age in range(1, 17):
        sign = 1 if age <= 4 else -math.copysign(1, momentum)
        _, state = step(untrained, grad, [sign * grad[0]], state, horizon)
        corrections.append(corrections_of(state).item())
        cosine = 0 if age == 1 else math.copysign(1, sign * momentum)
        momentum += (1 - MOMENTUM) * (sign - momentum)
        trend += (cosine - trend) / min(age, 10)
        agreed = abs(momentum) * MOST_AGREEMENT / math.sqrt(1 - MOMENTUM ** (2 * age))
        fading, steady = 1 / (1 + age / 10), min(1, 2 * agreed) ** 2
        bold = 2 * fading if math.isfinite(horizon) else fading**2
        bouncing = steady * min(max(-trend / BOUND, 0), 1) / (age + LEAD) + max(-trend - LEAP, 0)
        rises.append((1 - (age - 1) / horizon) * (0.3 * bold * max(trend, 0) - 0.5 * bouncing))
    assert min(rises) < 0 < max(rises)
    assert corrections == pytest.approx(list(itertools.accumulate(rises)), rel=1e-4)


def test_scatter_moves_no_step_size(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """Cosines of few coordinates scatter widely about zero, where gradients are noise; counted one by one they would add up to growth."""
    untrained.controller.bend.zero_()
    grads = [draw([(3,)] * 20, generator) for _ in range(300)]
    correction = corrections_of(run(untrained, grads[0], grads, total_steps=1e6)[1])
    assert correction.mean().abs() < 0.5  # one by one, above 1


@pytest.mark.parametrize("horizon", [1e6, math.inf])
def test_steps_shrink_where_gradients_are_noise_that_turns_back(
    untrained: OptimizerNetwork, generator: torch.Generator, horizon: float
) -> None:
    """However late: as one over the root of the time, beside what the schedule does. Hardly where gradients turn back much of the one
    before, along steep directions, and fast where they turn back all of it."""

    def shrinkage(gradients: list[list[Tensor]]) -> float:
        early, late = (corrections_of(run(untrained, gradients[0], gradients[:count], horizon)[1]).item() for count in (200, 400))
        return early - late

    untrained.controller.bend.zero_()
    noise = draw([(4000,)] * 401, generator)
    pairs = itertools.pairwise(noise)
    expected = 0.5 * math.log((400 + LEAD) / (200 + LEAD))
    assert shrinkage([[new - 0.3 * old] for old, new in pairs]) == pytest.approx(expected, rel=0.02)
    shared = noise[0]
    assert shrinkage([[(-1.0) ** t * shared + 0.3 * own] for t, own in enumerate(noise)]) < 0.7 * expected
    leaps = [[(-1.0) ** t * shared] for t in range(60)]
    assert corrections_of(run(untrained, leaps[0], leaps, horizon)[1]).item() == pytest.approx(-3, rel=1e-3)


@pytest.mark.parametrize("horizon", [1e6, math.inf])
def test_steps_shorten_as_soon_as_they_begin_to_leap(untrained: OptimizerNetwork, horizon: float) -> None:
    """After many gradients that agree, a few that turn back: where each is longer than the last, and not yet where all are alike."""
    untrained.controller.log_rate.fill_(-math.inf)
    untrained.controller.bend.zero_()
    grad = torch.tensor([1.0, -2.0, 3.0])
    alike, growing = (
        corrections_of(run(untrained, [grad], [[grad]] * 30 + [[(-growth) ** t * grad] for t in range(1, 8)], horizon)[1]).item()
        for growth in (1.0, 3.0)
    )
    assert alike == 0
    assert growing < -0.5


def braking(network: OptimizerNetwork, gradients: list[list[Tensor]], horizon: float) -> list[float]:
    """What a brake of 1 leaves of each step of the first tensor."""
    lengths = []
    for brake in (1.0, 0.0):
        schedule_alone(network)
        network.controller.brake.fill_(brake)
        lengths.append([rms(updates[0]) for updates in run(network, gradients[0], gradients, total_steps=horizon)[0]])
    return [braked / free for braked, free in zip(*lengths, strict=True)]


@pytest.mark.parametrize("horizon", [1e6, math.inf])
def test_a_step_is_braked_while_gradients_leap_and_no_longer(untrained: OptimizerNetwork, horizon: float) -> None:
    """What was long in a leap counts for no more than ten steps after it, though all that follows is a thousandth as long."""
    grad = torch.tensor([1.0, -2.0, 3.0])
    left = braking(untrained, [[grad]] * 30 + [[(-3.0) ** t * grad] for t in range(1, 7)] + [[grad]] * 20, horizon)
    assert left[:30] == pytest.approx([1] * 30)
    assert left[33:36] == pytest.approx(sorted(left[33:36], reverse=True))
    assert math.exp(BRAKE - 1) <= left[35] < 0.7
    assert left[-10:] == pytest.approx([1] * 10)


@pytest.mark.parametrize("horizon", [1e6, math.inf])
def test_scatter_brakes_no_step(untrained: OptimizerNetwork, generator: torch.Generator, horizon: float) -> None:
    """Where gradients are noise the swing goes up and down about zero, and braking would only make steps shorter."""
    left = braking(untrained, [draw([(30,), (30,)], generator) for _ in range(60)], horizon)
    assert left[10:] == pytest.approx([1] * 50)


def test_sketch(generator: torch.Generator) -> None:
    """Linear, each tensor's apart, exact where it has no more coordinates than buckets, and as long as the tensor in the mean."""
    layout = layout_of([torch.ones(shape) for shape in [(5,), (40, 25), ()]])
    one, two = torch.randn(2, 7, 1006, generator=generator)
    sketch = layout.sketch(one)
    assert sketch.shape == (BUCKETS, 7, 3)
    torch.testing.assert_close(layout.sketch(one - 3 * two), sketch - 3 * layout.sketch(two))
    torch.testing.assert_close(sketch[:5, :, 0].abs(), one[:, :5].T.abs() / math.sqrt(5))
    assert not sketch[5:, :, 0].any()
    torch.testing.assert_close(sketch[..., 2].abs().sum(0), one[:, -1].abs())
    many = torch.randn(400, 1006, generator=generator) + 0.5  # with a mean, which signs have to take away
    squares = layout.sketch(many).square().sum(0)[:, 1]
    assert squares.mean().item() == pytest.approx(many[:, 5:-1].square().mean().item(), rel=0.25)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_straightness(generator: torch.Generator, momentum: float) -> None:
    """1 on a straight line, however long its steps; where updates are noise it falls with the root of the time."""

    def path(updates: Tensor) -> float:
        layout, control = Layout.of((updates[0].shape,), torch.device("cpu")), Control.of(torch.zeros(CONTROL, 1))
        for age, change in enumerate(updates, 1):
            clock = Clock.after(torch.full((1,), age - 1.0), torch.ones(1), NetworkConfig())
            control = follow(control, clock, layout.sketch(change), layout.mean(change.square()))
        return straightness(control.path, clock).exp().item()

    line = torch.randn(3000, generator=generator) * torch.logspace(0, -3, 200)[:, None]
    assert path(line) == pytest.approx(1, rel=0.3)  # a sketch has an error of its own
    noise = [torch.randn(3000, generator=generator)]
    for _ in range(799):
        noise.append(momentum * noise[-1] + math.sqrt(1 - momentum**2) * torch.randn(3000, generator=generator))
    # A mean over a share of 1 / 4 of the time, which weights by the third power of it, of what is the same for some steps.
    alike = (1 + momentum) / (1 - momentum)
    for count in (200, 800):
        assert path(torch.stack(noise[:count])) == pytest.approx(math.sqrt(16 / 7 * alike / count), rel=0.35)


@pytest.mark.parametrize("horizon", [400.0, math.inf])
def test_steps_follow_the_path(untrained: OptimizerNetwork, generator: torch.Generator, horizon: float) -> None:
    """Shorter where gradients go round in circles, not where they turn back along one direction and agree in the others."""
    untrained.controller.log_rate.fill_(-math.inf)

    def correction(bend: float, gradients: list[list[Tensor]]) -> float:
        untrained.controller.bend.fill_(bend)
        return corrections_of(run(untrained, gradients[0], gradients, horizon)[1]).item()

    steep, slope = torch.randn(2, 40, 30, generator=generator)
    ahead = [[(-1.0) ** t * 3 * steep + 0.3 * slope] for t in range(200)]
    assert correction(4.0, ahead) == pytest.approx(correction(0.0, ahead), abs=4 / PATH_LEAD)
    angles = (2 * math.pi * t / 25 for t in range(200))
    circles = [[math.cos(angle) * steep + math.sin(angle) * slope] for angle in angles]
    assert correction(4.0, circles) < correction(0.0, circles) - 0.3
    assert correction(4.0, circles[:2]) == pytest.approx(correction(0.0, circles[:2]), abs=4 / PATH_LEAD)


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
