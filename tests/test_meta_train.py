"""Meta-training: it learns, it can be stopped and resumed, it says what is wrong, and its result works."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_train_helpers import SMALL, acting_network, tiny_config, tiny_task, tiny_unroll
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.config import to_json
from learned_optim.meta_train import FAMILIES, MetaTrainingDivergedError, MetaTrainResult, ModuleTask, meta_train, slots
from learned_optim.meta_train import __main__ as command
from learned_optim.meta_train.loop import divergence, schedule
from learned_optim.meta_train.slots import Slot
from learned_optim.meta_train.unroll import begin, named
from learned_optim.rule import Control, update

# The unroll


@pytest.mark.parametrize("trained", [False, True])
def test_an_unroll_is_what_the_optimizer_does(trained: bool) -> None:
    network, task = acting_network(dataclasses.replace(SMALL, lstm_format="float32")), tiny_task(Generator().manual_seed(1))
    unroll = tiny_unroll(network, task, horizon=8)
    if trained:
        initial = unroll.optimizees.params[0].clone()
        initial[:15] = torch.outer(torch.linspace(0.2, 1, 5), torch.ones(3)).flatten()  # the first layer's matrix
        unroll = begin(task, 5, initial, 2, network.config, "cpu", horizon=8, horizon_known=True)
    assert any(unroll.trained) == trained
    now = unroll.optimizees
    with torch.no_grad():
        for t in range(8):
            _, now = unroll.train_step(t, now, lambda *inputs: update(network, *inputs))
        measured = unroll.measure(8, now)

    for replica in range(2):
        params = {name: nn.Parameter(part.clone()) for name, part in named(task, unroll.optimizees.params[replica]).items()}
        optimizer = LearnedOptimizer(params.values(), network, total_steps=8)
        for t in range(8):
            optimizer.zero_grad()
            task.loss(params, {}, unroll.batches(t)[replica])[0].backward()
            optimizer.step()
        trained = torch.cat([param.detach().flatten() for param in params.values()])
        torch.testing.assert_close(now.params[replica], trained, rtol=1e-3, atol=1e-4)
        final = task.loss(params, {}, unroll.batches(8)[replica])[0]
        torch.testing.assert_close(measured[replica], final.detach(), rtol=1e-3, atol=1e-5)


def test_large_optimizees_run_one_after_the_other_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = acting_network()
    unroll = tiny_unroll(network, FAMILIES["cnn"](Generator().manual_seed(3)), horizon=3)

    def run() -> Tensor:
        now = unroll.optimizees
        for t in range(3):
            _, now = unroll.train_step(t, now, lambda *inputs: update(network, *inputs))
        return now.params.detach()

    batched = run()
    monkeypatch.setattr("learned_optim.meta_train.unroll.VMAP_LIMIT", 1)
    torch.testing.assert_close(run(), batched, rtol=1e-3, atol=1e-5)


# Slots


def begun(**changes: object) -> list[Slot]:
    """Slots that have begun five unrolls."""
    config = tiny_config(**changes)
    places = [Slot({"tiny": tiny_task}, config, "exact", "tiny", index) for index in range(20)]
    network = OptimizerNetwork(SMALL)
    for slot in places:
        for meta_step in (0, 1, 2, 3, 5):
            slot.unroll = slot._begin(network, None, meta_step)
    return places


def test_horizons_grow_with_the_curriculum() -> None:
    def horizons(meta_step: int, curriculum: float) -> list[int]:
        config = tiny_config(meta_steps=100, horizon_min=10, horizon_max=1000, truncation=5, curriculum=curriculum)
        places = [Slot({"tiny": tiny_task}, config, "exact", "tiny", index, begun=1) for index in range(40)]
        return [slot._begin(OptimizerNetwork(SMALL), None, meta_step).horizon for slot in places]

    assert max(horizons(0, 0.5)) < 15
    assert max(horizons(50, 0.5)) > 500
    assert horizons(0, 0.0) == horizons(99, 0.0) == horizons(50, 0.5)
    logs = torch.tensor(horizons(0, 0.0)).float().log()
    assert abs(logs.mean() - math.log(100)) < 0.6  # log-uniform: the median is the geometric mean of the bounds


def test_the_first_horizons_are_cut_so_that_slots_fall_out_of_step() -> None:
    config = tiny_config(horizon_min=1000, horizon_max=1000, truncation=10)
    places = [Slot({"tiny": tiny_task}, config, "exact", "tiny", index) for index in range(8)]
    first = [slot._begin(OptimizerNetwork(SMALL), None, 0).horizon for slot in places]
    assert len(set(first)) > 4
    assert max(first) <= 1000


def test_warm_restarts_go_on_with_trained_optimizees_and_fresh_state() -> None:
    network = acting_network()
    slot = Slot({"tiny": tiny_task}, tiny_config(warm_restart=1.0, horizon_max=6, truncation=6), "exact", "tiny", 0)
    slot.estimate(network, dict(network.named_parameters()), None, 0)
    assert slot.unroll is not None
    trained, task = slot.unroll.optimizees.params, slot.unroll.task
    again = slot._begin(network, None, 1)
    assert again.task is task
    assert torch.equal(again.optimizees.params, trained)
    assert not any(value.any() for key, value in again.optimizees.state.items() if key != "control")
    assert not Control.of(again.optimizees.state["control"]).step.any()


def test_augmentations_change_half_of_the_tasks() -> None:
    plain = {type(slot.unroll.task) for slot in begun(reparametrize=0.0) if slot.unroll}
    assert plain == {ModuleTask}
    for change in ({"reparametrize": 0.5}, {"loss_scale": 1.0}, {"subbatch": 0.5}, {"bfloat16": 0.5}):
        changed = [type(slot.unroll.task) is not ModuleTask for slot in begun(**({"reparametrize": 0.0} | change)) if slot.unroll]
        assert 3 <= sum(changed) <= 17, change
    noisy = [slot.unroll.gradient_noise > 0 for slot in begun(gradient_noise=1.0) if slot.unroll]
    assert 3 <= sum(noisy) <= 17


# The loop


def test_meta_training_lowers_the_meta_loss() -> None:
    lengths = {"meta_steps": 30, "truncation": 10, "horizon_min": 10, "horizon_max": 10}
    config = tiny_config(**lengths, unrolls_per_step=2, learning_rate=0.2, reparametrize=0.0)
    history = meta_train({"tiny": tiny_task}, config, network=slow_network()).meta_losses
    assert sum(history[-15:]) < sum(history[:15]) - 15 * 0.1


def slow_network() -> OptimizerNetwork:
    """Its step size is ten times too small."""
    network = OptimizerNetwork(SMALL)
    network.log_step_size.data -= math.log(10)
    return network


RATES = [("torch.optim.SGD", 0.2), ("torch.optim.AdamW", 0.2), ("learned_optim.LearnedOptimizer", 6.0)]


@pytest.mark.parametrize(("optimizer", "rate"), RATES)
def test_any_optimizer_serves_as_meta_optimizer(optimizer: str, rate: float) -> None:
    lengths = {"meta_steps": 36, "truncation": 8, "horizon_min": 8, "horizon_max": 8, "warm_restart": 0.0}
    changes = {"optimizer": optimizer, "optimizer_options": {}, "learning_rate": rate}
    families = {"tiny": lambda _: tiny_task(Generator().manual_seed(0))}
    history = meta_train(families, tiny_config(**lengths, **changes, reparametrize=0.0), network=slow_network()).meta_losses
    assert sum(history[-8:]) / 8 < sum(history[:8]) / 8 - 0.1


def test_pes_alone_learns_the_step_size() -> None:
    network = slow_network()
    lengths = {"meta_steps": 30, "truncation": 5, "horizon_min": 20, "horizon_max": 20, "pairs": 8, "sigma": 0.1}
    config = tiny_config(**lengths, estimators={"log_step_size": "pes"}, learning_rate=0.2, reparametrize=0.0, log_loss=True)
    result = meta_train({"tiny": tiny_task}, config, network=network)
    assert result.network.log_step_size > network.log_step_size + math.log(3)
    others = set(dict(network.named_parameters())) - {"log_step_size"}
    assert all(torch.equal(result.network.get_parameter(name), network.get_parameter(name)) for name in others)


def test_backprop_for_the_lstm_and_pes_for_the_controller() -> None:
    estimators = {"coordinate": "exact", "controller": "pes"}
    fresh = OptimizerNetwork(SMALL)
    before = copy.deepcopy(fresh.state_dict())
    trained = meta_train({"tiny": tiny_task}, tiny_config(estimators=estimators), network=fresh).network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "coordinate.out" in moved
    assert "controller.log_rate" in moved
    assert not {"log_step_size", "log_vector_gain"} & moved
    assert all(torch.equal(before[name], weight) for name, weight in fresh.state_dict().items())  # the caller's stays


@pytest.mark.parametrize("estimator", ["exact", "first_order", "reptile"])
def test_learned_initial_parameters_pay(estimator: str) -> None:
    """Sinusoids of random phase: starting from learned parameters, five steps get further."""

    def sinusoid(generator: Generator) -> ModuleTask:
        phase = torch.rand((), generator=generator) * 2

        def sample(generator: Generator) -> tuple[Tensor, ...]:
            x = 4 * torch.rand(16, 1, generator=generator) - 2
            return x, torch.sin(x + phase)

        return ModuleTask(lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), sample, F.mse_loss)

    torch.manual_seed(0)
    start = torch.cat([param.detach().flatten() for param in sinusoid(Generator()).module.parameters()])
    lengths = {"meta_steps": 60, "truncation": 5, "horizon_min": 5, "horizon_max": 5, "meta_loss": "final"}
    estimators = {"": "frozen", "initial": estimator}
    config = tiny_config(**lengths, estimators=estimators, learning_rate=2e-2, reparametrize=0.0, unrolls_per_family=4, log_loss=False)
    result = meta_train({"sinusoid": sinusoid}, config, initial=start)
    assert result.initial is not None
    assert not torch.equal(result.initial, start)
    assert sum(result.meta_losses[-15:]) < 0.7 * sum(result.meta_losses[:15])


def test_optimizer_and_initial_parameters_are_learned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under estimators of their own, too: all unrolls start from the learned parameters."""
    begun = []
    begin = slots.begin
    monkeypatch.setattr(slots, "begin", lambda *arguments, **options: begun.append(arguments[2]) or begin(*arguments, **options))
    size = sum(shape.numel() for shape in tiny_task(Generator()).shapes.values())
    for estimators in ({"": "exact"}, {"": "exact", "initial": "reptile"}):
        start, fresh = 0.1 * torch.randn(size), OptimizerNetwork(SMALL)
        result = meta_train({"tiny": tiny_task}, tiny_config(estimators=estimators, reparametrize=0.0), network=fresh, initial=start)
        assert result.initial is not None
        assert not torch.equal(result.initial, start)
        assert not torch.equal(result.network.coordinate.out, fresh.coordinate.out)
        assert begun
        assert all(initial is not None for initial in begun)
        begun.clear()
    with pytest.raises(ValueError, match="are 3 numbers"):
        meta_train({"tiny": tiny_task}, tiny_config(), initial=torch.zeros(3))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    runs = [meta_train({"tiny": tiny_task}, tiny_config(seed=seed)).network.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


class KilledError(Exception):
    pass


MIX = {"coordinate": "exact", "controller": "pes", "log_": "es"}
KILLED = tiny_config(meta_steps=7, warm_restart=0.5, estimators=MIX, gradient_noise=0.5, loss_scale=0.5)
TWO_FAMILIES = {name: FAMILIES[name] for name in ("mlp", "regression")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaTrainResult, Path]:
    """A run that was not killed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return meta_train(TWO_FAMILIES, KILLED, folder=folder), folder


@pytest.mark.parametrize("kill_after", [1, 2, 4])  # before the first checkpoint, right at one, between two
def test_a_killed_run_resumes_to_the_same_numbers(whole: tuple[MetaTrainResult, Path], tmp_path: Path, kill_after: int) -> None:
    result, folder = whole

    def kill(meta_step: int, figures: dict[str, float]) -> None:
        if meta_step == kill_after:
            raise KilledError

    with pytest.raises(KilledError):
        meta_train(TWO_FAMILIES, KILLED, folder=tmp_path, progress=kill)
    resumed_at = []
    resumed = meta_train(TWO_FAMILIES, KILLED, folder=tmp_path, progress=lambda step, _: resumed_at.append(step))
    assert resumed_at[0] == kill_after // 2 * 2
    assert resumed.meta_losses == result.meta_losses
    for name, weight in result.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], weight)
    logs = [[json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()] for each in (folder, tmp_path)]
    assert [entry["meta_step"] for entry in logs[1]] == list(range(7))
    assert [entry["meta_loss"] for entry in logs[1]] == [entry["meta_loss"] for entry in logs[0]]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    meta_train({"tiny": tiny_task}, tiny_config(meta_steps=2), folder=tmp_path)
    with pytest.raises(ValueError, match=r"differs in \['learning_rate'\]"):
        meta_train({"tiny": tiny_task}, tiny_config(meta_steps=2, learning_rate=1.0), folder=tmp_path)


def poisoned(generator: Generator) -> ModuleTask:
    task = tiny_task(generator)
    return ModuleTask(task.build, task.batch, lambda output, target: F.mse_loss(output, target) * math.nan)


@pytest.mark.parametrize("estimator", ["exact", "pes"])
def test_unrolls_that_are_not_finite_are_dropped_and_counted(estimator: str) -> None:
    result = meta_train({"tiny": tiny_task, "poisoned": poisoned}, tiny_config(estimators={"": estimator}))
    assert result.dropped == 6  # one of the two families of each meta-step
    assert all(weight.isfinite().all() for weight in result.network.parameters())
    assert all(math.isfinite(loss) for loss in result.meta_losses)


def test_a_run_stops_where_nothing_stays_finite(tmp_path: Path) -> None:
    with pytest.raises(MetaTrainingDivergedError, match="no unroll"):
        meta_train({"poisoned": poisoned}, tiny_config(meta_steps=100, replicas=1, unrolls_per_step=1), folder=tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_diverging_meta_loss_is_told_from_a_noisy_one() -> None:
    assert divergence([-1.0] * 50 + [-0.1] * 50 + [math.nan] * 3, tiny_config()) is None
    trouble = divergence([-1.0] * 50 + [-2.0, 1.4] * 25 + [0.3] * 50, tiny_config())
    assert trouble is not None
    assert "is 0.300, and has been -1.000; lower learning_rate" in trouble


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="needs families"):
        meta_train({}, tiny_config())
    with pytest.raises(ValueError, match="tinny"):
        meta_train({"tiny": tiny_task}, tiny_config(families=("tinny",)))
    with pytest.raises(ValueError, match="only 2 unrolls are kept going"):
        meta_train({"tiny": tiny_task}, tiny_config(unrolls_per_step=3))
    with pytest.raises(ValueError, match="leave nothing to train"):
        meta_train({"tiny": tiny_task}, tiny_config(estimators={"": "frozen"}))
    with pytest.raises(ValueError, match="reptile"):
        meta_train({"tiny": tiny_task}, tiny_config(estimators={"": "reptile"}))
    with pytest.raises(ValueError, match="too many for evolution strategies"):
        meta_train({"tiny": tiny_task}, tiny_config(estimators={"": "exact", "initial": "pes"}), initial=torch.zeros(3))
    with pytest.raises(ValueError, match=r"torch\.optim\.Addam"):
        meta_train({"tiny": tiny_task}, tiny_config(optimizer="torch.optim.Addam"))


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
        {"estimators": {"": "exacct"}},
        {"schedule": "linear"},
        {"scales": {"coordinate": 0.0}},
    ],
)
def test_bad_configurations_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        tiny_config(**change)


def test_final_loss_through_a_short_truncation_is_refused_for_backprop_alone() -> None:
    with pytest.raises(ValueError, match="truncation of at least horizon_max"):
        tiny_config(meta_loss="final")
    tiny_config(meta_loss="final", estimators={"": "pes"})


def test_the_schedule_warms_up_and_anneals() -> None:
    config = tiny_config(meta_steps=100, warmup=10)
    assert schedule(config, 0) == pytest.approx(0.1)
    assert schedule(config, 50) == pytest.approx(0.5)
    assert schedule(config, 99) < 0.01
    assert schedule(tiny_config(schedule="constant"), 5) == 1.0


# The command


def test_the_command_writes_a_folder_that_the_optimizer_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(to_json(tiny_config(meta_steps=2, truncation=2, families=("mlp", "cnn"), bfloat16=0.5, subbatch=0.5)))
    assert command.main(["--config", str(config), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), tmp_path / "out")
    assert optimizer.network.config == SMALL
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_the_command_runs_stages_one_after_the_other(tmp_path: Path) -> None:
    stages = [tmp_path / "lstm.json", tmp_path / "controller.json"]
    stages[0].write_text(to_json(tiny_config(meta_steps=2, estimators={"coordinate": "exact"})))
    stages[1].write_text(to_json(tiny_config(meta_steps=2, estimators={"controller": "exact", "log_": "exact"})))
    assert command.main(["--config", *map(str, stages), "--out", str(tmp_path / "both")]) == 0
    assert command.main(["--config", str(stages[0]), "--out", str(tmp_path / "first")]) == 0
    assert command.main(["--config", str(stages[1]), "--out", str(tmp_path / "second"), "--start", str(tmp_path / "first")]) == 0
    first, second, both = (load_network(tmp_path / name).state_dict() for name in ("first", "second", "both"))
    assert all(torch.equal(second[name], both[name]) for name in both)
    assert all(torch.equal(first[name], both[name]) == name.startswith("coordinate") for name in both)


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
    config = tiny_config(meta_steps=2, estimators=MIX)
    on_cpu = meta_train(families, config)
    on_gpu = meta_train(families, config, device="cuda")
    assert on_gpu.network.log_step_size.is_cuda
    assert on_gpu.meta_losses == pytest.approx(on_cpu.meta_losses, rel=1e-2)


def test_scalars_are_held_during_the_run_and_get_their_own_values_back(tmp_path: Path) -> None:
    """What is learned is what a network without them learns; and a resumed run ends the same."""
    config = tiny_config(estimators={"coordinate": "exact"}, held={"controller.log_rate": -30.0})
    result = meta_train(FAMILIES, config, folder=tmp_path)
    own = OptimizerNetwork(config.network).controller.log_rate
    assert torch.equal(result.network.controller.log_rate, own)
    torch.manual_seed(config.seed)
    without = OptimizerNetwork(config.network)
    with torch.no_grad():
        without.controller.log_rate.fill_(-30.0)
    alone = meta_train(FAMILIES, dataclasses.replace(config, held={}), network=without)
    assert torch.equal(alone.network.coordinate.gate_weight, result.network.coordinate.gate_weight)
    again = meta_train(FAMILIES, config, folder=tmp_path)
    assert torch.equal(again.network.controller.log_rate, own)


@pytest.mark.parametrize("name", ["coordinate.skip", "no.such", "log_step_size"])
def test_what_cannot_be_held_is_named(name: str) -> None:
    config = tiny_config(estimators={"log_": "exact", "coordinate": "exact"}, held={name: 0.0})
    with pytest.raises(ValueError, match=f"held is for frozen scalars of the network, which '{name}' is not"):
        meta_train(FAMILIES, config)
