"""Meta-training without a configuration: what the recipe makes of a budget, and that it pays."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meta_train_helpers import tiny_task
from torch import Generator, nn

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.cli import main
from learned_optim.meta_train import ModuleTask, meta_train, recipe
from learned_optim.meta_train.config import MetaTrainConfig

TINY = {"tiny": tiny_task}


def waves(generator: Generator) -> ModuleTask:
    """Curves, for which the bundled weights take steps that are much too short."""
    x = torch.linspace(-3, 3, 32)[:, None]
    y = torch.sin(x * (1 + torch.rand((), generator=generator)) + torch.rand((), generator=generator))
    return ModuleTask(lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), [(x, y)], nn.MSELoss())


def final_loss(network: OptimizerNetwork, seed: int, steps: int, horizon: int | None) -> float:
    task = waves(torch.manual_seed(seed))
    model, (x, y) = task.build(), task.batch(Generator())
    optimizer = LearnedOptimizer(model.parameters(), network, total_steps=horizon)
    for _ in range(steps):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return nn.functional.mse_loss(model(x), y).item()


@pytest.mark.slow
def test_a_budget_alone_specialises_the_bundled_weights() -> None:
    network = meta_train(waves, steps=40, budget=20).network

    def mean(weights: OptimizerNetwork, horizon: int | None) -> float:
        return statistics.geometric_mean(final_loss(weights, seed, 40, horizon) for seed in range(8))

    for horizon in (40, None):
        assert mean(network, horizon) < 0.7 * mean(load_network("default"), horizon), horizon


def chosen(monkeypatch: pytest.MonkeyPatch, run: float, seconds: float | None, steps: int = 50) -> MetaTrainConfig:
    """The recipe where a training run takes so many seconds."""
    monkeypatch.setattr(recipe, "time_of", lambda *_: run / steps)
    return recipe.recipe(TINY, load_network("default"), steps, seconds, "cpu")


def test_a_meta_step_has_as_many_runs_as_the_budget_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for runs, size, lstm in ((10**6, (8, 2, 2), "pes"), (1500, (8, 2, 1), "pes"), (700, (8, 1, 1), "pes"), (90, (1, 1, 1), "frozen")):
        config = chosen(monkeypatch, 2.0, 2.0 * runs)
        assert (config.pairs, config.replicas, config.unrolls_per_step) == size, runs
        assert config.estimator_of("coordinate.out") == lstm, runs
        assert config.estimator_of("log_step_size") == "pes"
        assert {config.truncation, config.horizon_min, config.horizon_max} == {50}
        assert config.evaluate_every >= 1
        spent = config.held_out_tasks * (20 + 9 * 4)
        assert spent < 0.1 * runs or config.held_out_tasks == 1
    assert chosen(monkeypatch, 2.0, None).pairs == 8


def test_a_budget_that_is_too_small_is_refused_with_what_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"a training run of 50 steps takes 2 s here, .* room for 5 of them; meta-training needs 20 at least. Raise the budget",
    ):
        chosen(monkeypatch, 2.0, 10.0)


def test_losses_are_on_validation_data_where_there_are_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def family(generator: Generator) -> ModuleTask:
        task = tiny_task(generator)
        return ModuleTask(task.build, task.batch, task.criterion, task.batch)

    assert not chosen(monkeypatch, 1.0, None).validation
    assert recipe.recipe({"mine": family}, load_network("default"), 5, None, "cpu").validation


def test_the_same_call_goes_on_and_another_one_is_refused(tmp_path: Path) -> None:
    first = meta_train(tiny_task, steps=3, budget=1, folder=tmp_path)
    again = meta_train(tiny_task, steps=3, budget=1, folder=tmp_path)
    assert again.meta_losses == first.meta_losses, "the configuration is that of the folder, whatever would be measured now"
    assert "meta_train(families, steps=3, budget=1)" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="holds a run of 3 steps, not 4; use another folder"):
        meta_train(tiny_task, steps=4, budget=1, folder=tmp_path)


def test_steps_are_for_runs_without_a_configuration() -> None:
    with pytest.raises(ValueError, match="steps is for runs without a config"):
        meta_train(tiny_task, MetaTrainConfig(), steps=3)
    with pytest.raises(ValueError, match="steps must be an integer of at least 2, got 0"):
        meta_train(tiny_task, steps=0)


# The command

FILE = """
import torch
from torch import nn
from learned_optim.meta_train import ModuleTask

def batch(generator):
    inputs = torch.randn(8, 3, generator=generator)
    return inputs, inputs.sum(1, keepdim=True)

mine = ModuleTask(lambda: nn.Linear(3, 1), batch, nn.functional.mse_loss)
number = 3
"""


@pytest.fixture
def file(own_file: Callable[[str], Path]) -> Path:
    return own_file(FILE)


def test_the_command_specialises(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["specialise", f"{file}:mine", "--steps", "4", "--budget", "2 s", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"held-out problems: [\d.]+ of tuned AdamW's, with default [\d.]+\.\nUse them: LearnedOptimizer\(.*, total_steps=4\)", printed
    )
    LearnedOptimizer(nn.Linear(3, 1).parameters(), out)
    assert " ".join(arguments[:2]) in (out / "README.md").read_text(), "the card says how to make them again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--budget": "soon"}, 'budget must be a time such as "30 min"'),
        ({"--budget": "0.001 s"}, "Raise the budget, or lower steps"),
        ({"problem": "number"}, "must be a learned_optim.meta_train.ModuleTask"),
        ({"--start": "./no_such"}, "no_such"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, str], message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--steps": "4", "--budget": "2 s", "--out": str(tmp_path / "out"), "problem": "mine"} | changes
    problem = given.pop("problem")
    assert main(["specialise", f"{file}:{problem}", *(word for option in given.items() for word in option)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
