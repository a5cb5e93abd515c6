"""The families of small tasks that the bundled weights are meta-trained on. Synthetic, or Python's own source text: nothing to download.

Each family samples an architecture and data for it. Families: classification by an MLP, regression (smooth, linear and ill-conditioned),
images for a CNN and an autoencoder, and text for a recurrent net and a transformer.

Shapes: `B` examples of a batch, `T` characters, `D` features.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .tasks import Batch, Family, ModuleTask, Task

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)


def choose(generator: Generator, options: Sequence[Any]) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]


def sampler(inputs: Tensor, targets: Tensor, size: int) -> Callable[[Generator], Batch]:
    """Draws batches of `size` examples with replacement."""

    def sample(generator: Generator) -> Batch:
        index = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[index], targets[index]

    return sample


def mlp_module(sizes: Sequence[int], activation: Callable[[], nn.Module], norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.LayerNorm(fan_out)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


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
    return ModuleTask(
        lambda: mlp_module(sizes, activation, norm), sampler(inputs, targets, choose(generator, (16, 32, 64))), F.cross_entropy
    )


def regression(generator: Generator) -> Task:
    """A smooth function fitted by an MLP, or an ill-conditioned linear problem; in full batches half of the time."""
    features = choose(generator, (2, 4, 16))
    linear = choose(generator, (False, False, True))
    inputs = torch.randn(256, features, generator=generator)
    noise = choose(generator, (0.0, 0.05))
    if linear:
        inputs = inputs * torch.logspace(0, -choose(generator, (0.0, 0.5, 1.0, 1.5)), features)
        targets = inputs @ torch.randn(features, 1, generator=generator)
        sizes = [features, 1]
    else:
        frequency = torch.randn(features, 4, generator=generator) / math.sqrt(features)
        targets = torch.sin(2 * inputs @ frequency + torch.randn(4, generator=generator)).sum(1, keepdim=True)
        sizes = [features, *[choose(generator, (16, 32))] * choose(generator, (1, 2, 3)), 1]
    targets = (targets - targets.mean()) / targets.std() + noise * torch.randn(targets.shape, generator=generator)
    activation = choose(generator, (nn.Tanh, nn.GELU, nn.SiLU))
    full_batch = choose(generator, (False, True))
    sample = (lambda _: (inputs, targets)) if full_batch else sampler(inputs, targets, 32)
    return ModuleTask(lambda: mlp_module(sizes, activation), sample, F.mse_loss)


def synthetic_images(generator: Generator, size: int, channels: int, classes: int) -> tuple[Tensor, Tensor]:
    """Smooth random patterns, one a class, shifted, scaled in contrast and noisy: (1024, channels, size, size) and labels (1024,)."""
    coarse = torch.randn(classes, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    labels = torch.randint(classes, (1024,), generator=generator)
    shift = torch.randint(-2, 3, (1024, 2), generator=generator).tolist()
    images = torch.stack([patterns[label].roll(tuple(by), dims=(1, 2)) for label, by in zip(labels.tolist(), shift, strict=True)])
    contrast = torch.exp(0.3 * torch.randn(1024, 1, 1, 1, generator=generator))
    return images * contrast + choose(generator, (0.3, 0.8)) * torch.randn(images.shape, generator=generator), labels


def cnn(generator: Generator) -> Task:
    """Classification of small images by a convolutional net, with or without BatchNorm."""
    channels, classes, width = choose(generator, (1, 3)), choose(generator, (5, 10)), choose(generator, (8, 12))
    images, labels = synthetic_images(generator, 8, channels, classes)
    activation, norm = choose(generator, ACTIVATIONS[:2]), choose(generator, (False, True))

    def build() -> nn.Module:
        def block(fan_in: int, fan_out: int) -> list[nn.Module]:
            batch_norm = [nn.BatchNorm2d(fan_out, track_running_stats=False)] if norm else []
            return [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), *batch_norm, activation()]

        return nn.Sequential(*block(channels, width), *block(width, 2 * width), nn.Flatten(), nn.Linear(8 * width, classes))

    return ModuleTask(build, sampler(images, labels, choose(generator, (16, 32))), F.cross_entropy)


def autoencoder(generator: Generator) -> Task:
    """Reconstruction of small images through a bottleneck."""
    images, _ = synthetic_images(generator, 8, 1, 10)
    images = images.flatten(1)
    hidden, code = choose(generator, (24, 48)), choose(generator, (4, 8))
    activation = choose(generator, ACTIVATIONS)
    return ModuleTask(lambda: mlp_module([64, hidden, code, hidden, 64], activation), sampler(images, images, 32), F.mse_loss)


@functools.cache
def source_text() -> Tensor:
    """Python's own source code as character indices below 96, shape (characters,): a text that every machine has."""
    modules = ("argparse", "ast", "inspect", "pathlib", "tarfile", "typing", "unittest.mock", "zipfile")
    origins = [spec.origin for name in modules if (spec := importlib.util.find_spec(name)) and spec.origin]
    text = b"".join(Path(origin).read_bytes() for origin in origins)
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    codes = torch.where(codes == ord("\n"), 127, codes)
    return (codes[(codes >= 32) & (codes < 128)] - 32).clone()


def text_sampler(generator: Generator, length: int, size: int) -> Callable[[Generator], Batch]:
    """Draws `size` windows of `length` characters and their successors from a random part of the text."""
    text = source_text()
    part = min(len(text) - 1, 60_000)
    start = int(torch.randint(len(text) - part, (), generator=generator))
    text = text[start : start + part]

    def sample(generator: Generator) -> Batch:
        index = torch.randint(len(text) - length - 1, (size, 1), generator=generator) + torch.arange(length + 1)
        window = text[index]
        return window[:, :-1], window[:, 1:]

    return sample


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TextModel(nn.Module):
    """Embedding, a stack of blocks and a read-out, which may be tied to the embedding."""

    def __init__(self, width: int, blocks: Sequence[nn.Module], positions: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, width)
        nn.init.normal_(self.embedding.weight, std=0.02 if tied else 0.3)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width)) if positions else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 96, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class Block(nn.Module):
    """A pre-norm transformer block; attention is spelled out because fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(size, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.mT / math.sqrt(width // self.heads)).masked_fill(future, -1e9)
        x = x + self.project((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


class Recurrence(nn.Module):
    """A gated recurrent layer (minimal GRU), spelled out so that it can be vmapped and differentiated twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, outputs = torch.zeros_like(x[:, 0]), []
        for projected in self.input(x).unbind(1):
            update, candidate = projected.chunk(2, -1)
            recurrent_update, recurrent_candidate = self.recurrent(hidden).chunk(2, -1)
            gate = torch.sigmoid(update + recurrent_update)
            hidden = hidden + gate * (torch.tanh(candidate + recurrent_candidate) - hidden)
            outputs.append(hidden)
        return torch.stack(outputs, 1)


def transformer(generator: Generator) -> Task:
    """Next-character prediction by a small transformer."""
    width, depth, length = choose(generator, (16, 24, 32)), choose(generator, (1, 2)), choose(generator, (12, 16))
    tied = choose(generator, (False, True))

    def build() -> nn.Module:
        return TextModel(width, [Block(width, 4) for _ in range(depth)], length, tied)

    return ModuleTask(build, text_sampler(generator, length, choose(generator, (8, 16))), token_loss)


def recurrent(generator: Generator) -> Task:
    """Next-character prediction by a small recurrent net."""
    width, length = choose(generator, (16, 24, 32)), choose(generator, (8, 12))
    tied = choose(generator, (False, True))
    return ModuleTask(
        lambda: TextModel(width, [Recurrence(width)], 0, tied), text_sampler(generator, length, choose(generator, (8, 16))), token_loss
    )


FAMILIES: dict[str, Family] = {
    "mlp": mlp,
    "regression": regression,
    "cnn": cnn,
    "autoencoder": autoencoder,
    "transformer": transformer,
    "recurrent": recurrent,
}
