"""Families on the data that come with scikit-learn, an optional dependency."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import Task
from .sampling import ACTIVATIONS, choose, mlp_module, supervised

NEEDS_SKLEARN = "the families `tabular` and `digits` need scikit-learn: pip install scikit-learn, or name other families"


@functools.cache
def load(name: str) -> tuple[Tensor, Tensor]:
    """Inputs (examples, features), standardised, and targets of one of scikit-learn's bundled data sets, in a fixed random order.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(NEEDS_SKLEARN) from None
    found: Any = getattr(datasets, f"load_{name}")(return_X_y=True)
    inputs, targets = (torch.from_numpy(array) for array in found)
    order = torch.randperm(len(inputs), generator=Generator().manual_seed(0))
    inputs = inputs[order].float()
    inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6)
    targets = targets[order]
    return inputs, (targets.long() if name != "diabetes" else ((targets - targets.mean()) / targets.std()).float()[:, None])


def tabular(generator: Generator) -> Task:
    """Wine, breast cancer and diabetes, by an MLP."""
    name = choose(generator, ("wine", "breast_cancer", "diabetes"))
    inputs, targets = load(name)
    outputs, criterion = (1, F.mse_loss) if name == "diabetes" else (int(targets.max()) + 1, F.cross_entropy)
    sizes = [inputs.shape[1], *[choose(generator, (16, 32))] * choose(generator, (0, 1, 2)), outputs]
    activation = choose(generator, ACTIVATIONS)
    return supervised(lambda: mlp_module(sizes, activation), inputs, targets, choose(generator, (8, 32)), criterion)


def digits(generator: Generator) -> Task:
    """Handwritten digits of 8 x 8 pixels, by an MLP or a convolutional net."""
    inputs, targets = load("digits")
    activation, width = choose(generator, ACTIVATIONS), choose(generator, (16, 32))
    size = choose(generator, (16, 32))
    if choose(generator, (False, True)):
        return supervised(lambda: mlp_module([64, 2 * width, width, 10], activation), inputs, targets, size, F.cross_entropy)

    def build() -> nn.Module:
        convolutions = [nn.Conv2d(1, width // 2, 3, 2, 1), activation(), nn.Conv2d(width // 2, width, 3, 2, 1), activation()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * width, 10))

    return supervised(build, inputs.unflatten(1, (1, 8, 8)), targets, size, F.cross_entropy)
