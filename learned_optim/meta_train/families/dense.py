"""Families without structure in their inputs: MLPs, smooth regression, and convex and ill-conditioned problems.

Shapes: `B` examples of a batch, `D` features.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import ModuleTask, Task
from .sampling import ACTIVATIONS, choose, mlp_module, supervised


def mlp(generator: Generator) -> Task:
    """Classification of points in clusters, several clusters a class, with some labels wrong."""
    features, classes = choose(generator, (8, 16, 32)), choose(generator, (4, 8, 10))
    centres = torch.randn(4 * classes, features, generator=generator)
    labels = torch.arange(4 * classes) % classes
    cluster = torch.randint(4 * classes, (2048,), generator=generator)
    scale = torch.exp(torch.randn(features, generator=generator))
    inputs = (centres[cluster] + choose(generator, (0.3, 0.6)) * torch.randn(2048, features, generator=generator)) * scale / scale.mean()
    wrong = torch.rand(2048, generator=generator) < choose(generator, (0.0, 0.1))
    targets = torch.where(wrong, torch.randint(classes, (2048,), generator=generator), labels[cluster])
    sizes = [features, *[choose(generator, (16, 32, 64))] * choose(generator, (0, 1, 2, 3)), classes]
    activation, norm = choose(generator, ACTIVATIONS), choose(generator, (False, False, True))
    return supervised(lambda: mlp_module(sizes, activation, norm), inputs, targets, choose(generator, (16, 32, 64)), F.cross_entropy)


def regression(generator: Generator) -> Task:
    """A smooth function fitted by an MLP; in full batches half of the time."""
    features = choose(generator, (1, 2, 4, 16))
    inputs = torch.randn(288, features, generator=generator)
    frequency = torch.randn(features, 4, generator=generator) / math.sqrt(features)
    targets = torch.sin(2 * inputs @ frequency + torch.randn(4, generator=generator)).sum(1, keepdim=True)
    noise = choose(generator, (0.0, 0.05))
    targets = (targets - targets.mean()) / targets.std() + noise * torch.randn(targets.shape, generator=generator)
    sizes = [features, *[choose(generator, (16, 32))] * choose(generator, (1, 2, 3)), 1]
    activation = choose(generator, (nn.Tanh, nn.GELU, nn.SiLU))
    task = supervised(lambda: mlp_module(sizes, activation), inputs, targets, 32, F.mse_loss)
    if choose(generator, (False, True)):
        task.batch = lambda _: (inputs[:252], targets[:252])
    return task


def convex(generator: Generator) -> Task:
    """Softmax regression on correlated features, with overlapping classes: noise dominates in the end."""
    features, classes = choose(generator, (8, 24, 48)), choose(generator, (2, 5, 10))
    mix = torch.randn(features, features, generator=generator) / math.sqrt(features)
    inputs = torch.randn(2048, features, generator=generator) @ (mix + 0.3 * torch.eye(features))
    scores = inputs @ torch.randn(features, classes, generator=generator) * choose(generator, (0.3, 1.0, 3.0))
    gumbel = -(-torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6).log()).log()
    targets = (scores + gumbel).argmax(1)
    return supervised(lambda: nn.Linear(features, classes), inputs, targets, choose(generator, (8, 32, 128)), F.cross_entropy)


def ill_conditioned(generator: Generator) -> Task:
    """Least squares with condition numbers of 1 to 1e4, by one linear layer or by a stack of them."""
    features, outputs = choose(generator, (4, 16, 32)), choose(generator, (1, 4))
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    scales = torch.logspace(0, -choose(generator, (0.0, 0.5, 1.0, 2.0)), features)  # of the inputs; the condition number is the square
    inputs = torch.randn(512, features, generator=generator) * scales @ basis
    targets = inputs @ basis.mT @ torch.randn(features, outputs, generator=generator)
    targets = targets + choose(generator, (0.0, 0.1)) * torch.randn(targets.shape, generator=generator)
    depth = choose(generator, (1, 1, 2, 3))

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(depth - 1)), nn.Linear(features, outputs))

    task: ModuleTask = supervised(build, inputs, targets, 32, half_square)
    if choose(generator, (False, True)):
        task.batch = lambda _: (inputs[:448], targets[:448])
    return task


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(-1).mean()
