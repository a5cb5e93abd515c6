"""Every estimator of the meta-gradient against finite differences, or against another estimator where both must agree."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from meta_train_helpers import InDouble, acting_network, tiny_config, tiny_task, tiny_unroll
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim import OptimizerNetwork
from learned_optim.kernels import cpu
from learned_optim.meta_train import FAMILIES, ModuleTask, in_place
from learned_optim.meta_train.config import MetaTrainConfig
from learned_optim.meta_train.estimators import INITIAL, Estimate, estimator, evolved_gradient, meta_loss, perturbations
from learned_optim.meta_train.loop import make_meta_optimizer
from learned_optim.meta_train.unroll import Unroll
from learned_optim.rule import update


def double_unroll(**options: Any) -> tuple[OptimizerNetwork, Unroll]:
    network = acting_network().double()
    return network, tiny_unroll(network, InDouble(tiny_task(Generator().manual_seed(0))), **options)


def trained_loss(unroll: Unroll, network: OptimizerNetwork, config: MetaTrainConfig) -> float:
    """The meta-loss of a whole run, by nothing but training."""
    losses, now = [], unroll.optimizees
    with torch.no_grad():
        for t in range(unroll.horizon):
            _, now = unroll.train_step(t, now, lambda *inputs: update(network, *inputs))
            losses.append(unroll.measure(t + 1, now))
    return meta_loss(torch.stack(losses), unroll, config).item()


def finite_difference(unroll: Unroll, network: OptimizerNetwork, config: MetaTrainConfig, weight: Tensor, index: int) -> float:
    step, values, flat = 1e-6, [], weight.data.view(-1)
    for sign in (1, -1):
        flat[index] += sign * step
        values.append(trained_loss(unroll, network, config))
        flat[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)


def estimate_once(name: str, unroll: Unroll, network: OptimizerNetwork, config: MetaTrainConfig) -> tuple[Unroll, Estimate]:
    return estimator(name)(unroll, network, dict(network.named_parameters()), config)


def gradient_of(name: str, unroll: Unroll, network: OptimizerNetwork, config: MetaTrainConfig) -> dict[str, Tensor]:
    gradient = estimate_once(name, unroll, network, config)[1].gradient
    assert gradient is not None
    return gradient


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


# Backprop

LOSSES = [{}, {"meta_loss": "ramp"}, {"meta_loss": "tail"}, {"meta_loss": "final"}, {"log_loss": False}, {"recompute": True}]


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_exact_equals_finite_differences_in_float64(changes: dict[str, Any]) -> None:
    config = tiny_config(truncation=7, horizon_max=7, **changes)
    network, unroll = double_unroll(horizon=7)
    gradient, checked = gradient_of("exact", unroll, network, config), 0
    for name, weight in network.named_parameters():
        for index in range(0, weight.numel(), max(1, weight.numel() // 3)):
            expected = finite_difference(unroll, network, config, weight, index)
            assert gradient[name].view(-1)[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-8), (name, index)
            checked += abs(expected) > 1e-6
    assert checked > 12  # most of them are not zero, so the comparison says something


def test_exact_with_validation_losses_and_gradient_noise() -> None:
    config = tiny_config(truncation=6, horizon_max=6)
    network, unroll = double_unroll(horizon=6)
    plain = gradient_of("exact", unroll, network, config)
    for changes in ({"validation": True}, {"gradient_noise": 0.3}):
        changed = dataclasses.replace(unroll, **changes)
        gradient = gradient_of("exact", changed, network, config)
        expected = finite_difference(changed, network, config, network.log_step_size, 0)
        assert gradient["log_step_size"].item() == pytest.approx(expected, rel=1e-4)
        assert gradient["log_step_size"].item() != pytest.approx(plain["log_step_size"].item(), rel=1e-3)


def test_first_order_leaves_out_the_second_derivatives() -> None:
    config = tiny_config(truncation=7, horizon_max=7)
    network, unroll = double_unroll(horizon=7)
    exact, first_order = (estimate_once(name, unroll, network, config)[1] for name in ("exact", "first_order"))
    assert first_order.meta_loss == exact.meta_loss  # the same training run ...
    assert exact.gradient is not None
    assert first_order.gradient is not None
    assert (flat(exact.gradient) - flat(first_order.gradient)).norm() > 1e-3 * flat(exact.gradient).norm()  # ... another gradient
    # It is the gradient of a run whose optimizees' gradients are given: d u_s / d phi carries on undamped.
    expected = finite_difference(unroll, network, config, network.log_step_size, 0)
    assert first_order.gradient["log_step_size"].item() != pytest.approx(expected, rel=1e-3)


class Slope:
    """A loss that is linear in the parameters, so that its second derivatives are zero and first-order is exact."""

    def __init__(self) -> None:
        self.shapes = {"w": torch.Size([4])}

    def init(self, generator: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"w": torch.randn(4, generator=generator).double()}, {}

    def batch(self, generator: Generator) -> tuple[Tensor, ...]:
        return (torch.randn(4, generator=generator).double(),)

    validation_batch = batch

    def loss(self, params: dict[str, Tensor], buffers: Any, batch: tuple[Tensor, ...], training: bool = True) -> tuple[Tensor, Any]:
        return params["w"] @ batch[0] + 9, buffers


def test_first_order_is_exact_where_second_derivatives_vanish() -> None:
    config = tiny_config(truncation=5, horizon_min=5, horizon_max=5)
    network = acting_network().double()
    unroll = tiny_unroll(network, Slope(), horizon=5)
    first_order, exact = (flat(gradient_of(name, unroll, network, config)) for name in ("first_order", "exact"))
    torch.testing.assert_close(first_order, exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "first_order"])
@pytest.mark.parametrize("family", ["mlp", "cnn", "transformer"])
def test_recomputing_gives_the_same_gradient_to_the_last_bit(name: str, family: str) -> None:
    network = acting_network()
    unroll = tiny_unroll(network, FAMILIES[family](Generator().manual_seed(2)), horizon=11)
    plain, recomputed = (
        estimate_once(name, unroll, network, tiny_config(truncation=11, recompute=recompute)) for recompute in (False, True)
    )
    assert plain[1].meta_loss == recomputed[1].meta_loss
    assert plain[1].gradient is not None
    assert recomputed[1].gradient is not None
    for key, part in plain[1].gradient.items():
        assert torch.equal(part, recomputed[1].gradient[key]), key
    assert flat(plain[1].gradient).norm() > 0
    assert torch.equal(plain[0].optimizees.params, recomputed[0].optimizees.params)


def test_large_optimizees_wait_in_files_and_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    network = acting_network()
    unroll = tiny_unroll(network, tiny_task(Generator().manual_seed(2)), horizon=40, replicas=1)
    whole = gradient_of("exact", unroll, network, tiny_config(truncation=40))
    monkeypatch.setattr("learned_optim.meta_train.unroll.VMAP_LIMIT", 1)
    files, make = [], tempfile.TemporaryFile
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: files.append(make()) or files[-1])
    in_files = gradient_of("exact", unroll, network, tiny_config(truncation=40, recompute=True))
    assert torch.equal(flat(whole), flat(in_files))
    assert len(files) == 19  # segments of two steps, of which the last needs none
    assert all(file.closed for file in files)


@pytest.mark.skipif(cpu.matrix_dtype() is None, reason="large matrices are orthogonalised in fp32 on this processor")
def test_gradient_of_large_matrices_in_bfloat16_is_the_same_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = acting_network(), torch.randn(64, 130, generator=Generator().manual_seed(0))

    def sample(generator: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(64, (16,), generator=generator)
        return inputs[index], inputs[index]

    task = ModuleTask(lambda: nn.Sequential(nn.Linear(130, 140), nn.Tanh(), nn.Linear(140, 130)), sample, F.mse_loss)
    unroll = tiny_unroll(network, task, horizon=10, replicas=1)
    fine = flat(gradient_of("exact", unroll, network, tiny_config(truncation=10)))
    monkeypatch.setattr("learned_optim.meta_train.unroll.VMAP_LIMIT", 1)
    coarse = flat(gradient_of("exact", unroll, network, tiny_config(truncation=10)))
    assert not torch.equal(coarse, fine)
    assert (coarse - fine).norm() < 0.02 * fine.norm()


def test_recomputing_repeats_dropout_and_batch_norm() -> None:
    inputs = torch.randn(64, 4)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4))

    def sample(generator: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(64, (8,), generator=generator)
        return inputs[index], inputs[index]

    network = acting_network()
    unroll = tiny_unroll(network, ModuleTask(build, sample, F.mse_loss), horizon=9)
    results = [estimate_once("exact", unroll, network, tiny_config(truncation=9, recompute=recompute)) for recompute in (False, True)]
    gradients = [flat(estimate.gradient or {}) for _, estimate in results]
    assert torch.equal(*gradients)
    buffers = [after.optimizees.buffers for after, _ in results]
    assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
    assert (next(value for key, value in buffers[0].items() if key.endswith("num_batches_tracked")) == 9).all()


def test_truncations_follow_the_path_of_one_and_sum_to_its_meta_loss() -> None:
    network, unroll = double_unroll(horizon=10)
    whole, total = estimate_once("exact", unroll, network, tiny_config(truncation=10, horizon_max=10))
    config, stretches = tiny_config(truncation=4, horizon_max=10), []
    while unroll.step < unroll.horizon:
        unroll, estimate = estimate_once("exact", unroll, network, config)
        stretches.append(estimate.meta_loss * 4 / 10)
    assert len(stretches) == 3
    torch.testing.assert_close(unroll.optimizees.params, whole.optimizees.params)
    assert sum(stretches) == pytest.approx(total.meta_loss)


# Evolution strategies


def whole_run(name: str, truncation: int, seed: int, pairs: int = 512) -> Tensor:
    """The sum of an estimator's gradients by the step size over a run of 12 steps."""
    config = tiny_config(truncation=truncation, horizon_max=12, pairs=pairs, sigma=0.02)
    network, unroll = double_unroll(horizon=12, seed=seed)
    network.log_step_size.detach().fill_(math.log(0.02))  # short, so that runs do not differ by more than by the bias
    weights = {"log_step_size": network.log_step_size}
    total = torch.zeros((), dtype=torch.float64)
    while unroll.step < unroll.horizon:
        unroll, estimate = estimator(name)(unroll, network, weights, config)
        gradient = estimate.gradient or evolved_gradient(estimate, weights, config, name)
        total += gradient["log_step_size"] * truncation / 12
    return total


def test_pes_is_unbiased_where_truncated_backprop_and_truncated_es_are_not() -> None:
    seeds = range(8)
    truth = torch.stack([whole_run("exact", 12, seed) for seed in seeds])

    def bias_and_error(name: str, truncation: int) -> tuple[float, float]:
        errors = torch.stack([whole_run(name, truncation, seed) for seed in seeds]) - truth
        return errors.mean().abs().item(), (errors.std() / len(errors) ** 0.5).item()

    size = truth.mean().abs().item()
    bias, error = bias_and_error("pes", 3)
    assert error < 0.1 * size  # the comparison has power
    assert bias < 4 * error
    bias, error = bias_and_error("es", 12)  # with nothing cut off, ES is unbiased too
    assert bias < 4 * error
    for name in ("exact", "es"):
        bias, error = bias_and_error(name, 3)
        assert bias > 0.2 * size, name
        assert bias > 4 * error, name


def test_particles_train_as_a_network_with_their_weights_would() -> None:
    network, unroll = double_unroll(horizon=8)
    weights = dict(network.named_parameters())
    config = tiny_config(truncation=4, horizon_max=8, pairs=1, sigma=0.05)
    after, estimate = unroll, None
    shifted = [acting_network().double(), acting_network().double()]
    for _ in range(2):
        after, estimate = estimator("pes")(after, network, weights, config)
    assert estimate is not None
    for sign, other, params in zip((-1, 1), shifted, after.optimizees.params, strict=True):
        now = unroll.optimizees
        with torch.no_grad():
            for begin in (0, 4):
                noise = perturbations(weights, unroll.seed, begin, 1)
                for name, weight in other.named_parameters():
                    weight.copy_(weights[name] + sign * config.sigma * noise[name][0])
                for t in range(begin, begin + 4):
                    _, now = unroll.train_step(t, now, functools.partial(update, other))
        torch.testing.assert_close(params, now.params)


def test_scales_are_factors_of_sigma_and_of_the_learning_rate() -> None:
    network, unroll = double_unroll(horizon=8)
    weights = dict(network.named_parameters())
    plain, scaled = (
        tiny_config(truncation=8, horizon_max=8, sigma=sigma, scales=scales) for sigma, scales in ((0.02, {}), (0.01, {"": 2.0}))
    )
    gradients = [evolved_gradient(estimate_once("pes", unroll, network, config)[1], weights, config, "pes") for config in (plain, scaled)]
    torch.testing.assert_close(flat(gradients[0]), flat(gradients[1]))
    optimizer, rates = make_meta_optimizer(weights, tiny_config(learning_rate=0.1, scales={"": 2.0, "coordinate": 0.5}))
    found = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert found == {id(weight): 0.05 if name.startswith("coordinate") else 0.2 for name, weight in weights.items()}
    assert sorted(rates) == [0.05, 0.2]


@pytest.mark.skipif(cpu.library() is None, reason="needs the compiled kernel")
@pytest.mark.parametrize("name", ["pes", "es"])
def test_large_optimizees_evolve_in_place_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    network, config = acting_network(), tiny_config(truncation=4, horizon_max=8)

    def run() -> tuple[Unroll, list[float]]:
        unroll, found = tiny_unroll(network, FAMILIES["cnn"](Generator().manual_seed(3)), horizon=8), []
        for _ in range(2):  # the second stretch goes on with the state of the first
            unroll, estimate = estimate_once(name, unroll, network, config)
            found += estimate.differences or []
        return unroll, found

    unroll, differences = run()
    monkeypatch.setattr("learned_optim.meta_train.unroll.VMAP_LIMIT", 1)
    assert in_place.serves(network, unroll.optimizees)
    other, same = run()
    assert same == pytest.approx(differences, rel=2e-2, abs=1e-5)
    for mine, theirs in zip(other.optimizees.differentiable(), unroll.optimizees.differentiable(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


# Learned initial parameters


def quadratic(inner: int) -> tuple[Tensor, Tensor]:
    network, unroll = double_unroll(horizon=inner)
    config = tiny_config(truncation=inner, log_loss=False)
    start = unroll.optimizees.params[0].clone().requires_grad_()
    params = start.expand(2, -1)
    unroll = dataclasses.replace(unroll, optimizees=unroll.optimizees._replace(params=params.detach()))
    _, estimate = estimator("exact")(unroll, network, {INITIAL: nn.Parameter(start.detach())}, config)
    assert estimate.gradient is not None
    return estimate.gradient[INITIAL], finite_difference_of_start(unroll, network, config)


def finite_difference_of_start(unroll: Unroll, network: OptimizerNetwork, config: MetaTrainConfig) -> Tensor:
    """By the first three coordinates of the initial parameters, which all replicas share."""
    found = []
    for index in range(3):
        values = []
        for sign in (1, -1):
            params = unroll.optimizees.params.clone()
            params[:, index] += sign * 1e-6
            moved = dataclasses.replace(unroll, optimizees=unroll.optimizees._replace(params=params))
            values.append(trained_loss(moved, network, config))
        found.append((values[0] - values[1]) / 2e-6)
    return torch.tensor(found, dtype=torch.float64)


def test_exact_gradient_of_initial_parameters_equals_finite_differences() -> None:
    gradient, expected = quadratic(5)
    torch.testing.assert_close(gradient[:3], expected, rtol=1e-4, atol=1e-8)


def test_reptile_is_the_way_that_training_moved_the_parameters() -> None:
    network, unroll = double_unroll(horizon=5)
    weights = {INITIAL: nn.Parameter(unroll.optimizees.params[0])}
    after, estimate = estimator("reptile")(unroll, network, weights, tiny_config(truncation=5))
    assert estimate.gradient is not None
    torch.testing.assert_close(estimate.gradient[INITIAL], (unroll.optimizees.params - after.optimizees.params).mean(0))
    assert estimate.gradient[INITIAL].norm() > 0


RESIDENT = """
from pathlib import Path
import torch
from learned_optim.meta_train import process

def grown():
    def mebibytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) / 256
    before = mebibytes()
    torch.ones(2**25).sum()
    return mebibytes() - before

process.settle()
with process.thrifty():
    inside = grown()
print(inside, grown(), grown())
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc's malloc is settled")
def test_a_settled_process_keeps_large_blocks_unless_it_is_thrifty() -> None:
    """128 MiB that were used once: inside nothing is left of them, outside they wait for the next."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    inside, first, again = map(float, done.stdout.split())
    assert inside < 32 < 100 < first
    assert again < 32  # the kept block served
