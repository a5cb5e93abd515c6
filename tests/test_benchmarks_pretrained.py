"""The benchmark on pretrained models: its tasks train, development leaves held-out data alone, and it resumes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, nn

FOLDER = Path(__file__).parents[1] / "benchmarks/quality"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The program's module, its tasks', and those that the tasks are made of."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("pretrained_models", FOLDER / "pretrained.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    parts = {name.removeprefix("pretrained_tasks."): module for name, module in sys.modules.items() if name.startswith("pretrained_tasks.")}
    yield SimpleNamespace(main=main, tasks=sys.modules["pretrained_tasks"], **parts)
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


DEVELOPMENT = (
    *("minilm polarity", "minilm polarity lora", "minilm polarity head", "minilm polarity last layers", "minilm valence"),
    *("minilm valence off-centre", "minilm valence bf16", "minilm masked numpy", "minilm pairs numpy"),
    *("efficientnet letters", "transformer sklearn"),
)
HELD_OUT = (
    *("minilm packages", "minilm packages lora bf16", "minilm masked manual", "minilm pairs few", "efficientnet digits"),
    *("ocr words", "fracast terrain", "transformer torch"),
)


# Where the tasks find the data that only held-out ones may use.
HELD_OUT_DATA = {
    "tasks": ("docstrings", "wikitext", "manual_topics"),
    "minilm": ("of_packages",),
    "pictures": ("scikit_learn", "word_images"),
    "forecasting": ("profiles",),
}


def test_the_splits_are_as_they_were_made(benchmark: Any) -> None:
    assert tuple(benchmark.tasks.PRETRAINED_DEVELOPMENT) == DEVELOPMENT
    assert tuple(benchmark.tasks.PRETRAINED_HELD_OUT) == HELD_OUT


@pytest.mark.filterwarnings("ignore")  # of the packages that the models come in
@pytest.mark.parametrize("name", [*DEVELOPMENT, *HELD_OUT])
def test_every_task_trains(benchmark: Any, shorter: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the transformer of our own without the packages of the extra."""
    monkeypatch.setattr(benchmark.characters, "CACHE", tmp_path)
    monkeypatch.setattr(benchmark.characters, "PRETRAINING", 2)
    if name in DEVELOPMENT:
        for module, names in HELD_OUT_DATA.items():
            for data in names:
                monkeypatch.setattr(getattr(benchmark, module), data, lambda *_: pytest.fail("held-out data"))
    for module in (benchmark.minilm, benchmark.pictures, benchmark.forecasting, benchmark.characters):
        monkeypatch.setattr(module, "problem", shorter)
    try:
        problem = benchmark.main.make_problem(name, 0)
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the extra pretrained-models: {error}")
    trained = [param for param in problem.model.parameters() if param.requires_grad]
    problem.loss(problem.model, problem.batch()).backward()
    assert any(param.grad is not None and param.grad.any() for param in trained)
    assert all(param.dtype == (torch.bfloat16 if "bf16" in name else torch.float32) for param in trained)
    loss, _ = problem.evaluate(problem.model)
    assert 0 < loss < 20
    assert problem.evaluate(problem.model)[0] == pytest.approx(loss)
    assert problem.model.training


@pytest.fixture
def shorter(benchmark: Any) -> Any:
    """Makes problems of a few examples, on which evaluation takes little time."""

    def make(seed: int, model: nn.Module, train: Any, validation: Any, *options: Any) -> Any:
        return benchmark.problems.problem(seed, model, train, [part[:12] for part in validation], *options)

    return make


def small(benchmark: Any, seed: int) -> Any:
    inputs = torch.randn(100, 5, generator=Generator().manual_seed(0))
    data = [inputs, inputs.sum(1) / 5**0.5]
    return benchmark.problems.problem(seed, nn.Linear(5, 1), data, data, 8, benchmark.problems.fitted)


def test_the_program_runs_and_resumes(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["AdamW 0.001 linear", "AdamW 0.1 linear"]
    monkeypatch.setattr(benchmark.main, "GRID", grid)
    monkeypatch.setattr(benchmark.main, "NAMES", [*grid, "learned"])
    monkeypatch.setitem(benchmark.main.PROBLEMS, "small", benchmark.problems.Task(lambda seed: small(benchmark, seed), 40))
    monkeypatch.setattr(benchmark.main, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(benchmark.main, "as_completed", list)
    arguments = ["--tasks", "small", "--optimizers", *grid, "learned", "--out", str(tmp_path)]
    benchmark.main.main(arguments)
    written = (tmp_path / "runs.jsonl").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    tuned, slow, learned = (found["tasks"]["small"][name] for name in ("AdamW 0.1 linear", "AdamW 0.001 linear", "learned"))
    assert slow["speed"] == pytest.approx(0.125)
    assert tuned["speed"] == pytest.approx(found["speed"]["AdamW tuned"]) == pytest.approx(1.0, rel=0.3)
    assert learned["loss"] < learned["start"]
    assert learned["accuracy"] == pytest.approx(1 - learned["loss"], abs=1e-3)
    assert 0 < slow["moved"] < tuned["moved"]
    benchmark.main.main(arguments)
    assert (tmp_path / "runs.jsonl").read_text() == written  # nothing was run again
    for names, seeds in ((["learned"], 1), ([*grid, "learned"], 2)):  # a second seed counts once all optimizers have it
        benchmark.main.main(["--tasks", "small", "--optimizers", *names, "--seeds", "2", "--out", str(tmp_path)])
        both = json.loads((tmp_path / "results.json").read_text())["tasks"]["small"]
        assert {name: one["seeds"] for name, one in both.items()} == dict.fromkeys([*grid, "learned"], seeds)


class InThisProcess:
    def __init__(self, *_: object, max_tasks_per_child: int) -> None:
        assert max_tasks_per_child == 1  # what a run is must not depend on those before it

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Any:
        result = function(*arguments)
        return SimpleNamespace(result=lambda: result)


def test_speed_is_the_ratio_of_steps_to_the_same_loss(benchmark: Any) -> None:
    """AdamW halves the loss every 25 steps."""
    reference = [(float(step), 0.5 ** (step / 25)) for step in range(5, 201, 5)]

    def speed(loss: float) -> float:
        return float(benchmark.main.speed({"task": "minilm polarity", "curve": [(0, 1.0, 0, 0), (100, loss, 0, 0)]}, reference))

    measured = [speed(loss) for loss in (0.25, 0.5**4, 0.5**6, 0.001, 1.0, float("nan"))]
    assert measured == pytest.approx([0.5, 1.0, 1.5, 2.0, 0.125, 0.125], rel=0.01)
