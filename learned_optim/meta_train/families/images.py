"""Families of image models on synthetic images: convolutional nets, vision transformers and autoencoders."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import Task
from .sampling import ACTIVATIONS, choose, mlp_module, supervised
from .text import Block


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
    """Classification by a convolutional net, with or without BatchNorm."""
    channels, classes, width = choose(generator, (1, 3)), choose(generator, (5, 10)), choose(generator, (8, 12))
    images, labels = synthetic_images(generator, 8, channels, classes)
    activation, norm = choose(generator, ACTIVATIONS[:2]), choose(generator, (False, True))

    def build() -> nn.Module:
        def block(fan_in: int, fan_out: int) -> list[nn.Module]:
            return [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), *([nn.BatchNorm2d(fan_out)] if norm else []), activation()]

        return nn.Sequential(*block(channels, width), *block(width, 2 * width), nn.Flatten(), nn.Linear(8 * width, classes))

    return supervised(build, images, labels, choose(generator, (16, 32)), F.cross_entropy)


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, blocks with attention in both directions, and a read-out of their mean."""

    def __init__(self, channels: int, size: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn((size // 2) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.blocks(hidden).mean(1))
        return logits


def vision_transformer(generator: Generator) -> Task:
    """Classification by a small vision transformer."""
    channels, classes, width = choose(generator, (1, 3)), choose(generator, (5, 10)), choose(generator, (16, 24))
    images, labels = synthetic_images(generator, 8, channels, classes)
    depth = choose(generator, (1, 2))
    return supervised(
        lambda: VisionTransformer(channels, 8, width, depth, classes), images, labels, choose(generator, (16, 32)), F.cross_entropy
    )


def autoencoder(generator: Generator) -> Task:
    """Reconstruction through a bottleneck."""
    images, _ = synthetic_images(generator, 8, 1, 10)
    images = images.flatten(1)
    hidden, code = choose(generator, (24, 48)), choose(generator, (4, 8))
    activation = choose(generator, ACTIVATIONS)
    return supervised(lambda: mlp_module([64, hidden, code, hidden, 64], activation), images, images, 32, F.mse_loss)
