"""The development tasks: what weights and rules are chosen on, by the same measure as the held-out ones.

Siblings of the meta-training tasks, larger or longer, and what people train that no family has: small separable data, least squares on
noisy measurements, a differential equation, adapters. Their data are synthetic or Python's source code, so that a choice made here says
nothing yet about the held-out tasks.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
from tasks import Batch, BatchNorm, LoRA, Problem, Residual, Task, mlp, noise_of_labels, supervised
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta_train import FAMILIES
from learned_optim.meta_train.families import images, text
from learned_optim.meta_train.tasks import ModuleTask

SEED = 4242  # of the tasks themselves; meta-training draws others


def problem(task: ModuleTask, seed: int) -> Problem:
    """A meta-training task as a problem of the benchmark, measured on a sample of 16 batches."""
    generator = Generator().manual_seed(seed)
    params, buffers = task.init(generator)
    model = copy.deepcopy(task.module)
    model.load_state_dict(params | buffers, strict=False)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return task.criterion(model(*batch[:-1]), batch[-1])

    def sample(draw: Callable[[Generator], Batch]) -> Batch:
        fixed = Generator().manual_seed(SEED)
        return tuple(map(torch.cat, zip(*(draw(fixed) for _ in range(16)), strict=True)))

    return Problem(model, lambda: task.batch(generator), loss, sample(task.batch), sample(task.validation_batch))


def of_family(name: str, index: int) -> Callable[[int], Problem]:
    return lambda seed: problem(member(name, index), seed)


@functools.cache
def member(name: str, index: int) -> ModuleTask:
    return FAMILIES[name](Generator().manual_seed(SEED + index))  # type: ignore[return-value]


def normal(*shape: int, index: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(SEED + index))


def transformer(seed: int, tied: bool = False) -> Problem:
    def build() -> nn.Module:
        return text.TextModel(64, [text.Block(64, 4) for _ in range(2)], 32, tied)

    sample, validation = text.text_samplers(Generator().manual_seed(SEED), 32, 8)
    return problem(ModuleTask(build, sample, text.token_loss, validation), seed)


def recurrent(seed: int) -> Problem:
    sample, validation = text.text_samplers(Generator().manual_seed(SEED), 24, 8)
    return problem(ModuleTask(lambda: text.TextModel(64, [text.Recurrence(64)], 0, False), sample, text.token_loss, validation), seed)


def adapters(seed: int) -> Problem:
    """Low-rank corrections of a transformer that goes on with other text."""
    found = of_family("fine_tuning", 2)(seed)
    found.model.requires_grad_(False)
    for block in found.model.blocks:
        block.up, block.down = LoRA(block.up), LoRA(block.down)
    return found


def teacher(seed: int, build: Callable[[], nn.Module], noise: float = 0.0, count: int = 4000) -> Problem:
    """Labels made by a random network."""
    inputs = normal(count, 40)
    labels = (torch.tanh(inputs @ normal(40, 30, index=1) / 2) @ normal(30, 10, index=2)).argmax(1)
    return supervised(seed, (inputs, noise_of_labels(labels, 10, noise)), build, 64, F.cross_entropy)


def separable(seed: int, build: Callable[[], nn.Module], count: int, features: int, size: int, noise: float) -> Problem:
    """Two classes of a few hundred examples, nearly on two sides of a plane."""
    inputs = normal(count, features) @ (normal(features, features, index=1) / math.sqrt(features) + 0.3 * torch.eye(features))
    scores = inputs @ normal(features, 2, index=2) + noise * normal(count, 2, index=3)
    return supervised(seed, (inputs, scores.argmax(1)), build, size, F.cross_entropy)


def records(seed: int, build: Callable[[], nn.Module], columns: int, factors: int, noise: float) -> Problem:
    """Two classes in a table whose columns follow a few factors and so each other, half of them with heavy tails."""
    hidden = normal(600, factors) * torch.linspace(1, 0.3, factors)
    values = hidden @ normal(factors, columns, index=1) + 0.1 * normal(600, columns, index=2)
    values[:, ::2] = (0.5 * values[:, ::2]).exp()
    labels = (hidden @ normal(factors, 2, index=3) + noise * normal(600, 2, index=4)).argmax(1)
    return supervised(seed, ((values - values.mean(0)) / values.std(0), labels), build, 16, F.cross_entropy)


def measurements(seed: int, features: int, size: int, noise: float) -> Problem:
    """Least squares on a few hundred noisy measurements of correlated quantities."""
    inputs = normal(400, features) @ (normal(features, features, index=1) / math.sqrt(features) + 0.3 * torch.eye(features))
    targets = inputs @ normal(features, 1, index=2) / math.sqrt(features) + noise * normal(400, 1, index=3)
    return supervised(seed, (inputs, targets / targets.std()), lambda: nn.Linear(features, 1), size, F.mse_loss)


def polynomials(seed: int, columns: int) -> Problem:
    """Least squares on powers and products of correlated quantities, which have means; full batches."""
    quantities = normal(400, columns) @ (normal(columns, columns, index=1) / math.sqrt(columns) + 0.5 * torch.eye(columns))
    products = quantities[:, :, None] * quantities[:, None]
    features = torch.cat([quantities, quantities**3, products.flatten(1)], 1)
    targets = quantities @ normal(columns, 1, index=2) + 0.3 * (quantities**2) @ normal(columns, 1, index=3)
    targets = targets / targets.std() + 0.6 * normal(400, 1, index=4)
    return supervised(seed, (features / features.std(0), targets), lambda: nn.Linear(features.shape[1], 1), 10**6, F.mse_loss)


def waves(seed: int) -> Problem:
    """Least squares on random waves, which are nearly dependent; full batches."""
    inputs = normal(400, 4)
    features = torch.cos(inputs @ normal(4, 160, index=1) * torch.linspace(0.1, 1.5, 160) + 3 * normal(160, index=2))
    targets = torch.sin(2 * inputs).prod(1, keepdim=True) + 0.3 * inputs.sum(1, keepdim=True) + 0.1 * normal(400, 1, index=3)
    return supervised(seed, (features, targets / targets.std()), lambda: nn.Linear(160, 1), 10**6, F.mse_loss)


def equation(seed: int) -> Problem:
    """A network that solves u' = -2 u + sin(5 x), u(0) = 1, on [0, 3]."""
    generator, grid = Generator().manual_seed(seed), torch.linspace(0, 3, 150)[:, None]

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        value = model(x)
        slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        return (slope + 2 * value - torch.sin(5 * x)).square().mean() + (model(torch.zeros(1, 1)) - 1).square().mean()

    return Problem(mlp([1, 32, 32, 1], nn.Tanh), lambda: 3 * torch.rand(64, 1, generator=generator), residual, grid, grid)


def smooth(seed: int, size: int) -> Problem:
    x = torch.linspace(-3, 3, 320)[:, None]
    y = torch.sin(3 * x) + 0.5 * torch.sin(7 * x + 1)
    return supervised(seed, (x, y), lambda: mlp([1, 64, 64, 1], nn.Tanh), size, F.mse_loss)


def pictures(seed: int, build: Callable[[], nn.Module]) -> Problem:
    return supervised(seed, synthetic(), build, 32, F.cross_entropy)


@functools.cache
def synthetic() -> tuple[Tensor, Tensor]:
    return images.synthetic_images(Generator().manual_seed(SEED), 12, 1, 10)


def convolutions() -> nn.Module:
    first = nn.Conv2d(1, 16, 3, 2, 1), BatchNorm(16), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, 2, 1), BatchNorm(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def residual_net() -> nn.Module:
    stem = nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()
    return nn.Sequential(*stem, Residual(12, 12, 1), Residual(12, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def autoencoder(seed: int) -> Problem:
    pixels = synthetic()[0].flatten(1)
    return supervised(seed, (pixels, pixels), lambda: mlp([144, 64, 12, 64, 144], nn.Tanh), 32, F.mse_loss)


TASKS: dict[str, Task] = {
    "dev transformer": Task(transformer, 200),
    "dev tied transformer": Task(functools.partial(transformer, tied=True), 200),
    "dev recurrent": Task(recurrent, 200),
    "dev vit": Task(of_family("vision_transformer", 0), 200),
    "dev cnn": Task(lambda seed: pictures(seed, convolutions), 150),
    "dev resnet": Task(lambda seed: pictures(seed, residual_net), 120),
    "dev family cnn": Task(of_family("cnn", 0), 250),
    "dev autoencoder": Task(autoencoder, 300),
    "dev mlp": Task(lambda seed: teacher(seed, lambda: mlp([40, 128, 128, 10], nn.ReLU)), 300),
    "dev deep mlp": Task(lambda seed: teacher(seed, lambda: mlp([40, *[32] * 6, 10], nn.GELU)), 300),
    "dev long": Task(lambda seed: teacher(seed, lambda: mlp([40, 24, 10], nn.ReLU), 0.1, 1000), 2000),
    "dev separable": Task(lambda seed: separable(seed, lambda: mlp([20, 48, 48, 2], nn.ReLU), 450, 20, 16, 0.0), 250),
    "dev noisy separable": Task(lambda seed: separable(seed, lambda: mlp([12, 40, 40, 2], nn.SiLU), 300, 12, 16, 0.3), 200),
    "dev wide separable": Task(lambda seed: separable(seed, lambda: mlp([30, 64, 64, 2], nn.GELU), 800, 30, 32, 0.1), 200),
    "dev records": Task(lambda seed: records(seed, lambda: mlp([24, 96, 48, 2], nn.GELU), 24, 6, 0.2), 200),
    "dev few factors": Task(lambda seed: records(seed, lambda: mlp([36, 72, 72, 2], nn.ReLU), 36, 3, 0.1), 200),
    "dev convex": Task(of_family("convex", 0), 250),
    "dev convex 2": Task(of_family("convex", 1), 250),
    "dev measurements": Task(lambda seed: measurements(seed, 12, 16, 0.7), 200),
    "dev many measurements": Task(lambda seed: measurements(seed, 40, 32, 0.4), 250),
    "dev ill-conditioned": Task(of_family("ill_conditioned", 0), 300),
    "dev ill-conditioned 2": Task(of_family("ill_conditioned", 1), 300),
    "dev polynomials": Task(lambda seed: polynomials(seed, 8), 400),
    "dev many polynomials": Task(lambda seed: polynomials(seed, 12), 300),
    "dev waves": Task(waves, 400),
    "dev equation": Task(equation, 400, solved=1e-5),
    "dev smooth": Task(lambda seed: smooth(seed, 10**6), 500, solved=1e-5),
    "dev noisy smooth": Task(lambda seed: smooth(seed, 32), 400, solved=1e-5),
    "dev fine-tuning": Task(of_family("fine_tuning", 0), 150, fine_tuning=True),
    "dev fine-tuning 2": Task(of_family("fine_tuning", 1), 150, fine_tuning=True),
    "dev fine-tuning 3": Task(of_family("fine_tuning", 3), 150, fine_tuning=True),
    "dev adapters": Task(adapters, 150, fine_tuning=True),
}
