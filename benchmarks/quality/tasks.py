"""The held-out tasks of the quality benchmark.

None of them is like a task that the weights were meta-trained on: other data (handwritten digits, a manual, docstrings, patients; on
request MNIST and WikiText-2), other shapes, and kinds of model and loss that no meta-training family has. Nothing is ever tuned on them
but the baselines.

Shapes: `B` examples of a batch, `T` characters of a text.
"""

from __future__ import annotations

import functools
import gzip
import inspect
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = Any
CHARACTERS = 128  # text is read as ASCII, anything else as a question mark


@dataclass
class Problem:
    """One seed's model and data. `loss` is what is trained; `measure`, a number to be small, is what is reported."""

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Batch  # a fixed sample of the training data
    validation: Batch
    measure: Callable[[nn.Module, Batch], Tensor] | None = None  # `loss` unless given


@dataclass(frozen=True)
class Task:
    """A task. A loss of `solved` counts as the end: below it, no optimizer is the better one."""

    make: Callable[[int], Problem]
    steps: int
    fine_tuning: bool = False
    solved: float = 1e-3


# Data


def split(inputs: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four fifths to train on and a fifth for validation, always the same."""
    order = torch.randperm(len(inputs), generator=Generator().manual_seed(0))
    border = len(inputs) // 5
    return (inputs[order[border:]], targets[order[border:]]), (inputs[order[:border]], targets[order[:border]])


@functools.cache
def scikit_learn(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    inputs, targets = map(torch.from_numpy, getattr(datasets, f"load_{name}")(return_X_y=True))
    inputs = inputs.float() / 16 if name == "digits" else ((inputs - inputs.mean(0)) / inputs.std(0)).float()
    return inputs, targets if name != "diabetes" else ((targets - targets.mean()) / targets.std()).float()[:, None]


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


@functools.cache
def manual() -> Tensor:
    """The reference manual that comes with Python."""
    from pydoc_data.topics import topics

    return encode("\n".join(topics.values()))


@functools.cache
def docstrings() -> Tensor:
    """What torch says about its functions."""
    found = (inspect.getdoc(getattr(torch, name)) for name in sorted(dir(torch)) if not name.startswith("_"))
    return encode("\n".join(text for text in found if text and len(text) > 500))


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    folder = shared_data() / "mnist"
    read = functools.partial(torch.frombuffer, dtype=torch.uint8)
    images = read(bytearray(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())), offset=16)
    labels = read(bytearray(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())), offset=8)
    return images.reshape(-1, 784).float() / 255, labels.long()


@functools.cache
def wikitext() -> Tensor:
    return encode("".join((shared_data() / "wikitext-2" / name).read_text() for name in ("valid.txt", "test.txt")))


def shared_data() -> Path:
    """The folder with MNIST's test images and WikiText-2, from the environment."""
    return Path(os.environ["QUALITY_DATA"])


# Problems


def supervised(
    seed: int, data: tuple[Tensor, Tensor], build: Callable[[], nn.Module], size: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> Problem:
    train, validation = split(*data)
    generator = Generator().manual_seed(seed)

    def batch() -> Batch:
        chosen = torch.randint(len(train[0]), (size,), generator=generator) if size < len(train[0]) else slice(None)
        return train[0][chosen], train[1][chosen]

    sample = train[0][:512], train[1][:512]
    return Problem(build(), batch, lambda model, batch: loss(model(batch[0]).float(), batch[1]), sample, validation)


def language(seed: int, text: Tensor, build: Callable[[], nn.Module], length: int, size: int) -> Problem:
    """Prediction of each next character. The last tenth of the text is for validation."""
    border = len(text) * 9 // 10
    generator = Generator().manual_seed(seed)
    windows = text[:border].unfold(0, length + 1, 1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def sample(part: Tensor) -> Tensor:
        rows = part.unfold(0, length + 1, length + 1)
        return rows[:: max(1, len(rows) // 64)][:64]

    return Problem(
        build(),
        lambda: windows[torch.randint(len(windows), (size,), generator=generator)],
        loss,
        sample(text[:border]),
        sample(text[border:]),
    )


def noise_of_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """The labels with a share of them drawn at random."""
    generator = Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, torch.randint(classes, labels.shape, generator=generator), labels)


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class BatchNorm(nn.BatchNorm2d):
    """Statistics of the batch at hand always, so that averaged weights need no second pass over the data."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            BatchNorm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            BatchNorm(outputs),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


def encoder(width: int, depth: int) -> nn.ModuleList:
    block = functools.partial(nn.TransformerEncoderLayer, width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
    return nn.ModuleList(block(norm_first=True) for _ in range(depth))


class VisionTransformer(nn.Module):
    """Images (B, side ** 2) cut into square patches."""

    def __init__(self, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.side, self.patch = side, patch
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.layers = encoder(width, depth)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x.unflatten(1, (1, self.side, self.side))).flatten(2).mT + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


class Transformer(nn.Module):
    """A causal language model, (B, T) -> (B, T, CHARACTERS)."""

    def __init__(self, width: int, depth: int, context: int, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(context, width)
        self.layers = encoder(width, depth)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        if tied:
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.embedding(text) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


class LSTM(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(text))[0])


class LoRA(nn.Module):
    """A frozen linear layer with a trained correction of low rank (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a = nn.Parameter(torch.empty(rank, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


# Tasks


def digits(seed: int, build: Callable[[], nn.Module], size: int = 32) -> Problem:
    return supervised(seed, scikit_learn("digits"), build, size, F.cross_entropy)


def image(*layers: nn.Module, side: int = 8) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, side, side)), *layers)


def cnn() -> nn.Module:
    first = nn.Conv2d(1, 16, 3, padding=1), BatchNorm(16), nn.ReLU()
    return image(*first, nn.Conv2d(16, 32, 3, 2, 1), BatchNorm(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def resnet() -> nn.Module:
    stem = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()
    return image(*stem, Residual(16, 16, 1), Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def autoencoder(seed: int) -> Problem:
    pixels = scikit_learn("digits")[0]
    return supervised(seed, (pixels, pixels), lambda: mlp([64, 96, 8, 96, 64], nn.GELU), 64, F.mse_loss)


def noisy_labels(seed: int) -> Problem:
    """A tenth of the labels wrong, for thousands of steps."""
    pixels, labels = scikit_learn("digits")
    return supervised(seed, (pixels, noise_of_labels(labels, 10, 0.1)), lambda: mlp([64, 24, 10], nn.ReLU), 32, F.cross_entropy)


def ill_conditioned(seed: int) -> Problem:
    """Least squares on polynomials of the patients' measurements, in full batches."""
    inputs, targets = scikit_learn("diabetes")
    features = torch.cat([inputs, inputs**2, inputs**3, (inputs[:, :, None] * inputs[:, None]).flatten(1)], 1)
    return supervised(seed, (features / features.std(0), targets), lambda: nn.Linear(features.shape[1], 1), 10**6, F.mse_loss)


def linear(seed: int) -> Problem:
    """Least squares on the measurements themselves, in small batches."""
    return supervised(seed, scikit_learn("diabetes"), lambda: nn.Linear(10, 1), 16, F.mse_loss)


def tabular(seed: int) -> Problem:
    build = functools.partial(mlp, [30, 64, 64, 2], nn.SiLU)
    return supervised(seed, scikit_learn("breast_cancer"), build, 16, F.cross_entropy)


def half_precision(seed: int) -> Problem:
    problem = digits(seed, lambda: mlp([64, 128, 10], nn.GELU).bfloat16())
    problem.loss = lambda model, batch: F.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])
    return problem


def physics(seed: int) -> Problem:
    """A network that solves -u'' = f on [0, 1] with u = 0 at the ends (Raissi et al. 2019); validation against the solution."""

    def solution(x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x) + 0.3 * torch.sin(4 * torch.pi * x)

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        first = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        force = torch.pi**2 * (torch.sin(torch.pi * x) + 4.8 * torch.sin(4 * torch.pi * x))
        ends = model(torch.tensor([[0.0], [1.0]]))
        return ((second + force) / 50).square().mean() + ends.square().mean()

    generator, grid = Generator().manual_seed(seed), torch.linspace(0, 1, 200)[:, None]

    def measure(model: nn.Module, batch: Batch) -> Tensor:
        return residual(model, grid) if batch == "train" else F.mse_loss(model(grid), solution(grid))

    model = mlp([1, 40, 40, 40, 1], nn.Tanh)
    return Problem(model, lambda: torch.rand(64, 1, generator=generator), residual, "train", "validation", measure)


def reinforcement(seed: int) -> Problem:
    """A policy that steers a mass in the plane to the origin, by REINFORCE with the batch's mean as the baseline."""
    pushes = 0.2 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])

    def episodes(model: nn.Module, generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the actions and costs after them, (steps, episodes)."""
        place, speed = 2 * torch.rand(count, 2, generator=generator) - 1, torch.zeros(count, 2)
        chosen, costs = [], []
        for _ in range(12):
            log_p = model(torch.cat([place, speed], 1)).log_softmax(1)
            action = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            speed = 0.9 * speed + pushes[action[:, 0]]
            place = place + speed
            chosen.append(log_p.gather(1, action)[:, 0])
            costs.append(place.norm(dim=1))
        return torch.stack(chosen), torch.stack(costs)

    def surrogate(model: nn.Module, generator: Generator) -> Tensor:
        log_p, costs = episodes(model, generator, 64)
        ahead = costs.flip(0).cumsum(0).flip(0)
        return (log_p * (ahead - ahead.mean(1, keepdim=True)) / 12).sum(0).mean()

    def measure(model: nn.Module, seed: int) -> Tensor:
        return episodes(model, Generator().manual_seed(seed), 512)[1].mean()

    generator = Generator().manual_seed(seed)
    return Problem(mlp([4, 48, 48, 5], nn.Tanh), lambda: generator, surrogate, 1, 2, measure)


@functools.cache
def pretrained(text: str) -> dict[str, Tensor]:
    """A transformer after 1200 steps on the manual, by AdamW."""
    torch.manual_seed(99)
    problem = language(99, {"manual": manual, "wikitext": wikitext}[text](), lambda: Transformer(64, 2, 48), 48, 16)
    return pretrain(problem, 1200)


@functools.cache
def digits_below_five() -> dict[str, Tensor]:
    pixels, labels = scikit_learn("digits")
    torch.manual_seed(99)
    return pretrain(supervised(99, (pixels[labels < 5], labels[labels < 5]), cnn, 32, F.cross_entropy), 200)


def pretrain(problem: Problem, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model, problem.batch()).backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach().clone() for name, value in problem.model.state_dict().items()}


def shifted_text(seed: int, low_rank: bool = False) -> Problem:
    """The transformer that has read the manual goes on with docstrings."""

    def build() -> nn.Module:
        model = Transformer(64, 2, 48)
        model.load_state_dict(pretrained("manual"))
        if low_rank:
            model.requires_grad_(False)
            for layer in model.layers:
                layer.linear1, layer.linear2 = LoRA(layer.linear1), LoRA(layer.linear2)
                layer.activation_relu_or_gelu = 0  # not torch's fused path, which knows no adapters
        return model

    return language(seed, docstrings(), build, 48, 8)


def new_digits(seed: int) -> Problem:
    """The CNN that knows the digits below five learns those above, with a new head."""
    pixels, labels = scikit_learn("digits")

    def build() -> nn.Module:
        model = cnn()
        kept = {name: value for name, value in digits_below_five().items() if not name.startswith("8.")}
        model.load_state_dict(kept, strict=False)
        return model

    return supervised(seed, (pixels[labels >= 5], labels[labels >= 5]), build, 32, F.cross_entropy)


TASKS: dict[str, Task] = {
    "mlp": Task(lambda seed: digits(seed, lambda: mlp([64, 128, 128, 10], nn.ReLU)), 200),
    "wide mlp": Task(lambda seed: digits(seed, lambda: mlp([64, 512, 10], nn.ReLU)), 150),
    "deep tanh": Task(lambda seed: digits(seed, lambda: mlp([64, *[48] * 9, 10], nn.Tanh)), 300),
    "logistic": Task(lambda seed: digits(seed, lambda: nn.Linear(64, 10)), 300),
    "bf16 mlp": Task(half_precision, 200),
    "cnn": Task(lambda seed: digits(seed, cnn), 150),
    "resnet": Task(lambda seed: digits(seed, resnet), 150),
    "vit": Task(lambda seed: digits(seed, lambda: VisionTransformer(8, 2, 48, 2)), 250),
    "autoencoder": Task(autoencoder, 400),
    "tabular": Task(tabular, 200),
    "linear": Task(linear, 200),
    "ill-conditioned": Task(ill_conditioned, 400),
    "physics": Task(physics, 400, solved=1e-5),
    "reinforcement": Task(reinforcement, 150),
    "transformer": Task(lambda seed: language(seed, manual(), lambda: Transformer(64, 2, 48), 48, 8), 300),
    "tied transformer": Task(lambda seed: language(seed, manual(), lambda: Transformer(64, 2, 48, tied=True), 48, 8), 300),
    "lstm": Task(lambda seed: language(seed, manual(), lambda: LSTM(96), 32, 8), 300),
    "long": Task(noisy_labels, 6000),
    "fine-tuning": Task(shifted_text, 200, fine_tuning=True),
    "lora": Task(functools.partial(shifted_text, low_rank=True), 200, fine_tuning=True),
    "new digits": Task(new_digits, 100, fine_tuning=True),
}

# With --data: MNIST and WikiText-2.
MORE_TASKS: dict[str, Task] = {
    "mnist mlp": Task(lambda seed: supervised(seed, mnist(), lambda: mlp([784, 128, 10], nn.ReLU), 64, F.cross_entropy), 300),
    "mnist vit": Task(lambda seed: supervised(seed, mnist(), lambda: VisionTransformer(28, 7, 48, 2), 32, F.cross_entropy), 300),
    "wikitext transformer": Task(lambda seed: language(seed, wikitext(), lambda: Transformer(80, 2, 64), 64, 8), 300),
    "wikitext fine-tuning": Task(
        lambda seed: language(seed, wikitext(), lambda: loaded(Transformer(64, 2, 48), pretrained("manual")), 48, 8), 200, fine_tuning=True
    ),
}


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model
