"""Meta-training: the meta-gradient is right, a run can be stopped and resumed, and its result works."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.config import to_json
from learned_optim.meta_train import FAMILIES, MetaTrainConfig, ModuleTask, meta_train
from learned_optim.meta_train import __main__ as command
from learned_optim.meta_train.families import Block, TextModel, mlp_module, sampler
from learned_optim.meta_train.tasks import Reparametrized, Task
from learned_optim.meta_train.unroll import advance, draw, initial_params, losses, start

SMALL = NetworkConfig(hidden_units=2, control_units=3)
CPU = torch.device("cpu")


def tiny_task(generator: Generator) -> ModuleTask:
    inputs = torch.randn(64, 3, generator=generator)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    return ModuleTask(lambda: mlp_module([3, 5, 1], nn.Tanh), sampler(inputs, targets, 8), F.mse_loss)


def acting_network(config: NetworkConfig = SMALL) -> OptimizerNetwork:
    """A network whose LSTM and controller are not zero."""
    torch.manual_seed(3)
    network = OptimizerNetwork(config)
    with torch.no_grad():
        network.coordinate.out.normal_(std=0.5)
        network.controller.correction.weight.normal_(std=0.3)
        network.controller.context.weight.normal_(std=0.3)
    return network


def tiny_config(**changes: object) -> MetaTrainConfig:
    lengths = {"truncation": 4, "horizon_min": 6, "horizon_max": 12}
    config = MetaTrainConfig(
        network=SMALL, meta_steps=6, families_per_step=2, unrolls_per_family=2, replicas=2, checkpoint_every=2, **lengths
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


# The meta-gradient


class DoubleTask:
    """A task in float64."""

    def __init__(self, task: Task) -> None:
        self.task, self.shapes = task, task.shapes

    def init(self, generator: Generator) -> dict[str, torch.Tensor]:
        return {name: param.double() for name, param in self.task.init(generator).items()}

    def batch(self, generator: Generator) -> tuple[torch.Tensor, ...]:
        return tuple(part.double() for part in self.task.batch(generator))

    def loss(self, params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.task.loss(params, batch)


def double_unroll(first_order: bool) -> tuple[float, dict[str, torch.Tensor], OptimizerNetwork, Callable[[], torch.Tensor]]:
    network = acting_network().double()
    generator = Generator().manual_seed(0)
    task = DoubleTask(tiny_task(generator))
    unroll = start(task, network, initial_params(task, 2, generator), 20, True, generator)
    batches = [draw(task, 2, generator, CPU) for _ in range(7)]

    def meta_loss() -> torch.Tensor:
        return advance(network, unroll, batches, first_order=first_order)[1].mean()

    loss = meta_loss()
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    return loss.item(), dict(zip([name for name, _ in network.named_parameters()], gradient, strict=True)), network, meta_loss


def finite_differences(network: OptimizerNetwork, meta_loss: Callable[[], torch.Tensor], name: str, index: int) -> float:
    weight = dict(network.named_parameters())[name].data.view(-1)
    step = 1e-6
    values = []
    for sign in (1, -1):
        weight[index] += sign * step
        values.append(meta_loss().item())
        weight[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)


def test_exact_meta_gradient_equals_finite_differences_in_float64() -> None:
    _, gradient, network, meta_loss = double_unroll(first_order=False)
    checked = 0
    for name, part in gradient.items():
        for index in range(0, part.numel(), max(1, part.numel() // 4)):
            expected = finite_differences(network, meta_loss, name, index)
            assert part.view(-1)[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-8), (name, index)
            checked += abs(expected) > 1e-6
    assert checked > 15  # most of them are not zero, so the comparison says something


def test_first_order_meta_gradient_leaves_out_the_second_derivatives() -> None:
    exact_loss, exact, _, _ = double_unroll(first_order=False)
    loss, first_order, network, meta_loss = double_unroll(first_order=True)
    assert loss == exact_loss  # the same training run ...
    difference = torch.cat([(exact[name] - first_order[name]).flatten() for name in exact]).norm()
    size = torch.cat([part.flatten() for part in exact.values()]).norm()
    assert difference > 1e-3 * size  # ... with another gradient
    expected = finite_differences(network, meta_loss, "log_step_size", 0)
    assert first_order["log_step_size"].item() != pytest.approx(expected, rel=1e-4)


# The unroll


def test_an_unroll_is_what_the_optimizer_does() -> None:
    network = acting_network()
    generator = Generator().manual_seed(1)
    task = tiny_task(generator)
    first = initial_params(task, 2, generator)
    batches = [draw(task, 2, generator, CPU) for _ in range(9)]
    unroll = start(task, network, first, 8, True, generator)
    advanced, measured = advance(network, unroll, batches, first_order=False)
    assert advanced.step == 8
    assert measured.shape == (8, 2)

    for replica in range(2):
        parts = first[replica].split([shape.numel() for shape in task.shapes.values()])
        named = zip(task.shapes.items(), parts, strict=True)
        params = {name: nn.Parameter(part.view(shape).clone()) for (name, shape), part in named}
        optimizer = LearnedOptimizer(params.values(), acting_network(), total_steps=8)
        for batch in batches[:-1]:
            optimizer.zero_grad()
            task.loss(params, tuple(part[replica] for part in batch)).backward()
            optimizer.step()
        trained = torch.cat([param.detach().flatten() for param in params.values()])
        torch.testing.assert_close(advanced.params[replica], trained, rtol=1e-4, atol=1e-5)
        final = task.loss(params, tuple(part[replica] for part in batches[-1]))
        torch.testing.assert_close(measured[-1, replica], final.detach(), rtol=1e-3, atol=1e-5)


def test_two_truncations_follow_the_path_of_one() -> None:
    network = acting_network()
    generator = Generator().manual_seed(1)
    task = tiny_task(generator)
    unroll = start(task, network, initial_params(task, 2, generator), 50, False, generator)
    batches = [draw(task, 2, generator, CPU) for _ in range(7)]
    whole, _ = advance(network, unroll, batches, first_order=False)
    half, _ = advance(network, unroll, batches[:4], first_order=False)
    half, _ = advance(network, half, batches[3:], first_order=False)
    torch.testing.assert_close(half.params, whole.params)
    assert half.step == whole.step == 6
    for key, value in whole.state.items():
        torch.testing.assert_close(half.state[key], value)


def test_tied_weights_are_one_tensor_in_the_unroll() -> None:
    generator = Generator().manual_seed(0)
    text = torch.randint(96, (400,), generator=generator)

    def sample(generator: Generator) -> tuple[torch.Tensor, ...]:
        index = torch.randint(390, (4, 1), generator=generator) + torch.arange(9)
        return text[index][:, :-1], text[index][:, 1:]

    task = ModuleTask(lambda: TextModel(8, [Block(8, 2)], 8, tied=True), sample, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()))
    assert "embedding.weight" in task.shapes
    assert "head.weight" not in task.shapes
    network = acting_network()
    unroll = start(task, network, initial_params(task, 1, generator), 10, True, generator)
    advanced, _ = advance(network, unroll, [draw(task, 1, generator, CPU) for _ in range(3)], first_order=False)
    # The gradient reaches the shared tensor through both its uses: rows of characters that the input lacks are trained by the read-out.
    moved = (advanced.params - unroll.params)[0].split([shape.numel() for shape in task.shapes.values()])
    embedding = moved[list(task.shapes).index("embedding.weight")].view(96, 8)
    assert (embedding.norm(dim=1) > 0).all()


# Tasks


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_samples_trainable_tasks_from_a_seed(name: str) -> None:
    for seed in range(4):
        made = []
        for _ in range(2):
            generator = Generator().manual_seed(seed)
            task = FAMILIES[name](generator)
            params = initial_params(task, 2, generator)
            batch = draw(task, 2, generator, CPU)
            made.append(losses(task, params, batch))
        assert torch.equal(made[0], made[1])
        assert made[0].isfinite().all()
        network = OptimizerNetwork(SMALL)
        unroll = start(task, network, params, 10, True, generator)
        _, measured = advance(network, unroll, [batch] * 11, first_order=False)
        assert (measured[-1] < losses(task, params, batch)).all()


def test_reparametrization_changes_scales_and_not_the_function() -> None:
    generator = Generator().manual_seed(0)
    task = tiny_task(generator)
    scaled = Reparametrized(task, generator, 1.0)
    plain, changed = task.init(Generator().manual_seed(5)), scaled.init(Generator().manual_seed(5))
    batch = task.batch(generator)
    torch.testing.assert_close(scaled.loss(changed, batch), task.loss(plain, batch))
    assert all(not torch.allclose(changed[name], plain[name]) for name in plain)


def test_a_module_with_buffers_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"running_mean.*track_running_stats=False"):
        ModuleTask(lambda: nn.BatchNorm1d(3), lambda _: (), F.mse_loss)


# The loop


def test_meta_training_lowers_the_meta_loss() -> None:
    config = tiny_config(
        meta_steps=60,
        truncation=10,
        horizon_min=10,
        horizon_max=10,
        families_per_step=1,
        learning_rate=2e-2,
        reparametrize=0.0,
    )
    history = meta_train({"tiny": tiny_task}, config).meta_losses
    assert sum(history[-15:]) < sum(history[:15]) - 15 * 0.1


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    runs = [meta_train({"tiny": tiny_task}, tiny_config(seed=seed)).network.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_after", [1, 2, 4])  # before the first checkpoint, right at one, between two
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, kill_after: int) -> None:
    families = {name: FAMILIES[name] for name in ("mlp", "regression")}
    config = tiny_config(meta_steps=7, warm_restart=0.5)
    whole = meta_train(families, config, folder=tmp_path / "whole")

    def kill(meta_step: int, figures: dict[str, float]) -> None:
        if meta_step == kill_after:
            raise Killed

    with pytest.raises(Killed):
        meta_train(families, config, folder=tmp_path / "killed", progress=kill)
    resumed_at = []
    resumed = meta_train(families, config, folder=tmp_path / "killed", progress=lambda step, _: resumed_at.append(step))
    assert resumed_at[0] == kill_after // 2 * 2
    assert resumed.meta_losses == whole.meta_losses
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], weight)
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "killed")]
    assert [entry["meta_step"] for entry in logs[1]] == list(range(7))
    assert [entry["meta_loss"] for entry in logs[1]] == [entry["meta_loss"] for entry in logs[0]]
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    meta_train({"tiny": tiny_task}, tiny_config(meta_steps=2), folder=tmp_path)
    with pytest.raises(ValueError, match=r"differs in \['learning_rate'\]"):
        meta_train({"tiny": tiny_task}, tiny_config(meta_steps=2, learning_rate=1.0), folder=tmp_path)


def test_frozen_parts_stay_and_the_rest_moves() -> None:
    torch.manual_seed(0)
    fresh = OptimizerNetwork(SMALL).state_dict()
    trained = meta_train({"tiny": tiny_task}, tiny_config(frozen=("controller", "log_"))).network.state_dict()
    same = {name for name in fresh if torch.equal(fresh[name], trained[name])}
    assert {name for name in fresh if name.startswith(("controller", "log_"))} <= same
    assert "coordinate.out" not in same


def test_unrolls_that_are_not_finite_are_dropped_and_counted() -> None:
    def poisoned(generator: Generator) -> ModuleTask:
        task = tiny_task(generator)
        task.criterion = lambda output, target: F.mse_loss(output, target) * math.nan
        return task

    result = meta_train({"tiny": tiny_task, "poisoned": poisoned}, tiny_config())
    assert result.dropped == 6  # one of the two families of each meta-step
    assert all(weight.isfinite().all() for weight in result.network.parameters())
    assert all(math.isfinite(loss) for loss in result.meta_losses)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        meta_train({}, tiny_config())


@pytest.mark.parametrize(
    "change",
    [
        {"meta_steps": 0},
        {"horizon_max": 1},
        {"meta_loss": "last"},
        {"horizon_known": 1.5},
        {"learning_rate": 0.0},
        {"clip": -1.0},
        {"reparametrize": -1.0},
    ],
)
def test_bad_configurations_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        tiny_config(**change)


# The command


def test_the_command_writes_a_folder_that_the_optimizer_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(to_json(tiny_config(meta_steps=2, truncation=2, frozen=("controller",))))
    assert command.main(["--config", str(config), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), tmp_path / "out")
    assert optimizer.network.config == SMALL
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_the_command_runs_stages_one_after_the_other(tmp_path: Path) -> None:
    stages = [tmp_path / "lstm.json", tmp_path / "controller.json"]
    stages[0].write_text(to_json(tiny_config(meta_steps=2, frozen=("controller", "log_"))))
    stages[1].write_text(to_json(tiny_config(meta_steps=2, frozen=("coordinate",))))
    assert command.main(["--config", *map(str, stages), "--out", str(tmp_path / "both")]) == 0
    assert command.main(["--config", str(stages[0]), "--out", str(tmp_path / "first")]) == 0
    assert command.main(["--config", str(stages[1]), "--out", str(tmp_path / "second"), "--start", str(tmp_path / "first")]) == 0
    first, second, both = (load_network(tmp_path / name).state_dict() for name in ("first", "second", "both"))
    assert all(torch.equal(second[name], both[name]) for name in both)
    assert all(torch.equal(first[name], both[name]) == name.startswith("coordinate") for name in both if name != "controller.context.bias")


def test_the_command_says_what_is_wrong_with_a_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"format_version": 1, "meta_stepz": 3}))
    call = [sys.executable, "-m", "learned_optim.meta_train", "--config", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "meta_stepz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_meta_training_runs_unchanged_on_cuda() -> None:
    families = {name: FAMILIES[name] for name in ("mlp", "transformer")}
    config = tiny_config(meta_steps=2)
    on_cpu = meta_train(families, config)
    on_gpu = meta_train(families, config, device="cuda")
    assert on_gpu.network.log_step_size.is_cuda
    assert on_gpu.meta_losses == pytest.approx(on_cpu.meta_losses, rel=1e-2)
