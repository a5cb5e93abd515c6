"""The research examples, each run at a tiny size, and what their parts promise."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_examples import EXAMPLES
from torch import Generator, nn

from learned_optim import NetworkConfig, OptimizerNetwork, load_network
from learned_optim.features import Layout
from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.unroll import begin
from learned_optim.rule import init_state

# Each with the arguments of a run that takes seconds.
TABLE = {
    "dynamical_language_model": ["--static-steps", "40", "--stretches", "1", "--passages", "2"],
    "few_shot": ["--meta-steps", "2"],
    "unrolls": ["--truncations", "2", "32", "--runs", "2", "--meta-steps", "2"],
    "shared_parameters": ["--width", "4", "--lengths", "4", "9", "--meta-steps", "1", "--horizon", "3", "--seeds", "2"],
    "look_inside": ["--steps", "8", "--probe-steps", "12"],
}


@pytest.fixture(autouse=True)
def examples_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, folder: Path) -> dict[str, Any]:
    load(name).main([*TABLE[name], "--out", str(folder)])
    assert (folder / "plot.png").stat().st_size > 10_000
    assert (folder / "table.md").read_text(encoding="utf-8").startswith("Made by `python examples/")
    figures: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "NaN" not in json.dumps(figures)
    return figures


@pytest.mark.parametrize("name", TABLE)
def test_is_short_and_its_result_is_committed(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 152
    table = (EXAMPLES / "results" / name / "table.md").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in table
    assert (EXAMPLES / "results" / name / "plot.png").exists()


def test_every_research_example_is_in_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"python examples/{name}.py" in page for name in TABLE)


def test_dynamical_language_model(tmp_path: Path) -> None:
    figures = run("dynamical_language_model", tmp_path)
    gains = {name: each[0][0] for name, each in figures["gains"].items()}
    assert gains["learned over static"] > 0.1, "a poor static model has much to gain from the passage"
    assert math.isclose(gains["learned over static"], gains["RMS over static"] + gains["learned over RMS"], abs_tol=1e-4)


def test_fast_weights_start_as_rms() -> None:
    module = load("dynamical_language_model")
    usual = torch.rand(10) + 0.1
    scale, layout = usual + 0.05, Layout((torch.Size([2, 3]), torch.Size([4])), torch.device("cpu"))
    rule, grad, moved = module.FastWeights(0.01, scale, usual, 2), torch.randn(1, 10), 0.1 * torch.randn(1, 10)
    state = init_state(layout, module.CONFIG, moved) | {"moved": moved}
    change, new = rule(layout, grad, state, torch.full((1, 2), torch.inf))
    expected, _ = module.rms(0.01, scale, 0.0, layout, grad, {"moved": moved}, None)
    torch.testing.assert_close(change + torch.tensor(-5.0).sigmoid() * moved, expected, rtol=0.02, atol=1e-5)
    torch.testing.assert_close(new["moved"], moved + change)


def test_reading_continues_where_it_stopped() -> None:
    language = load("language")
    static = {"embedding": torch.randn(9, 48), "input": torch.randn(144, 48) / 8, "recurrent": torch.randn(144, 48) / 8}
    static |= {"bias": torch.zeros(144), "unigram": torch.zeros(9)}
    passages = torch.randint(9, (2, 3 * language.SEGMENT + 1))
    unroll = begin(language.Reading(static, passages), 0, None, 2, NetworkConfig(), "cpu", horizon=3, horizon_known=False)
    now, costs = unroll.optimizees, []
    for t in range(3):
        now = unroll.train_step(t, now, lambda layout, grad, state, horizon: (torch.zeros_like(grad), state))[1]
        costs.append(now.buffers["costs"].detach())
    whole, _ = language.read(static, passages, torch.zeros(2, 48))
    torch.testing.assert_close(torch.cat(costs, 1), whole)


def test_sets_of_articles_do_not_overlap(tmp_path: Path) -> None:
    for part in ("valid", "test"):
        (tmp_path / f"{part}.txt").write_text("".join(f"\n = {part} {i} = \n\n" + f"w{i} b " * 100 for i in range(6)), encoding="utf-8")
    for folder, count in ((None, None), (tmp_path, 12)):
        vocabulary, *sets = load("language").load(folder)
        articles = [tuple(article.tolist()) for part in sets for article in part]
        assert min(map(len, sets)) > 1
        assert count is None or len(articles) == count
        assert max(map(max, articles)) < len(vocabulary)
        long = [article for article in articles if folder is None and len(article) > 500]
        assert len({article[:50] for article in long}) == len(long), "an article is in one set only"


def test_few_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("few_shot"), "TASKS", 8)
    means = run("few_shot", tmp_path)["mean and half interval"]
    assert len(means) == 3
    for name, methods in means.items():
        assert len(methods) == 8
        assert all(interval > 0 for _, interval in methods.values())
        assert "error" in name or all(0 <= mean <= 1 for mean, _ in methods.values())


def test_few_shot_tasks() -> None:
    tasks, few_shot = load("few_shot_tasks"), load("few_shot")
    for draw, fresh in (tasks.digits(), tasks.alphabet()):
        for one in (draw, fresh):
            x, y, examples = one(Generator().manual_seed(0))
            assert sorted(y[:examples].tolist()) == list(range(tasks.WAYS)), "one example of each class"
            assert len(x) == len(y) == tasks.WAYS * (1 + tasks.QUERIES)
        places = torch.stack([draw(Generator().manual_seed(seed))[1] for seed in range(50)])
        assert all(len(column.unique()) == tasks.WAYS for column in places.T), "no place gives an answer away"
    # A reader must not see the answers that it is asked for: other queries' labels change nothing.
    reader = tasks.Reader(1, 1)
    x, answers = torch.randn(2, 20, 1), torch.randn(2, 10, 1)
    torch.testing.assert_close(reader(x, answers)[:, :3], reader(torch.cat([x[:, :13], -x[:, 13:]], 1), answers)[:, :3])
    # MAML's gradient reaches the initial parameters through the steps.
    initial = torch.cat([param.flatten() for param in tasks.task(tasks.sinusoid).init(Generator())[0].values()]).requires_grad_()
    gradients = []
    for exact in (False, True):
        unroll, now = few_shot.train(tasks.sinusoid, partial(few_shot.sgd, torch.full((6,), 0.05)), 0, 2, initial=initial, exact=exact)
        gradients += torch.autograd.grad(few_shot.replace(unroll, validation=True).measure(5, now).mean(), initial)
    assert torch.cosine_similarity(*gradients, 0) > 0.2
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_omniglot(tmp_path: Path) -> None:
    from matplotlib.image import imsave

    for part in ("images_background", "images_evaluation"):
        for character in range(6):
            folder = tmp_path / part / "alphabet" / f"character{character}"
            folder.mkdir(parents=True)
            for sample in range(4):
                imsave(folder / f"{sample}.png", torch.rand(105, 105).round().numpy(), cmap="gray")
    for draw in load("few_shot_tasks").omniglot(tmp_path):
        assert draw(Generator())[0].shape == (20, 196)


def test_unrolls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("unrolls")
    monkeypatch.setattr(module, "judge", partial(module.judge, runs=2))
    figures = run("unrolls", tmp_path)
    estimates = figures["estimates"]
    assert estimates["exact, 32"]["LSTM: bias"] < 1e-5
    assert estimates["exact, 2"]["LSTM: bias"] > 0.01
    assert estimates["exact, 32"]["MiB"] > 4 * estimates["exact, 2"]["MiB"]
    assert estimates["pes, 32"]["MiB"] < 2 * estimates["pes, 2"]["MiB"]
    assert len(figures["loss"]) == 10


def test_policy_gradient_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one weight, where its variance is small enough to see that."""
    module, size = load("meta_gradients"), 20_000
    monkeypatch.setattr(module, "REPLICAS", size)

    def build() -> nn.Module:
        made = nn.Linear(1, 1, bias=False)
        nn.init.ones_(made.weight)
        return made

    ones = torch.ones(1, 1)
    task = ModuleTask(build, lambda generator: (ones, 0 * ones), nn.functional.mse_loss)
    one = task.init(Generator())
    monkeypatch.setattr(task, "init", lambda generator: one)  # to build as many modules would take most of a minute
    network = module.beginner().requires_grad_(True)
    weights = {"log_step_size": network.log_step_size}
    network.log_vector_gain.data.zero_()
    unroll = begin(task, 0, None, size, network.config, "cpu", horizon=2, horizon_known=False, validation=True)
    config = load("unrolls").options(2)
    (found, truth) = (module.estimate(name, unroll, network, weights, config)[1]["log_step_size"] for name in ("policy gradient", "exact"))
    torch.testing.assert_close(found * 32, truth * 32, rtol=0.15, atol=0.0)


def test_shared_parameters(tmp_path: Path) -> None:
    figures = run("shared_parameters", tmp_path)
    (tied, untied), memory = figures["coordinates"], figures["memory"]
    assert untied - tied == 4 * (untied - tied) // 4
    assert memory[1][1] < 0.7 * memory[1][0]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("| yes ") == 2, "recomputing gives the same bits, dropout included"


def test_tie_holds_through_a_checkpointed_unroll() -> None:
    module = load("shared_parameters")
    tied, untied = (module.make_task(4, tied) for tied in (True, False))
    unroll, gradient, *_ = module.meta_gradient(tied, 9, recompute=True)
    params = unroll.optimizees.params[0]
    # One tensor of coordinates with one state ...
    assert set(untied.shapes) - set(tied.shapes) == {"head.weight"}
    assert len(params) == sum(shape.numel() for shape in tied.shapes.values())
    assert unroll.optimizees.state["momentum"].shape == unroll.optimizees.params.shape
    assert unroll.optimizees.state["control"][0].tolist() == [[9.0] * len(tied.shapes)]
    # ... that learns from both of its uses, at the end as at the start.
    assert module.untied_difference(tied, untied, params) < 1e-5
    model = tied.build()
    nn.utils.vector_to_parameters(params, model.parameters())
    assert model.head.weight is model.embedding.weight
    assert all(part.isfinite().all() for part in gradient.values())


def test_look_inside(tmp_path: Path) -> None:
    figures = run("look_inside", tmp_path)
    learned, adam, momentum = figures["lengths"]["steady"]
    assert min(learned, adam, momentum) > max(each[0] for name, each in figures["lengths"].items() if name == "alternating")
    assert all(math.isclose(max(spectrum), 1.0) for spectrum in figures["spectra"].values())


@pytest.mark.parametrize("units", [1, 3])
def test_look_inside_takes_any_network(units: int, tmp_path: Path) -> None:
    OptimizerNetwork(NetworkConfig(hidden_units=units)).save_pretrained(tmp_path / "weights")
    assert load_network(tmp_path / "weights").config.hidden_units == units
    load("look_inside").main([*TABLE["look_inside"], "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "weights")])
