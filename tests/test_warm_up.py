"""Steps begin short, and lengthen only while gradients go on pointing where the steps before them went."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from rule_helpers import rms
from torch import nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.config import NetworkConfig
from learned_optim.network import CREEP, HASTE
from learned_optim.rule import Control


def update_sizes(gradients: list[torch.Tensor], network: OptimizerNetwork) -> list[float]:
    param = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = LearnedOptimizer([param], network), []
    for grad in gradients:
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        sizes.append(rms(param.detach() - before))
    return sizes


def with_and_without() -> tuple[OptimizerNetwork, OptimizerNetwork]:
    network = OptimizerNetwork(NetworkConfig()).requires_grad_(False)
    plain = copy.deepcopy(network)
    plain.controller.log_start.zero_()
    return network, plain


def shares(gradients: list[torch.Tensor]) -> list[float]:
    """What the warm-up leaves of each step."""
    return [one / other for one, other in zip(*(update_sizes(gradients, network) for network in with_and_without()), strict=True)]


def test_a_first_step_is_a_fiftieth_and_agreeing_gradients_end_the_warm_up_within_six_steps():
    gradients = [torch.ones(20, 30)] * 12
    found = shares(gradients)
    assert math.isclose(found[0], 0.02, rel_tol=0.05)
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(found))
    assert all(math.isclose(share, 1, rel_tol=1e-4) for share in found[6:])


def test_gradients_that_turn_back_keep_steps_short():
    gradients = [torch.ones(20, 30) * (-1) ** t for t in range(20)]
    assert max(shares(gradients)) < 0.03


def test_the_warm_up_is_left_for_good():
    network, plain = with_and_without()
    gradients = [torch.ones(20, 30)] * 12 + [torch.ones(20, 30) * (-1) ** t for t in range(30)]
    one, other = update_sizes(gradients, network), update_sizes(gradients, plain)
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(one[8:], other[8:], strict=True))


def noisy(count: int) -> list[torch.Tensor]:
    """Gradients that agree by about as much as those of a small batch: their cosines with the momentum are about 0.2."""
    generator = torch.Generator().manual_seed(0)
    return [0.3 + torch.randn(20, 30, generator=generator) for _ in range(count)]


def test_full_steps_that_turn_back_at_once_are_taken_back():
    """Adapters look so: gradients agree until steps are as long as the model bears, and the mean of ten is late to tell."""
    agreeing = noisy(40)
    reached = next(t for t, share in enumerate(shares(agreeing)) if share > 0.99)
    turning = [torch.ones(20, 30) * (-1) ** (t + 1) for t in range(40)]
    assert shares(agreeing[: reached + 1] + turning)[-1] < 0.1
    assert shares([*agreeing, *turning])[-1] > 0.99  # full steps had proved themselves


def test_trained_matrices_climb_with_care_and_a_fresh_one_among_them_does_not():
    """As a pretrained model with a new read-out that starts far off: all gradients agree until it is where it belongs."""
    generator = torch.Generator().manual_seed(0)
    trained = [nn.Parameter(torch.randn(24, 3, generator=generator) @ torch.randn(3, 24, generator=generator)) for _ in range(40)]
    fresh, vector = nn.Parameter(torch.randn(24, 24, generator=generator)), nn.Parameter(torch.ones(24))
    params = [*trained, fresh, vector]
    moved = {}
    for name, network in zip(("with", "without"), with_and_without(), strict=True):
        optimizer = LearnedOptimizer(params, network)
        start = [param.detach().clone() for param in params]
        for _ in range(8):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        moved[name] = [rms(param.detach() - other) for param, other in zip(params, before, strict=True)]
        for param, value in zip(params, start, strict=True):
            param.data.copy_(value)
    shares = [one / other for one, other in zip(moved["with"], moved["without"], strict=True)]
    assert max(shares[:40]) < 0.13
    assert shares[40] > 0.99
    assert shares[41] < 0.2  # what cannot be seen is as most of the others


@pytest.mark.parametrize("count", [1, 12])
def test_trained_matrices_climb_by_so_much_a_step_however_many_they_are(count):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(24, 3, generator=generator) @ torch.randn(3, 24, generator=generator)) for _ in range(count)]
    optimizer = LearnedOptimizer(params, with_and_without()[0])
    for _ in range(8):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        climbed = Control.of(optimizer.state[param]["control"]).climbed.item()
        assert math.isclose(climbed, 8 * HASTE, rel_tol=1e-4)  # of which the first step's is creep


def test_vectors_have_no_say_where_there_are_matrices():
    controller = OptimizerNetwork(NetworkConfig()).controller
    age, climbed, trend = torch.full((4,), 10.0), torch.full((4,), 1.0), torch.tensor([0.1, 0.1, -0.5, -0.5])
    vector, fresh = -torch.ones(4), torch.zeros(4)
    both = torch.tensor([0.0, 0.0, -1.0, -1.0])
    after = controller.climb(trend, climbed, both, age)[0]
    assert torch.allclose(after, climbed + controller.climb_rate * 0.1)
    for alike in (vector, fresh):  # the mean of all
        assert (controller.climb(trend, climbed, alike, age)[0] < climbed).all()


def test_where_gradients_say_nothing_what_was_trained_climbs_with_the_logarithm_of_time_and_what_is_fresh_does_not():
    generator = torch.Generator().manual_seed(0)
    for param, share in (
        (nn.Parameter(torch.randn(40, 3, generator=generator) @ torch.randn(3, 24, generator=generator)), 1.0),
        (nn.Parameter(torch.randn(40, 24, generator=generator)), 0.0),
    ):
        optimizer = LearnedOptimizer([param], with_and_without()[0])
        for step in range(30):  # each gradient is orthogonal to those before
            param.grad = torch.zeros(40, 24)
            param.grad[step] = 1
            optimizer.step()
        climbed = Control.of(optimizer.state[param]["control"]).climbed.item()
        assert math.isclose(climbed, share * sum(min(CREEP / step, HASTE) for step in range(1, 31)), rel_tol=1e-4)


def test_where_gradients_say_more_it_counts_alone():
    controller = OptimizerNetwork(NetworkConfig()).controller
    age, trained, climbed = torch.full((8,), 10.0), torch.ones(8), torch.zeros(8)

    def climb(trend: float) -> float:
        return controller.climb(torch.full((8,), trend), climbed, trained, age)[0][0].item()

    assert math.isclose(climb(0.06), 3 * 0.06, rel_tol=1e-5)
    assert math.isclose(climb(0.1), HASTE, rel_tol=1e-5)
    assert math.isclose(climb(0.001), CREEP / 10, rel_tol=1e-5)
    assert climb(-0.1) < 0, "and gradients that turn back still shorten steps"


def test_a_trained_model_is_not_lost_in_fine_tuning():
    """Labels of a related problem, in small batches: without the warm-up the first steps undo what was learned."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 20, generator=generator)
    teacher = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 5))
    labels = teacher(3 * inputs).argmax(1)
    model = nn.Sequential(nn.Linear(20, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 5))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(600):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[:1500]), labels[:1500]).backward()
        optimizer.step()
    start = F.cross_entropy(model(inputs), labels).item()
    losses = {}
    for name in ("bundled", "without"):
        network = load_network("default")
        if name == "without":
            network.controller.log_start.data.zero_()
        tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(1)
        optimizer = LearnedOptimizer(tuned.parameters(), network)
        highest = 0.0
        for _ in range(10):
            index = torch.randint(1500, (4,), generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(tuned(inputs[index]), labels[index]).backward()
            optimizer.step()
            highest = max(highest, F.cross_entropy(tuned(inputs), labels).item())
        losses[name] = highest
    assert losses["bundled"] < start + 0.5 * (losses["without"] - start)
