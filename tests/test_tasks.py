"""Tasks made of modules, and augmentation: what meta-training sees is what the module does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from meta_train_helpers import acting_network, tiny_config, tiny_task, tiny_unroll
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.augment import InDtype, Reparametrized, ScaledLoss, Subbatched
from learned_optim.meta_train.estimators import estimator

INPUTS = torch.randn(64, 6, generator=Generator().manual_seed(0))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def sample(generator: Generator) -> tuple[Tensor, ...]:
    index = torch.randint(64, (8,), generator=generator)
    return INPUTS[index], INPUTS[index].sum(1, keepdim=True)


class Sequence(nn.Module):
    """A layer that reads each row of inputs as a sequence of numbers."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(1, width), layer, nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(self.embed(inputs[..., None]))
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)),
    "group norm, dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.2), nn.Linear(8, 1)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 1)),
    "attention": lambda: Sequence(Attention(), 4),
    "transformer layer": lambda: Sequence(transformer_layer(), 4),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module_is_meta_trained_on_exactly(name: str) -> None:
    """Replicas under vmap, and second derivatives, which differ from none."""
    network = acting_network()
    unroll = tiny_unroll(network, ModuleTask(MODULES[name], sample, F.mse_loss), horizon=4)
    config, weights = tiny_config(truncation=4), dict(network.named_parameters())
    gradients = []
    for kind in ("exact", "first_order"):
        _, estimate = estimator(kind)(unroll, network, weights, config)
        assert estimate.gradient is not None
        gradients.append(torch.cat([part.flatten() for part in estimate.gradient.values()]))
    assert gradients[0].isfinite().all()
    assert (gradients[0] - gradients[1]).norm() > 1e-4 * gradients[0].norm()


@pytest.mark.parametrize("kind", ["exact", "first_order"])
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_fused_recurrent_layers_train_with_one_replica(layer: type[nn.Module], kind: str) -> None:
    """Nothing is vmapped then, so modules that cannot be are fine."""
    network = acting_network()
    task = ModuleTask(lambda: Sequence(layer(4, 4, batch_first=True), 4), sample, F.mse_loss)
    unroll = tiny_unroll(network, task, horizon=4, replicas=1)
    _, estimate = estimator(kind)(unroll, network, dict(network.named_parameters()), tiny_config(truncation=4))
    assert estimate.gradient is not None
    assert all(part.isfinite().all() for part in estimate.gradient.values())


def test_the_loss_is_the_modules_own() -> None:
    task = ModuleTask(MODULES["batch norm"], sample, F.mse_loss)
    params, buffers = task.init(seeded())
    batch = task.batch(seeded())
    module = task.build()
    module.load_state_dict({**params, **buffers})
    for training in (True, False):
        loss, after = task.loss(params, buffers, batch, training)
        module.train(training)
        torch.testing.assert_close(loss, F.mse_loss(module(batch[0]), batch[1]))
        torch.testing.assert_close(after, dict(module.named_buffers()))
        buffers = after


def test_pure_and_seeded() -> None:
    task = ModuleTask(MODULES["batch norm"], sample, F.mse_loss)
    params, buffers = task.init(seeded(1))
    again, _ = task.init(seeded(1))
    other, _ = task.init(seeded(2))
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["0.weight"], other["0.weight"])
    before = {name: value.clone() for name, value in buffers.items()}
    _, after = task.loss(params, buffers, task.batch(seeded()))
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_tied_weights_are_one_entry_with_the_sum_of_both_gradients() -> None:
    tokens = torch.tensor([1, 2, 3])
    task = ModuleTask(Tied, lambda _: (tokens, tokens), F.cross_entropy)
    assert list(task.shapes) == ["embedding.weight"]
    params, buffers = task.init(seeded())
    weight = params["embedding.weight"].requires_grad_()
    loss, _ = task.loss({"embedding.weight": weight}, buffers, (tokens, tokens))
    (grad,) = torch.autograd.grad(loss, weight)
    # Rows of tokens that the input lacks get theirs from the read-out, the others from both.
    assert (grad.norm(dim=1) > 0).all()


def test_frozen_parameters_stay_as_they_are_built() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
        module[0].requires_grad_(False)
        return module

    task = ModuleTask(build, sample, F.mse_loss)
    assert list(task.shapes) == ["1.weight", "1.bias"]
    params, constants = task.init(seeded())
    module = build()
    module.load_state_dict({**params, **constants})
    batch = task.batch(seeded())
    torch.testing.assert_close(task.loss(params, constants, batch)[0], F.mse_loss(module(batch[0]), batch[1]))


def test_batches_of_a_data_loader() -> None:
    loader = DataLoader(TensorDataset(INPUTS, INPUTS.sum(1)), batch_size=10)
    task = ModuleTask(lambda: nn.Linear(6, 1), loader, lambda output, target: F.mse_loss(output[:, 0], target))
    drawn = [task.batch(seeded(seed)) for seed in range(40)]
    assert {len(inputs) for inputs, _ in drawn} == {10}  # the last batch of 4 is left out
    assert len({float(targets[0]) for _, targets in drawn}) == 6
    torch.testing.assert_close(drawn[0][0].sum(1), drawn[0][1])
    assert torch.equal(task.batch(seeded(3))[0], drawn[3][0])


def test_batches_that_are_mappings_go_to_the_module_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(self.layer(inputs), labels)}

    batches = [{"inputs": INPUTS[:8], "labels": INPUTS[:8, :1]}]
    task = ModuleTask(Model, batches, lambda model, batch: model(**batch)["loss"])
    network = acting_network()
    unroll = tiny_unroll(network, task, horizon=5)
    after, _ = estimator("exact")(unroll, network, dict(network.named_parameters()), tiny_config(truncation=5))
    assert (after.measure(5, after.optimizees) < unroll.first_loss).all()


def test_validation_batches_come_from_the_validation_data() -> None:
    task = ModuleTask(lambda: nn.Linear(6, 1), sample, F.mse_loss, [(torch.full((8, 6), 7.0), torch.zeros(8, 1))])
    assert (task.validation_batch(seeded())[0] == 7).all()
    assert not (task.batch(seeded())[0] == 7).any()
    task = ModuleTask(lambda: nn.Linear(6, 1), sample, F.mse_loss)
    assert torch.equal(task.validation_batch(seeded())[0], task.batch(seeded())[0])


def test_useless_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        ModuleTask(nn.ReLU, sample, F.mse_loss)
    with pytest.raises(ValueError, match="no batch"):
        ModuleTask(lambda: nn.Linear(6, 1), iter(()), F.mse_loss)
    task = ModuleTask(lambda: nn.Linear(6, 1), sample, lambda output, target: (output - target).square())
    with pytest.raises(ValueError, match=r"shape \(\)"):
        task.loss(*task.init(seeded()), task.batch(seeded()))


# Augmentation


def test_reparametrization_changes_scales_and_not_the_function() -> None:
    task = tiny_task(seeded())
    scaled = Reparametrized(task, seeded(), 1.0)
    (plain, _), (changed, _) = task.init(seeded(5)), scaled.init(seeded(5))
    batch = task.batch(seeded())
    torch.testing.assert_close(scaled.loss(changed, {}, batch)[0], task.loss(plain, {}, batch)[0])
    assert all(not torch.allclose(changed[name], plain[name]) for name in plain)


def test_the_scale_of_the_loss_changes_no_training_run() -> None:
    task, network = tiny_task(seeded()), acting_network()
    scaled = ScaledLoss(task, seeded(), 2.0)
    runs = []
    for one in (task, scaled):
        unroll = tiny_unroll(network, one, horizon=6)
        after, estimate = estimator("exact")(unroll, network, dict(network.named_parameters()), tiny_config(truncation=6))
        runs.append((unroll.first_loss, after.optimizees.params, estimate.meta_loss))
    torch.testing.assert_close(runs[1][0], scaled.scale * runs[0][0])
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-5)
    assert runs[1][2] == pytest.approx(runs[0][2], rel=1e-4)


def test_a_share_of_the_batch() -> None:
    task = tiny_task(seeded())
    part, whole = Subbatched(task, 0.3).batch(seeded(1)), task.batch(seeded(1))
    assert [len(tensor) for tensor in part] == [3, 3]
    assert all(torch.equal(one, other[:3]) for one, other in zip(part, whole, strict=True))


def test_optimizees_in_bfloat16() -> None:
    task = tiny_task(seeded())
    params, buffers = task.init(seeded())
    batch = task.batch(seeded())
    loss, _ = InDtype(task, torch.bfloat16).loss(params, buffers, batch)
    exact, _ = task.loss(params, buffers, batch)
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
