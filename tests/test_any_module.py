"""Meta-training on models and batches of every kind: side by side where that can be, one after the other where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_train_helpers import acting_network, tiny_config, tiny_unroll
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from learned_optim.meta_train import ModuleTask, meta_train
from learned_optim.meta_train.augment import InDtype, Subbatched
from learned_optim.meta_train.estimators import estimator

INPUTS = torch.randn(64, 6, generator=Generator().manual_seed(0))
TARGETS = INPUTS.sin().sum(1, keepdim=True)
TOKENS = torch.randint(10, (64, 6), generator=Generator().manual_seed(0))

ONE_BY_ONE = "one after the other"


def draw(generator: Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(64, (8,), generator=generator)
    return INPUTS[index], TARGETS[index]


def draw_tokens(generator: Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(64, (8,), generator=generator)
    return TOKENS[index], TARGETS[index]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(inputs[..., None])[0][:, -1])


class Padded(nn.Module):
    """A transformer that leaves out what counts as padding: inputs above 1, after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

    def forward(self, inputs: Tensor) -> Tensor:
        padding = (inputs > 1) & (torch.arange(6) > 0)
        return self.head(self.encoder(self.embed(inputs[..., None]), src_key_padding_mask=padding)[:, 0])


class PaddedAttention(Padded):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs[..., None])
        padding = (inputs > 1) & (torch.arange(6) > 0)
        return self.head(self.encoder(hidden, hidden, hidden, key_padding_mask=padding)[0][:, 0])


class Force(nn.Module):
    """A network that differentiates an energy by its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        return torch.autograd.grad(self.energy(inputs).sum(), inputs, create_graph=True)[0].sum(1, keepdim=True)


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1))


def bag(mode: str) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(10, 4, mode=mode), nn.Linear(4, 1))


# Name -> module, data, and whether optimizees can be trained side by side.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Generator], Any], bool]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), draw, False),
    "GRU": (lambda: Recurrent(nn.GRU), draw, False),
    "padded transformer": (Padded, draw, True),
    "padded attention": (PaddedAttention, draw, True),
    "differentiates inside": (Force, draw, False),
    "spectral norm": (spectral, draw, False),
    "embedding bag, mean": (lambda: bag("mean"), draw_tokens, True),
    "embedding bag, max": (lambda: bag("max"), draw_tokens, True),
}
WAYS: dict[str, dict[str, Any]] = {
    "exact, evaluated on validation data": {"validation": True, "evaluate_every": 1},
    "PES for the controller": {"estimators": {"": "exact", "controller": "pes"}, "replicas": 1},
    "first order": {"estimators": {"": "first_order"}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_module_serves(kind: str, way: str) -> None:
    build, data, together = KINDS[kind]
    lengths = {"meta_steps": 1, "horizon_min": 2, "horizon_max": 2, "truncation": 2}
    config = tiny_config(**lengths, unrolls_per_step=1, unrolls_per_family=1, **WAYS[way])
    note = pytest.warns(UserWarning, match=f"cannot batch this model .* {ONE_BY_ONE}")
    with nullcontext() if together else note:  # any other warning is an error
        result = meta_train({"mine": lambda _: ModuleTask(build, data, F.mse_loss, data)}, config, network=acting_network())
    assert result.dropped == 0


def test_one_after_the_other_computes_what_side_by_side_does() -> None:
    """The same network, written so that vmap can batch it."""

    class Functional(Force):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.func.grad(lambda inputs: self.energy(inputs).sum())(inputs).sum(1, keepdim=True)

    network, results = acting_network(), []
    for build in (Force, Functional):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unroll = tiny_unroll(network, ModuleTask(build, draw, F.mse_loss), horizon=4)
            after, estimate = estimator("exact")(unroll, network, dict(network.named_parameters()), tiny_config(truncation=4))
        assert estimate.gradient is not None
        results.append((after.optimizees.params, torch.cat([part.flatten() for part in estimate.gradient.values()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


BAGS = [(form, mode) for form in ("rows", "padded rows", "end to end", "end to end, last offset") for mode in ("sum", "mean", "max")]


@pytest.mark.parametrize(("form", "mode"), [*BAGS, ("weighted", "sum")])
def test_embedding_bags_compute_what_torchs_do(form: str, mode: str) -> None:
    options = {"padding_idx": 3 if "padded" in form else None, "include_last_offset": "last" in form}
    batch: tuple[Tensor | None, ...] = (TOKENS,)
    if "end" in form:
        batch = (TOKENS.flatten()[:20], torch.tensor([0, 3, 3, 10] + [20] * ("last" in form)))
    if form == "weighted":
        batch = (TOKENS, None, INPUTS)
    task = ModuleTask(
        lambda: nn.EmbeddingBag(10, 4, mode=mode, **options),  # type: ignore[arg-type]
        [(*batch, torch.zeros(()))],
        lambda output, target: output.square().mean() + target,
    )
    params, buffers = task.init(Generator().manual_seed(0))
    module = task.build()
    module.load_state_dict(params)
    torch.testing.assert_close(task.loss(params, buffers, (*batch, torch.zeros(())))[0], module(*batch).square().mean())


def test_without_second_derivatives_the_error_says_what_to_do() -> None:
    module = nn.EmbeddingBag(10, 1, mode="max")
    offsets = torch.tensor([0, 3, 5])
    task = ModuleTask(lambda: module, [(TOKENS.flatten(), offsets, torch.zeros(3, 1))], F.mse_loss)
    network = acting_network()
    unroll = tiny_unroll(network, task, horizon=4, replicas=1)
    config, weights = tiny_config(truncation=4), dict(network.named_parameters())
    with pytest.raises(ValueError, match=r"no second derivative .*_embedding_bag.*choose estimators=.*first_order"):
        estimator("exact")(unroll, network, weights, config)
    _, estimate = estimator("first_order")(unroll, network, weights, config)
    assert estimate.gradient is not None


def test_a_mistake_in_the_model_is_raised_as_it_is() -> None:
    class Wrong(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            raise IndexError("my mistake")

    with pytest.raises(IndexError, match=r"^my mistake$"):
        tiny_unroll(acting_network(), ModuleTask(lambda: Wrong(6, 1), draw, F.mse_loss))


# Batches


class Model(nn.Module):
    """Takes what a tokenizer's batches have in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, ids: list[str] | None = None) -> Tensor:
        weights = torch.ones_like(inputs) if mask is None else mask
        return self.layer((weights * inputs).mean(1, keepdim=True))


def by_name(model: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
    return F.mse_loss(model(**{key: value for key, value in batch.items() if key != "labels"}), batch["labels"])


def named(generator: Generator, **more: Any) -> dict[str, Any]:
    inputs, labels = draw(generator)
    return {"inputs": inputs, "labels": labels, **more}


def stretched(generator: Generator) -> tuple[Tensor, Tensor]:
    inputs, targets = draw(generator)
    return inputs[:, : 2 + int(torch.randint(5, (), generator=generator))], targets


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(Generator().manual_seed(1))


DATA = TensorDataset(INPUTS, TARGETS)
# Name -> data, and whether batches can be trained on side by side.
BATCHES: dict[str, tuple[Any, bool]] = {
    "mappings": ([named(Generator().manual_seed(seed)) for seed in range(3)], True),
    "a function that draws mappings": (named, True),
    "None": (lambda generator: named(generator, mask=None), True),
    "masks": (lambda generator: named(generator, mask=torch.ones(8, 6)), True),
    "the same strings": (lambda generator: named(generator, ids=["a"] * 8), True),
    "strings": (lambda generator: named(generator, ids=[str(float(torch.rand((), generator=generator)))] * 8), False),
    "None between tensors": (lambda generator: (draw(generator)[0], None, draw(generator)[1]), True),
    "changing shapes": (stretched, False),
    "lists": ([list(draw(Generator().manual_seed(seed))) for seed in range(3)], True),
    "shuffled DataLoader": (DataLoader(DATA, batch_size=10, shuffle=True), True),
    "DataLoader of an endless stream": (DataLoader(Endless(), batch_size=None), True),
    "DataLoader that collates mappings": (
        DataLoader(
            list(DATA), batch_size=8, collate_fn=lambda rows: {"inputs": torch.stack([row[0] for row in rows]), "labels": TARGETS[:8]}
        ),
        True,
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind(kind: str) -> None:
    data, together = BATCHES[kind]

    def loss(*arguments: Any) -> Tensor:
        return by_name(*arguments) if isinstance(arguments[1], dict) else F.mse_loss(*arguments)

    config = tiny_config(meta_steps=2, estimators={"": "exact", "controller": "pes"}, subbatch=0.5)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        result = meta_train({"mine": lambda _: ModuleTask(Model, data, loss)}, config, network=acting_network())
    assert result.dropped == 0
    assert {ONE_BY_ONE in str(note.message) for note in notes} == (set() if together else {True})


def test_a_single_tensor_is_its_own_target() -> None:
    for data in (DataLoader(INPUTS, batch_size=8), DataLoader(TensorDataset(INPUTS), batch_size=8)):  # type: ignore[arg-type]
        task = ModuleTask(lambda: nn.Linear(6, 6), data, F.mse_loss)
        inputs, targets = task.batch(Generator().manual_seed(0))
        assert inputs is targets
        assert inputs.shape == (8, 6)


def test_batches_of_all_shapes_are_trained_on() -> None:
    task = ModuleTask(Model, [(INPUTS[:8, :length], TARGETS[:8]) for length in (2, 3, 6)], F.mse_loss)
    seen = {task.batch(Generator().manual_seed(seed))[0].shape[1] for seed in range(30)}
    assert seen == {2, 3, 6}


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds single examples; .*DataLoader\(dataset"):
        ModuleTask(Model, DATA, F.mse_loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a batch must be a tensor, .* got str"):
        ModuleTask(Model, {"inputs": INPUTS}, by_name)  # type: ignore[arg-type]


def test_augmentations_of_mappings() -> None:
    batches = [named(Generator().manual_seed(0), mask=None, ids=list("abcdefgh"), scale=torch.tensor(2.0))]
    task = ModuleTask(Model, batches, lambda model, batch: F.mse_loss(model(batch["inputs"]), batch["labels"]))
    part = Subbatched(task, 0.5).batch(Generator().manual_seed(0))
    assert isinstance(part, dict)
    assert [len(part[key]) for key in ("inputs", "labels", "ids")] == [4, 4, 4]
    assert part["mask"] is None
    assert part["scale"] == 2
    loss, _ = InDtype(task, torch.bfloat16).loss(*task.init(Generator().manual_seed(0)), part)
    assert loss.isfinite()


def test_a_shuffled_loader_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """Its order comes from torch's global generator, which nothing else of the run may decide."""

    def mine(_: Generator) -> ModuleTask:
        return ModuleTask(lambda: nn.Linear(6, 1), DataLoader(DATA, batch_size=8, shuffle=True), F.mse_loss)

    config = tiny_config(meta_steps=4, horizon_max=6)
    whole = meta_train({"mine": mine}, config, network=acting_network())

    def stop(meta_step: int, _: dict[str, float]) -> None:
        if meta_step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train({"mine": mine}, config, network=acting_network(), folder=tmp_path, progress=stop)
    torch.randn(5)
    assert meta_train({"mine": mine}, config, network=acting_network(), folder=tmp_path).meta_losses == whole.meta_losses
