"""A family of fine-tuning tasks: a small model that was trained on one problem goes on with a related one."""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import Buffers, ModuleTask, Params, Task, draw_seed
from .images import synthetic_images
from .sampling import choose, mlp_module, supervised
from .text import Block, TextModel, source_text, token_loss, windows

PRETRAINING_STEPS = 300


class Pretrained(ModuleTask):
    """A task whose optimizees start from given parameters, a new head (the parameters under these prefixes) excepted."""

    def __init__(self, task: ModuleTask, start: Params, new: tuple[str, ...]) -> None:
        super().__init__(task.build, task.batch, task.criterion, task.validation_batch)
        self.start = {name: param for name, param in start.items() if not name.startswith(new)}

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        fresh, buffers = super().init(generator)
        return fresh | {name: param.clone() for name, param in self.start.items()}, buffers


def pretrain(task: ModuleTask, generator: Generator) -> Params:
    """Parameters after a few hundred steps of AdamW with a cosine to zero."""
    params, buffers = task.init(generator)
    leaves = {name: nn.Parameter(param) for name, param in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        optimizer.zero_grad()
        loss, buffers = task.loss({**leaves}, buffers, task.batch(generator))
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: param.detach() for name, param in leaves.items()}


def fine_tuning(generator: Generator) -> Task:
    """A transformer on text in other characters, or an image classifier that meets new classes with a new head."""
    return pretrained_task(draw_seed(generator))


@functools.lru_cache(maxsize=32)  # a resumed run, and each replica, begins with the same task
def pretrained_task(seed: int) -> Task:
    generator = Generator().manual_seed(seed)
    if choose(generator, (False, True)):
        return shifted_text(generator)
    return new_classes(generator)


def shifted_text(generator: Generator) -> Task:
    """Text whose characters are partly exchanged, as another language with the same alphabet would have them."""
    width, length = choose(generator, (16, 24)), 16
    text = source_text()
    start = int(torch.randint(len(text) - 80_000, (), generator=generator))
    exchanged = torch.randperm(96, generator=generator)
    table = torch.where(torch.rand(96, generator=generator) < choose(generator, (0.05, 0.2)), exchanged, torch.arange(96))
    before, after = text[start : start + 40_000], table[text[start + 40_000 : start + 80_000]]

    def build() -> nn.Module:
        return TextModel(width, [Block(width, 4) for _ in range(2)], length, tied=False)

    pretrained = pretrain(ModuleTask(build, windows(before, length, 16), token_loss), generator)
    task = ModuleTask(build, windows(after[:35_000], length, 8), token_loss, windows(after[35_000:], length, 8))
    return Pretrained(task, pretrained, new=())


def new_classes(generator: Generator) -> Task:
    classes, width = choose(generator, (5, 10)), choose(generator, (32, 64))
    activation = choose(generator, (nn.ReLU, nn.GELU))

    def task() -> ModuleTask:
        images, labels = synthetic_images(generator, 8, 1, classes)
        # The same few directions matter in both problems, as edges do in all natural images.
        flat: Tensor = images.flatten(1) @ shared
        return supervised(lambda: mlp_module([64, width, width, classes], activation), flat, labels, 16, F.cross_entropy)

    shared = torch.randn(64, 12, generator=generator) @ torch.randn(12, 64, generator=generator) / 12
    first = task()
    return Pretrained(task(), pretrain(first, generator), new=("4.",))
