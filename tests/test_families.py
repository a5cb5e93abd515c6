"""The families that come along: made again from a seed, trainable, validated on other data, and twice differentiable."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from meta_train_helpers import SMALL, tiny_config, tiny_unroll
from torch import Generator, nn

from learned_optim import OptimizerNetwork
from learned_optim.meta_train import FAMILIES
from learned_optim.meta_train.estimators import estimator
from learned_optim.meta_train.families import hub_text, real
from learned_optim.meta_train.families.fine_tuning import Pretrained


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_samples_trainable_tasks_from_a_seed(name: str) -> None:
    network = OptimizerNetwork(SMALL)
    kinds = set()
    for seed in range(3):
        task, again = FAMILIES[name](seeded(seed)), FAMILIES[name](seeded(seed))
        unroll, other = tiny_unroll(network, task, horizon=12), tiny_unroll(network, again, horizon=12)
        assert torch.equal(unroll.first_loss, other.first_loss)
        assert all(map(torch.equal, unroll.batches(3)[1], other.batches(3)[1]))
        assert unroll.optimizees.params.shape[1] <= 35_000
        kinds.add((*task.shapes.values(), float(unroll.batches(0)[0][0].sum())))
        now = unroll.optimizees
        for t in range(12):
            _, now = unroll.train_step(t, now, lambda layout, grad, state, _: (-0.02 * grad.sign(), state))
        losses = [unroll.measure(0, state).mean() for state in (unroll.optimizees, now)]
        assert losses[1] < losses[0]
    assert len(kinds) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_exact_meta_gradients(name: str) -> None:
    network = OptimizerNetwork(SMALL)
    weights = dict(network.named_parameters())
    unroll = tiny_unroll(network, FAMILIES[name](seeded(5)), horizon=3)
    gradients = []
    for kind in ("exact", "first_order"):
        _, estimate = estimator(kind)(unroll, network, weights, tiny_config(truncation=3))
        assert estimate.gradient is not None
        gradients.append(torch.cat([part.flatten() for part in estimate.gradient.values()]))
    assert gradients[0].isfinite().all()
    assert not torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"transformer", "recurrent", "fine_tuning"}))
def test_validation_data_are_not_trained_on(name: str) -> None:
    task = FAMILIES[name](seeded(1))
    generator = seeded(2)
    train = {tuple(row.tolist()) for _ in range(60) for row in task.batch(generator)[0].flatten(1)}
    validation = {tuple(row.tolist()) for _ in range(20) for row in task.validation_batch(generator)[0].flatten(1)}
    assert len(train) > 50
    assert len(validation) > 5
    assert not train & validation


def test_fine_tuning_starts_from_a_trained_model() -> None:
    gains = []
    for seed in range(6):
        task = FAMILIES["fine_tuning"](seeded(seed))
        assert isinstance(task, Pretrained)
        batch = task.batch(seeded(0))
        start, buffers = task.init(seeded(1))
        fresh, _ = super(Pretrained, task).init(seeded(1))
        kept = [name for name in start if torch.equal(start[name], task.start.get(name, torch.tensor(0)))]
        assert len(kept) == len(task.start) >= 4
        if len(kept) == len(start):  # no new head, so the start is worth something at once
            gains.append(float(task.loss(fresh, buffers, batch)[0] - task.loss(start, buffers, batch)[0]))
    assert gains
    assert min(gains) > 0
    assert sum(gains) / len(gains) > 0.5


def test_families_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real.load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        FAMILIES["digits"](seeded(0))


def test_text_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `datasets` is stood in for by the part of its interface that is used."""

    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: Rows([{"text": f"{name} {split} " * 400}])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    task = hub_text("user/poems")(seeded(0))
    letters = {chr(32 + int(code)) for code in task.batch(seeded(0))[0].flatten()}
    assert letters == set("user/poems train ")
    with pytest.raises(ValueError, match=r"no column 'body'.*text"):
        hub_text("user/poems", column="body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        hub_text("user/poems")


def test_modules_are_built_anew() -> None:
    task = FAMILIES["cnn"](seeded(0))
    assert isinstance(task.build(), nn.Module)  # type: ignore[attr-defined]
    first, second = (task.init(seeded(seed))[0] for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)
