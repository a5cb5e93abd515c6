"""Problems that are drawn by seed, and the benchmark that trains on them."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from learned_optim import LearnedOptimizer, load_network, network, optimizer, rule
from learned_optim.meta_train.families import drawn as family
from learned_optim.meta_train.families.drawn import drawn
from learned_optim.rule import Control

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _short_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "PRETRAINING_STEPS", 2)


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/quality"))
    names = ("distribution", "multipliers", "report", "training", "tasks", "optimizers", "development", "ablations")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("distribution")
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("seed", range(40))
def test_a_problem_is_that_of_its_seed_and_can_be_trained(seed: int) -> None:
    one, other = (drawn(Generator().manual_seed(seed)) for _ in range(2))
    assert (one.kind, one.start, one.steps, one.batch) == (other.kind, other.start, other.steps, other.batch)
    (params, buffers), (same, _) = (each.task.init(Generator().manual_seed(1)) for each in (one, other))
    batches = [each.task.batch(Generator().manual_seed(2)) for each in (one, other)]
    for a, b in zip((*params.values(), *batches[0]), (*same.values(), *batches[1]), strict=True):
        assert torch.equal(a, b)
    leaves = {name: param.requires_grad_() for name, param in params.items()}
    loss, _ = one.task.loss(leaves, buffers, batches[0])
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert loss.isfinite()
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert any(grad is not None and grad.any() for grad in grads)
    assert 50 <= one.steps <= 5000


def test_problems_differ_in_all_respects() -> None:
    found = [drawn(Generator().manual_seed(seed)) for seed in range(80)]
    assert {one.start for one in found} == {"scratch", "all weights", "new head", "adapters", "last layers"}
    assert {one.kind.split()[0].strip(",") for one in found} == {"dense", "images", "text", "reconstruction"}
    assert max(one.batch for one in found) > 50 * min(one.batch for one in found)


def test_frozen_parts_are_not_trained() -> None:
    for seed in range(80):
        one = drawn(Generator().manual_seed(seed))
        every = sum(param.numel() for param in one.task.build().parameters())
        trained = sum(shape.numel() for shape in one.task.shapes.values())
        if one.start in ("scratch", "all weights", "new head"):
            assert trained == every
        elif one.start == "adapters":
            assert trained < every


def test_pretrained_weights_are_kept(tmp_path: Path) -> None:
    seed = next(seed for seed in range(80) if drawn(Generator().manual_seed(seed)).start == "all weights")
    first = drawn(Generator().manual_seed(seed), folder=tmp_path).task.build().state_dict()
    assert len(list(tmp_path.iterdir())) == 1
    again = drawn(Generator().manual_seed(seed), folder=tmp_path).task.build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_settings_side_by_side_are_torch_s_adamw(distribution: Any) -> None:
    """A run among others ends where a run on its own does."""
    trial = distribution.Trial(22)
    settings = [(1e-3, "constant", 20), (1e-2, "cosine", 12)]
    together = distribution.adamw(trial, settings)
    for curve, setting in zip(together, settings, strict=True):
        (alone,) = distribution.adamw(trial, [setting])
        assert curve[-1][0] == setting[2]
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in alone], rel=1e-4)
    params, buffers = trial.init()
    leaves = {name: torch.nn.Parameter(param) for name, param in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-3)
    for t in range(20):
        optimizer.zero_grad()
        trial.task.loss(leaves, buffers, trial.batch(t))[0].backward()
        optimizer.step()
    assert trial.task.loss(leaves, buffers, trial.sample)[0].item() == pytest.approx(together[0][-1][1], rel=1e-3)


def test_speed(distribution: Any) -> None:
    """AdamW's own curve has a speed of 1; what it never reaches counts as four times, and what diverged as an eighth."""
    curves = {
        length: [(t, 2.0 ** (-4 * t / 100)) for t in range(0, round(100 * float(length)) + 1, 2)] for length in ("0.5", "1", "2", "4")
    }
    base = {"steps": 100, "first": 1.0, "curves": curves}

    def run(end: float) -> list[tuple[int, float]]:
        return [(0, 1.0), *((t, end) for t in range(10, 101, 10))]

    for share in (0.5, 1.0, 2.0):
        assert distribution.speed(base, run(2.0 ** (-4 * share))) == pytest.approx(share, rel=0.1)
    assert distribution.speed({**base, "first": 1e-9}, run(1e-9)) == 4.0
    assert distribution.speed(base, run(float("nan"))) == 0.125


def test_the_learned_optimizer_lowers_the_loss(distribution: Any) -> None:
    curve = distribution.learned(distribution.Trial(22), load_network("default"), horizon=True)
    assert curve[0][0] == 0
    assert curve[-1][0] == distribution.Trial(22).drawn.steps
    assert distribution.final(curve) < curve[0][1]


def test_adamw_is_tuned_once_for_all_optimizer_weights(distribution: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what was measured with these is not measured again."""
    tuned, trained = [], []

    def measured(seed: int, folder: Path, pretrained: str | None, base: dict[str, Any] | None) -> Any:
        trained.append(seed)
        if base is None:
            tuned.append(seed)
        curve = [(0, 2.0), (50, 1.5), (100, 1.0)]
        grid = {distribution.DEFAULT: 1.0}
        base = {"seed": seed, "kind": "dense squares", "start": "scratch", "first": 2.0, "grid": grid, "curves": {"1": curve}}
        return base, dict.fromkeys(distribution.MODES, curve) if pretrained else {}

    monkeypatch.setattr(distribution, "measure", measured)
    monkeypatch.setattr(distribution, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    monkeypatch.setattr(distribution, "behaviour", lambda network: [1.0])
    seeds = [distribution.HELD_OUT + k for k in range(4)]
    distribution.main(["--problems", "2", "--out", str(tmp_path), "--held-out", "--only-adamw"])
    assert (sorted(tuned), sorted(trained)) == (seeds[:2], seeds[:2])
    assert not (tmp_path / "results.json").exists()
    trained.clear()
    for weights, count in (("first", 3), ("first", 4), ("second", 4)):
        monkeypatch.setattr(distribution, "fingerprint", lambda network, name=weights: name)
        distribution.main(["--problems", str(count), "--out", str(tmp_path), "--held-out"])
    assert sorted(tuned) == seeds
    assert sorted(trained) == sorted([*seeds, *seeds])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["weights"] == "second"
    assert found["all"]["no settings"]["problems"] == found["kinds"]["dense"]["total_steps"]["problems"] == 4
    assert found["all"]["no settings"]["above its start"] == 0
    distribution.main(["--seeds", str(seeds[2]), "5", "--out", str(tmp_path)])
    assert sorted(tuned) == [5, *seeds]
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["all"]["no settings"]["problems"], found["held out"]) == (2, False)
    with pytest.raises(SystemExit):
        distribution.main(["--seeds", "5", "--held-out", "--out", str(tmp_path)])


def test_multipliers_are_counted_by_kind_of_problem(distribution: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a problem that was measured is not measured again."""
    multipliers, trained = importlib.import_module("multipliers"), []

    def measured(seed: int, folder: Path, pretrained: str, values: Any) -> dict[str, Any]:
        trained.append(seed)
        ends = {"0.5": 0.9, "1": 1.0, "2": float("inf"), "4": 1.001}  # lower, higher, and equal but for a thousandth of the first loss
        start, modes = "adapters" if len(trained) == 1 else "scratch", () if len(trained) == 4 else distribution.MODES
        return {"seed": seed, "start": start, "batch": 3, "first": 2.0, "ends": dict.fromkeys(modes, ends)}  # the last one is too long

    monkeypatch.setattr(multipliers, "measure", measured)
    monkeypatch.setattr(multipliers, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    monkeypatch.setattr(multipliers, "behaviour", lambda network: [1.0])
    for _ in range(2):
        multipliers.main(["--seeds", "4", "--multipliers", "0.5", "2", "4", "--workers", "1", "--out", str(tmp_path)])
    assert len(trained) == len(set(trained)) == 4
    groups = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["groups"]
    assert {name: one["problems"] for name, one in groups.items() if one["problems"]} == {"all": 3, "1 to 3": 2, "adapters": 1}
    counted = {"0.5": {"lower": 3, "higher": 0}, "2": {"lower": 0, "higher": 3}, "4": {"lower": 0, "higher": 0}}
    assert groups["all"]["no settings"] == groups["all"]["total_steps"] == counted


def test_multipliers_of_a_problem(distribution: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    multipliers = importlib.import_module("multipliers")
    row = multipliers.measure(22, tmp_path, "default", [0.0])
    assert row["ends"].keys() == distribution.MODES.keys()
    for ends in row["ends"].values():
        assert ends["0"] == pytest.approx(row["first"], rel=1e-4), "no step at all"
        assert ends["1"] < ends["0"]
    monkeypatch.setattr(multipliers, "STEPS", row["steps"] - 1)
    assert multipliers.measure(22, tmp_path, "default", [0.0])["ends"] == {}


def test_parts_are_left_out_one_by_one(distribution: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And ends are counted beside the whole rule's; what was measured is not measured again."""
    ablations, made = importlib.import_module("ablations"), []
    ends = {"nothing": 1.0, "LSTM": 1.5, "pace": 1.001, "proof": 0.9}  # higher, equal but for a thousandth of the first loss, lower

    def tuned(seed: int, folder: Path) -> dict[str, Any]:
        made.append(seed)
        if seed == ablations.FIRST + 2:
            return {"seed": seed, "steps": ablations.STEPS + 1}
        curves = {"1": [(0, 2.0), (100, 1.2)]}
        start = "scratch" if seed == ablations.FIRST else "adapters"
        return {
            "seed": seed,
            "kind": "dense",
            "start": start,
            "steps": 100,
            "first": 2.0,
            "grid": {"0.001 constant": 1.2},
            "curves": curves,
        }

    def measured(part: str, seeds: Any, folder: Path, pretrained: str) -> list[dict[str, Any]]:
        made.append(part)
        curve = [(0, 2.0), *((t, ends[part]) for t in range(10, 101, 10))]
        return [{"seed": seed, "part": part, "ours": dict.fromkeys(distribution.MODES, curve)} for seed in seeds]

    monkeypatch.setattr(ablations, "tune", tuned)
    monkeypatch.setattr(ablations, "measure", measured)
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    monkeypatch.setattr(ablations, "behaviour", lambda network: [1.0])
    for _ in range(2):
        ablations.main(["--seeds", "3", "--parts", "LSTM", "pace", "proof", "--workers", "1", "--out", str(tmp_path)])
    assert sorted(map(str, made)) == [*(str(ablations.FIRST + k) for k in range(3)), "LSTM", "nothing", "pace", "proof"]
    parts = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["parts"]
    for found in (parts[part]["total_steps"] for part in ends):
        assert found["problems"] == 2
    assert [(parts[part]["no settings"]["lower"], parts[part]["no settings"]["higher"]) for part in ends] == [
        (0, 0),
        (0, 2),
        (0, 0),
        (2, 0),
    ]
    assert parts["LSTM"]["no settings"]["above AdamW at 1e-3"] == 1.0


# In which scene of `behaviour`, and whether with a far horizon, a part shows.
SHOWS = {"Adam's direction": ("trained", False), "care": ("trained", False), "creep": ("trained, and noise", False)}
SHOWS |= {"long runs": ("agree", True), "bouncing": ("turn", False), "controller": ("turn", False), "proof": ("shrink", False)}


def test_what_is_left_out_makes_a_difference(distribution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ablations, scenes = importlib.import_module("ablations"), sys.modules["behaviour"]
    monkeypatch.setattr(scenes, "LearnedOptimizer", functools.partial(LearnedOptimizer, kernel="reference"))  # which records nothing

    def run(change: Any, scene: str, far: bool) -> list[float]:
        with pytest.MonkeyPatch.context() as patch:
            for module, names in ((network, "PROOF HASTE CREEP"), (rule, "MANY SHORT_RUN"), (optimizer, "SURELY")):
                for name in names.split():
                    patch.setattr(module, name, getattr(module, name))  # to be put back
            patch.setattr(scenes, "SHAPES", scenes.SHAPES[2:])  # one matrix and a vector
            patch.setattr(scenes, "SCENES", {name: one for name, one in scenes.SCENES.items() if name == scene or scene in scenes.TRAINED})
            patch.setattr(scenes, "TRAINED", {name: one for name, one in scenes.TRAINED.items() if name == scene})
            patch.setattr(scenes, "HORIZONS", (scenes.HORIZONS[-1] if far else None,))
            changed = load_network("default")
            change(changed)
            found: list[float] = scenes.behaviour(changed)
            return found

    for part, change in ablations.PARTS.items():
        scene = SHOWS.get(part, ("agree", False))
        whole, left = run(lambda network: None, *scene), run(change, *scene)
        assert (whole == pytest.approx(left, rel=1e-3)) is (part == ablations.WHOLE), part


@pytest.mark.parametrize("total_steps", [None, 200])
def test_without_the_controller_nothing_corrects_the_step_size(distribution: Any, total_steps: int | None) -> None:
    """Neither where gradients agree nor where they turn back."""
    param = torch.nn.Parameter(torch.zeros(40, 30))
    for ablate, moves in ((lambda network: None, True), (importlib.import_module("ablations").without_controller, False)):
        network = load_network("default")
        ablate(network)
        optimizer = LearnedOptimizer([param], network, total_steps=total_steps)
        for step in range(120):
            param.grad = torch.ones(40, 30) if step < 10 else torch.randn(40, 30, generator=Generator().manual_seed(step))
            optimizer.step()
        assert bool(Control.of(optimizer.state[param]["control"]).correction != 0) is moves
