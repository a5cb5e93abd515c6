"""Whether a matrix was trained can be seen before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, OptimizerNetwork
from learned_optim.config import NetworkConfig
from learned_optim.features import Layout, unevenness
from learned_optim.rule import Control, spectral_norms

FRESH: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: nn.Linear(96, 64).weight,
    "wide linear": lambda: nn.Linear(784, 10).weight,
    "read-out": lambda: nn.Linear(384, 1).weight,
    "convolution": lambda: nn.Conv2d(8, 32, 3).weight,
    "embedding": lambda: nn.Embedding(1000, 32).weight,
    "normal": lambda: nn.init.trunc_normal_(torch.empty(128, 128), std=0.02),
    "xavier": lambda: nn.init.xavier_uniform_(torch.empty(64, 256)),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(64, 64)),
    "zeros": lambda: torch.zeros(64, 64),
}


def looks(weight: Tensor, stacked: bool = False) -> float:
    found = Layout.of((weight.shape,), torch.device("cpu"), (stacked,)).looks_trained(weight.detach().reshape(-1))
    return float(found)


@pytest.mark.parametrize("kind", FRESH)
def test_what_was_drawn_looks_fresh(kind: str) -> None:
    torch.manual_seed(0)
    assert max(looks(FRESH[kind]()) for _ in range(20)) < 0.2


def test_what_was_trained_looks_trained_whatever_its_scale() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1000, 32) * torch.linspace(0.1, 3, 32)
    labels = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))(inputs).argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    weights = [model[0].weight, model[2].weight]
    before = [looks(weight) for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert max(before) < 0.2
    assert min(looks(weight) for weight in weights) == 1
    assert min(looks(1e-4 * weight) for weight in weights) == 1


def test_vectors_say_nothing_and_broken_weights_say_fresh() -> None:
    assert looks(torch.ones(7)) == looks(torch.ones(7, 1)) == looks(torch.tensor(1.0)) == looks(torch.ones(0, 3)) == -1
    assert looks(torch.full((8, 8), torch.nan)) == looks(torch.full((8, 8), torch.inf)) == 0


def test_stacked_matrices_are_looked_at_one_by_one() -> None:
    torch.manual_seed(0)
    experts = torch.randn(64, 24, 2) @ torch.randn(64, 2, 24)
    assert looks(experts, stacked=True) == 1
    assert looks(experts) < 0.5  # flattened, they have nothing in common
    assert looks(torch.randn(6, 24, 24), stacked=True) < 0.2


def test_unevenness_is_that_of_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 5, 9, generator=generator)
    values = torch.linalg.svdvals(matrices) / matrices.square().mean((-2, -1)).sqrt()[:, None]
    torch.testing.assert_close(unevenness(matrices), values.pow(4).sum(-1) / (5 * 9 * 14))
    torch.testing.assert_close(unevenness(matrices.mT), unevenness(matrices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_optimizer_looks_once_before_the_first_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(32, 2) @ torch.randn(2, 32)).to(dtype)), nn.Parameter(torch.randn(32, 32).to(dtype))]
    optimizer = LearnedOptimizer(params, OptimizerNetwork(NetworkConfig()))
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        params[0].data.normal_()  # it looks fresh from now on, but it was not
    assert [Control.of(optimizer.state[param]["control"]).trained.item() for param in params] == [1, 0]


# What follows from it


def trained_and_fresh(kind: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    low, full = torch.randn(4, 24, 2) @ torch.randn(4, 2, 24), torch.randn(4, 24, 24)
    each: dict[str, Callable[[Tensor], Tensor]] = {
        "matrix": lambda one: one[0],
        "convolution": lambda one: one[0].unflatten(1, (6, 2, 2)),
        "stacked": lambda one: one,
    }
    return [nn.Parameter(each[kind](one).clone()) for one in (low, full)]


def steps(params: list[nn.Parameter], optimizer: LearnedOptimizer, seeds: range) -> list[Tensor]:
    """What the last step added."""
    for seed in seeds:
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return [param.detach() - old for param, old in zip(params, before, strict=True)]


@pytest.mark.parametrize("kernel", ["reference", "compiled"])
@pytest.mark.parametrize("kind", ["matrix", "convolution", "stacked"])
def test_what_looks_trained_is_not_orthogonalised(kind: str, kernel: str) -> None:
    params = trained_and_fresh(kind)
    optimizer = LearnedOptimizer(params, kernel=kernel, stacked=kind == "stacked")
    spread = []
    for change in steps(params, optimizer, range(1)):
        values = torch.linalg.svdvals(change if kind == "stacked" else change.reshape(24, -1))
        spread.append((values[..., 0] / values[..., -2]).max().item())
    assert spread[0] > 5 > 2 > spread[1], "signs of noise have small singular values too, and an orthogonal matrix none"


@pytest.mark.parametrize("kind", ["matrix", "convolution", "stacked"])
def test_kernels_agree_on_it(kind: str) -> None:
    found = []
    for kernel in ("reference", "compiled"):
        params = trained_and_fresh(kind)
        steps(params, LearnedOptimizer(params, kernel=kernel, stacked=kind == "stacked"), range(5))
        found.append([param.detach() for param in params])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_its_steps_are_as_long_as_gradients_agree() -> None:
    """Adam's length, which noise shortens; an orthogonal step is as long as ever."""
    network, lengths = OptimizerNetwork(NetworkConfig()), []  # untrained, it goes along the momentum
    for noise in (0.0, 3.0):
        params = trained_and_fresh("matrix")
        optimizer = LearnedOptimizer(params, network)
        for seed in range(20):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = 1 + noise * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        lengths.append([(param.detach() - old).norm().item() for param, old in zip(params, before, strict=True)])
    (clean, fresh), (noisy, fresh_noisy) = lengths
    assert clean / noisy > 1.5 * fresh / fresh_noisy


def test_it_counts_as_a_matrix_all_the_same() -> None:
    """A new read-out on a trained model takes steps as in any deep model, not the longer ones of a model with a single matrix."""
    torch.manual_seed(0)
    layout = Layout((torch.Size([8, 8]),) * 4, torch.device("cpu"), trained=(True, True, True, False))
    assert spectral_norms(layout, NetworkConfig()) == {3: 1.0}
    assert spectral_norms(layout.of_some([3]), NetworkConfig()) == {0: 1.0}


def test_a_resume_and_a_copy_know_what_looked_trained() -> None:
    params = trained_and_fresh("matrix")
    optimizer = LearnedOptimizer(params)
    steps(params, optimizer, range(2))
    params[0].data.normal_(generator=torch.Generator().manual_seed(7))
    saved, start = copy.deepcopy(optimizer.state_dict()), [nn.Parameter(param.detach().clone()) for param in params]
    other = LearnedOptimizer(start)
    other.load_state_dict(saved)
    again, copied = copy.deepcopy((params, optimizer))
    expected = steps(params, optimizer, range(2, 4))
    assert all(map(torch.equal, expected, steps(start, other, range(2, 4))))
    assert all(map(torch.equal, expected, steps(again, copied, range(2, 4))))
