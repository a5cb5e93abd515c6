"""Kinds of problem that optimizer weights are specialised for: many small fits, a model that is trained anew each day, and a pretrained
model that is fine-tuned on one small data set after another."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta_train import ModuleTask

sys.path.append(str(Path(__file__).parents[1] / "quality"))

from pretrained_tasks.documentation import MODULES, docstrings
from pretrained_tasks.minilm import NAMES, adapted, frozen, minilm, summary, tokens


def curves(generator: Generator) -> ModuleTask:
    """Many small fits: a net for eight waves of random heights and frequencies."""
    x = torch.linspace(-3, 3, 128)[:, None]
    y = (torch.randn(8, generator=generator) * torch.sin(4 * x * torch.rand(8, generator=generator))).sum(1, keepdim=True)
    return ModuleTask(lambda: nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)), [(x, y / y.std())], nn.MSELoss())


def digits(generator: Generator) -> ModuleTask:
    """A convolutional net that is trained anew on each day's images: scanned at another angle, size and contrast, with noise."""
    images, labels = all_digits()
    angle, size, contrast = (low + (high - low) * torch.rand((), generator=generator) for low, high in ((-0.6, 0.6), (0.8, 1.3), (0.4, 1)))
    turn = size * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    grid = nn.functional.affine_grid(torch.cat([turn, torch.zeros(2, 1)], 1)[None], [1, 1, 8, 8], align_corners=False)
    chosen = torch.randperm(len(images), generator=generator)[:800]
    seen = nn.functional.grid_sample(images[chosen], grid.expand(len(chosen), 8, 8, 2), align_corners=False)
    seen = contrast * seen + 0.2 * torch.randn(seen.shape, generator=generator)

    def build() -> nn.Module:
        layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))

    train, validation = sampler((seen[:500],), labels[chosen[:500]], 32), sampler((seen[500:],), labels[chosen[500:]], 32)
    return ModuleTask(build, train, nn.functional.cross_entropy, validation)


@functools.cache
def all_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


# The third kind: texts of a class for training and for validation, classes of a problem, tokens of a text, and examples of a batch.
TRAINING, VALIDATION, CLASSES, LENGTH, BATCH = 32, 16, 4, 16, 8


def sentences(generator: Generator) -> ModuleTask:
    """LoRA at MiniLM's last layer, with a new read-out, for one small set of texts after another: which of four modules, drawn from all,
    does a docstring's summary belong to?"""
    hidden, real, module, layer = all_summaries()
    chosen = torch.randperm(int(module.max()) + 1, generator=generator)[:CLASSES]
    texts = [(module == one).nonzero()[:, 0] for one in chosen]
    texts = [found[torch.randperm(len(found), generator=generator)[: TRAINING + VALIDATION]] for found in texts]
    labels = torch.arange(CLASSES)

    def part(begin: int, end: int) -> Callable[[Generator], tuple[Tensor, ...]]:
        rows, targets = torch.cat([found[begin:end] for found in texts]), labels.repeat_interleave(end - begin)
        return sampler((hidden[rows], real[rows]), targets, BATCH)

    train, validation = part(0, TRAINING), part(TRAINING, TRAINING + VALIDATION)
    return ModuleTask(lambda: Summaries(layer), train, nn.functional.cross_entropy, validation)


class Summaries(nn.Module):
    """The rest of a sentence encoder, (B, T, 384) and which tokens are no padding, (B, T) -> (B, CLASSES)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = adapted(copy.deepcopy(layer))
        self.head = nn.Linear(384, CLASSES)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        hidden = self.layer(hidden, (real - 1)[:, None, None] * 1e9)
        return self.head((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True))


@functools.cache
def all_summaries() -> tuple[Tensor, Tensor, Tensor, nn.Module]:
    """What enters MiniLM's last layer for each summary, (S, T, 384), which tokens are no padding, (S, T), the number of its module, (S,);
    and that layer. What is frozen below it is computed once."""
    found = [docstrings(package + module) for package, modules in MODULES.items() for module in modules]
    found = [list(dict.fromkeys(NAMES.sub("", summary(text)) for text in texts)) for texts in found]
    found = [texts for texts in found if len(texts) >= TRAINING + VALIDATION]
    text = tokens([text for texts in found for text in texts], LENGTH)
    encoder, real = frozen(minilm()).eval(), (text != 0).float()
    batches = zip(text.split(64), real.split(64), strict=True)
    with torch.no_grad():
        parts = [encoder(ids, mask, output_hidden_states=True).hidden_states[-2] for ids, mask in batches]
    modules = torch.repeat_interleave(torch.tensor([len(texts) for texts in found]))
    return torch.cat(parts), real, modules, encoder.encoder.layer[-1]


def sampler(inputs: tuple[Tensor, ...], targets: Tensor, batch: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    def draw(generator: Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(targets), (batch,), generator=generator)
        return *(each[rows] for each in inputs), targets[rows]

    return draw


KINDS = {"curves": (curves, 100), "digits": (digits, 100), "sentences": (sentences, 16)}  # and the steps of a training run
