"""The demo, run for real with few steps, and what it makes of the figures."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch

from learned_optim import NetworkConfig, OptimizerNetwork, demo
from learned_optim.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with an untrained network."""
    folder = tmp_path_factory.mktemp("weights")
    OptimizerNetwork(NetworkConfig()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def quick(weights, tmp_path_factory):
    """The output folder and the standard output of `learned-optim demo --quick`."""
    out, printed = tmp_path_factory.mktemp("demo") / "new", io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["demo", "--quick", "--workers", "1", "--pretrained", weights, "--out", str(out)])
    assert status == 0
    return out, printed.getvalue()


def make_run(task, optimizer, train_loss, seed=0):
    return demo.Run(
        task=task,
        optimizer=optimizer,
        seed=seed,
        losses=[1.0],
        train_loss=train_loss,
        validation_loss=0.5,
        validation_accuracy=0.75,
        ms_per_step=2.0,
    )


def make_runs(**losses):
    """A run of every task and optimizer with a training loss of 1, or what `losses` says."""
    return [make_run(task, name, losses.get(name, 1.0)) for task in demo.TASKS for name in demo.OPTIMIZERS]


@pytest.mark.slow
def test_figures_are_complete_and_finite(quick):
    figures = json.loads((quick[0] / "demo.json").read_text())
    keys = [(run["task"], run["optimizer"], run["seed"]) for run in figures["runs"]]
    assert sorted(keys) == sorted((task, optimizer, 0) for task in demo.TASKS for optimizer in demo.OPTIMIZERS)
    for run in figures["runs"]:
        assert len(run["losses"]) == figures["settings"]["steps"][run["task"]]
        assert all(map(math.isfinite, [*run["losses"], run["train_loss"], run["validation_loss"]]))
        assert 0 <= run["validation_accuracy"] <= 1
        assert run["ms_per_step"] > 0


@pytest.mark.slow
def test_summary_is_that_of_the_runs(quick):
    figures, found = (json.loads((quick[0] / f"{name}.json").read_text()) for name in ("demo", "summary"))
    expected = demo._json_value({"settings": figures["settings"], "tasks": demo.summary([demo.Run(**run) for run in figures["runs"]])})
    assert_close(found, expected)


def assert_close(found, expected):
    """To some digits, since the runs' figures were rounded when they were written."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found == expected


@pytest.mark.slow
def test_every_optimizer_starts_from_the_same_model_and_batch(quick):
    runs = json.loads((quick[0] / "demo.json").read_text())["runs"]
    for task in demo.TASKS:
        mine = [run["losses"] for run in runs if run["task"] == task]
        assert len({losses[0] for losses in mine}) == 1
        assert len({losses[-1] for losses in mine}) >= len(demo.OPTIMIZERS) - 1  # and each goes its own way, with a horizon or without


@pytest.mark.slow
def test_plot_is_an_image_with_something_on_it(quick):
    image = matplotlib.image.imread(quick[0] / "demo.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    for half in (image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]):
        assert len({tuple(pixel) for pixel in half[::2, ::2].reshape(-1, image.shape[2]).tolist()}) > 50


@pytest.mark.slow
def test_report_is_printed_with_the_files_it_wrote(quick):
    out, printed = quick
    lines = printed.splitlines()
    assert lines[0].split("  ")[0] == "task"
    for task in demo.TASKS:
        assert any(line.startswith(task) and "AdamW lr=0.001 (default" in line for line in lines)
        assert any(line.startswith(f"{task}: LearnedOptimizer ") for line in lines)
    assert str(out / "demo.png") in printed
    assert f"torch {torch.__version__}" in printed


@pytest.mark.parametrize("task", demo.TASKS)
def test_a_seed_decides_a_run(task, weights):
    def figures(seed):
        return dataclasses.replace(demo.train(task, demo.LEARNED, seed, 2, weights), ms_per_step=0.0)

    assert figures(0) == figures(0)
    assert figures(0).losses != figures(1).losses


def test_optimizers_draw_no_random_numbers_so_all_see_the_same_batches(weights):
    states = []
    for optimizer in (demo.LEARNED, demo.LEARNED_HORIZON, "AdamW lr=0.003", "AdamW lr=0.003, cosine"):
        demo.train(demo.DIGITS, optimizer, 0, 3, weights)
        states.append(torch.get_rng_state())
    assert all(state.equal(states[0]) for state in states)


def test_make_optimizer_uses_the_defaults_and_the_grid(weights):
    def make(name):
        return demo.make_optimizer(name, [torch.nn.Parameter(torch.ones(2))], 10, weights)

    plain, horizon = (make(name)[0] for name in (demo.LEARNED, demo.LEARNED_HORIZON))
    assert (plain.defaults["lr"], plain.defaults["total_steps"], horizon.defaults["total_steps"]) == (1.0, None, 10)
    optimizer, schedule = make(demo.ADAMW_DEFAULT)
    assert (optimizer.defaults["lr"], schedule) == (torch.optim.AdamW(optimizer.param_groups[0]["params"]).defaults["lr"], None)
    optimizer, schedule = make("AdamW lr=0.03, cosine")
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert optimizer.defaults["lr"] == 0.03
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_validation_images_are_held_out():
    task = demo.TASKS[demo.DIGITS]()
    images = torch.cat([task.train[0], task.validation[0]]).flatten(1)
    assert (len(images), len(task.validation[0]), len(images.unique(dim=0))) == (1797, 360, 1797)


def test_validation_text_is_held_out_but_for_what_the_manual_says_twice():
    task = demo.TASKS[demo.TEXT]()
    seen = bytes(task.train[0][:, 0].tolist() + task.train[0][-1, 1:].tolist() + task.train[1][-1, -1:].tolist())
    held_out = [bytes(window) for window in task.validation[0].tolist()]
    assert len(seen) / (len(seen) + 64 * len(held_out)) == pytest.approx(0.9, abs=1e-3)
    assert sum(window in seen for window in held_out) < 0.1 * len(held_out)
    for inputs, targets in (task.train_slice, task.validation):
        assert inputs[:, 1:].equal(targets[:, :-1])


def test_meta_training_reads_neither_data_set():
    sources = [path.read_text() for path in Path(demo.__file__).parent.glob("meta_train/*.py")]
    assert sources
    assert not any(word in source for source in sources for word in ("load_digits", "pydoc_data"))


def test_best_of_the_grid_has_the_lowest_mean_over_seeds():
    runs = make_runs()
    runs += [make_run(demo.DIGITS, "AdamW lr=0.01", loss, seed) for seed, loss in ((1, 0.1), (2, 0.2))]
    runs += [make_run(demo.DIGITS, "AdamW lr=0.003", loss, seed) for seed, loss in ((1, 0.01), (2, 5.0))]
    assert demo.best_adamw(runs, demo.DIGITS) == "AdamW lr=0.01"


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_best_of_the_grid_is_not_one_that_diverged(diverged):
    losses = dict.fromkeys(demo.ADAMW_GRID, diverged) | {"AdamW lr=0.03, cosine": 9.0}
    assert demo.best_adamw(make_runs(**losses), demo.TEXT) == "AdamW lr=0.03, cosine"


def test_report_says_by_how_much_it_lost():
    report = demo.report(make_runs(**{demo.LEARNED: 0.75, "AdamW lr=0.01": 0.5}))
    assert "digits CNN: LearnedOptimizer 0.750 vs AdamW(1e-3) 1.00, best AdamW of 10 0.500 (1.50x)" in report
    row = next(line for line in report.splitlines() if line.startswith("digits CNN  ") and " LearnedOptimizer  " in line)
    assert row.split() == ["digits", "CNN", "LearnedOptimizer", "0.750", "0.500", "75.0%", "2.0", "1.50x"]


@pytest.mark.parametrize(("losses", "line"), [({demo.LEARNED: math.nan}, "LearnedOptimizer nan vs"), ({"AdamW lr=0.03": 0.0}, "0.00 (-)")])
def test_report_survives_losses_that_have_no_ratio(losses, line):
    assert line in demo.report(make_runs(**losses))


def test_summary_compares_with_the_best_of_the_grid():
    found = demo.summary(make_runs(**{demo.LEARNED: 0.75, "AdamW lr=0.01": 0.5}))[demo.DIGITS]
    assert found["best"] == "AdamW lr=0.01"
    assert list(found["optimizers"]) == [demo.LEARNED, demo.LEARNED_HORIZON, demo.ADAMW_DEFAULT, "AdamW lr=0.01"]
    assert found["optimizers"][demo.LEARNED]["train"] == {"mean": 0.75, "deviation": None}
    assert found["optimizers"][demo.LEARNED]["over_best"] == 1.5


def test_table_is_aligned_and_shows_the_spread_over_seeds():
    runs = [run for seed in range(3) for run in (dataclasses.replace(run, seed=seed, train_loss=1.0 + seed) for run in make_runs())]
    lines = demo.report(runs).splitlines()
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1
    assert "2.00 ± 1.0" in table[2]
    # The default is the best of the grid here only by being first among equals: it must not be listed twice.
    assert len({line.split("  ")[0] + line for line in table}) == len(table)


def test_figures_of_a_run_that_diverged_are_valid_json():
    assert demo._json_value([1 / 3, math.nan, math.inf, 2, "name"]) == [0.333333, None, None, 2, "name"]
