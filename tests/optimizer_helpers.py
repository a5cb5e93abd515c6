"""A small model, its training and comparisons to the last bit, for the tests of `LearnedOptimizer`."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer


class Model(nn.Module):
    """A matrix, vectors, a scalar and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.second(self.first(inputs).tanh()) + self.empty.sum()


def make_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().to(device, dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss on the batch of that step."""
    param = next(model.parameters())
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 6, generator=generator)
    targets = torch.stack([inputs[:, 0], inputs[:, 1] * inputs[:, 2], inputs.sum(1).sin()], dim=1)
    return (model(inputs.to(param)) - targets.to(param)).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def make_pair(kernel: str = "auto", pretrained: str = "small", steps: int = 2, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    """A model and its optimizer after a few steps."""
    model = make_model()
    optimizer = LearnedOptimizer(model.named_parameters(), pretrained, kernel=kernel, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the last bit, in nested lists and dicts too."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def save_and_load(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
