"""The quality benchmark: its tasks are held out, it resumes, and its speed measures what it says."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator

from learned_optim import LearnedOptimizer, load_network, network, rule
from learned_optim.config import from_json
from learned_optim.meta_train import FAMILIES, MetaTrainConfig
from learned_optim.meta_train.families.text import source_text
from learned_optim.speed import LENGTHS, steps_to

FOLDER = Path(__file__).parents[1] / "benchmarks/quality"
PRETRAINED = Path(__file__).parents[1] / "pretrained"


@pytest.fixture(scope="module")
def quality() -> Iterator[Any]:
    """The benchmark's modules."""
    sys.path.insert(0, str(FOLDER))
    names = ("tasks", "development", "optimizers", "training", "report")
    spec = importlib.util.spec_from_file_location("quality", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    yield SimpleNamespace(main=main, **{name: sys.modules[name] for name in names})
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]


def meta_trained_families() -> set[str]:
    """The families that any of the bundled weights was meta-trained on."""
    configs = [from_json(MetaTrainConfig, path.read_text(), str(path)) for path in PRETRAINED.glob("*/meta_train*.json")]
    assert configs
    assert all(config.families for config in configs)
    return {family for config in configs for family in config.families}


def test_no_held_out_model_has_the_shapes_of_one_that_was_meta_trained_on(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = importlib.import_module("learned_optim.meta_train.families.fine_tuning")
    monkeypatch.setattr(family, "pretrain", lambda task, generator: task.init(generator)[0])  # the shapes are the same
    monkeypatch.setattr(family, "pretrained_task", family.pretrained_task.__wrapped__)  # the cache is for trained ones
    monkeypatch.setattr(quality.tasks, "pretrain", lambda problem, steps: problem.model.state_dict())
    shapes = set()
    for family in meta_trained_families():
        for seed in range(20):
            shapes.add(tuple(sorted(map(tuple, FAMILIES[family](Generator().manual_seed(seed)).shapes.values()))))
    for name, task in quality.tasks.TASKS.items():
        model = task.make(0).model
        assert tuple(sorted(tuple(param.shape) for param in model.parameters())) not in shapes, name


def test_no_held_out_data_were_meta_trained_on(quality: Any) -> None:
    assert not meta_trained_families() & {"digits", "tabular", "hub"}  # the families on real data that the benchmark or the demo uses
    read = bytes((source_text() + 32).tolist())
    chosen = random.Random(0)
    for text in (quality.tasks.manual(), quality.tasks.docstrings()):
        printable = bytes(text[(text >= 32) & (text < 127)].tolist())
        windows = [printable[start : start + 40] for start in (chosen.randrange(len(printable) - 40) for _ in range(500))]
        assert sum(window in read for window in windows) < 5


def test_every_task_trains(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.tasks, "pretrain", lambda problem, steps: problem.model.state_dict())
    for name, task in (quality.tasks.TASKS | quality.development.TASKS).items():
        problem = task.make(0)
        problem.loss(problem.model, problem.batch()).backward()
        assert any(param.grad is not None and param.grad.any() for param in problem.model.parameters()), name
        measure = problem.measure or problem.loss
        assert torch.isfinite(measure(problem.model, problem.train) + measure(problem.model, problem.validation)), name


def test_development_tasks_have_data_of_their_own(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("held-out data")

    for name in ("scikit_learn", "manual", "docstrings", "mnist", "wikitext"):
        monkeypatch.setattr(quality.tasks, name, refuse)
        assert not hasattr(quality.development, name)  # a name of its own would escape that
    for task in quality.development.TASKS.values():
        task.make(0).batch()


def test_the_program_runs_and_resumes(quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {"AdamW": ["AdamW 0.001 constant", "AdamW 0.03 cosine"], "Muon": ["Muon 0.01 cosine"]}
    for module in (quality.main, quality.training, quality.report):
        monkeypatch.setattr(module, "GRIDS", grids)
    monkeypatch.setattr(quality.main, "DEFAULTS", ["AdamW-default 0.001"])
    monkeypatch.setattr(quality.report, "DEFAULTS", ["AdamW-default 0.001"])
    monkeypatch.setattr(quality.main, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(quality.main, "as_completed", list)
    options = "--tasks linear --seeds 1 --parts baselines learned state --state-seeds 2"
    arguments = [*options.split(), "--out", str(tmp_path)]
    quality.main.main(arguments)
    written = (tmp_path / "runs.jsonl").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["optimizers"]
    assert found["AdamW tuned"]["tasks"]["linear"]["setting"] == "AdamW 0.03 cosine"  # a thousandth is far too small for 200 steps
    assert found["AdamW-default 0.001"]["speed"] < 0.5 < found["AdamW tuned"]["speed"]
    assert found["learned"]["tasks"]["linear"]["train"] < 0.6
    assert results["formats"].keys() == {"learned", "learned+T", "learned small-state", "learned+T small-state"}
    assert all(0.9 < one["ratio"] < 1.1 for one in results["formats"].values())
    assert all(one["tasks"] == pytest.approx({"linear": one["speed"]}) for one in results["formats"].values())
    assert all(one["above"] == {"linear": 0} for one in results["formats"].values())
    assert all(one["counts"] == {"linear": one["most"]} for one in results["formats"].values())
    again = quality.report.Results(tmp_path / "runs.jsonl", load_network("default"))
    assert quality.report.formats(["linear"], again, 1, {"linear": 0.0})["learned"]["above"] == {"linear": 2}
    assert (tmp_path / "speed.png").stat().st_size > 0
    quality.main.main(arguments)
    assert (tmp_path / "runs.jsonl").read_text() == written  # nothing was run again


class InThisProcess:
    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Any:
        result = function(*arguments)
        return SimpleNamespace(result=lambda: result)


def test_speed_is_the_ratio_of_steps_to_the_same_loss(quality: Any, tmp_path: Path) -> None:
    """AdamW halves the loss every 50 steps; what ends the task's 200 steps at AdamW's loss after 100 has half its speed."""
    results = quality.training.Results(tmp_path / "runs.jsonl", load_network("default"))
    best = "AdamW 0.01 cosine"

    def add(name: str, length: float, loss_at: Any) -> None:
        steps = round(200 * length)
        curve = [(step, loss_at(step), loss_at(step), 0.0) for step in range(0, steps + 1, max(1, steps // 40))]
        results.runs["linear", name, 0, length] = {"curve": curve, "optimizer": name}

    for name in quality.optimizers.GRIDS["AdamW"]:
        add(name, 1.0, lambda step: 1.0)
    for length in (1.0, *LENGTHS):
        add(best, length, lambda step: 0.5 ** (step / 50))
    add("half", 1.0, lambda step: 0.25)
    add("twice", 1.0, lambda step: 0.5**8)
    add("gone", 1.0, lambda step: float("nan"))
    measured = [quality.report.speed(results, "linear", name, 0, 1) for name in ("half", "twice", "gone")]
    assert measured == pytest.approx([0.5, 2.0, 0.125], rel=0.06)


@pytest.mark.parametrize(
    ("constant", "value"),
    [("PROOF", 0.0), ("RETREAT", 0.8), ("HASTE", 0.15), ("CREEP", 0.2), ("SHORT_RUN", 1000.0)],
)
def test_runs_of_a_rule_that_was_changed_are_not_kept(quality: Any, monkeypatch: pytest.MonkeyPatch, constant: str, value: float) -> None:
    behaviour = sys.modules["behaviour"]
    # What fewer scenes, or one horizon, tell apart, all of them do, and the reference is slow. Creep shows where gradients say nothing.
    monkeypatch.setattr(behaviour, "TRAINED", {"trained": "noise" if constant == "CREEP" else "agree"})
    assert any(is_told(behaviour, horizon, constant, value) for horizon in behaviour.HORIZONS)


def is_told(behaviour: Any, horizon: int | None, constant: str, value: float) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "HORIZONS", (horizon,))
        run = {"weights": "these", "behaviour": behaviour.behaviour(load_network("default"))}
        assert behaviour.is_of(run, "these", run["behaviour"])
        patch.setattr(rule if hasattr(rule, constant) else network, constant, value)
        patch.setattr(behaviour, "LearnedOptimizer", functools.partial(LearnedOptimizer, kernel="reference"))  # which records nothing
        return not behaviour.is_of(run, "these", behaviour.behaviour(load_network("default")))


def test_an_unknown_loss_is_never_reached() -> None:
    assert steps_to([(1.0, 2.0), (4.0, 0.5)], 1.0) == pytest.approx(2.0)
    assert steps_to([(1.0, 2.0), (4.0, 0.5)], 0.1) == float("inf")
