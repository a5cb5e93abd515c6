"""The tasks of the few-shot example: sinusoids, digits, a made-up alphabet and Omniglot, the small net that learns
them, and one that reads them.

Shapes: `R` tasks; `S` examples to learn from, `Q` to be judged on, laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.families.text import Block

WAYS, QUERIES = 5, 3  # classes of a task, and pictures of each to be judged on
SHOTS, POINTS = 10, 20  # of a sinusoid: to learn from, and in all
SIZE = 8  # pixels of a letter, each way

Draw = Callable[[Generator], tuple[Tensor, Tensor, int]]  # inputs (S + Q, inputs), answers (S + Q, ...), S


def sinusoid(generator: Generator) -> tuple[Tensor, Tensor, int]:
    """Heights in [0.1, 5], phases in [0, pi], x in [-5, 5] (Finn et al. 2017, section 5.1)."""
    height, phase, *x = torch.rand(2 + POINTS, generator=generator)
    x = 10 * torch.stack(x)[:, None] - 5
    return x / 5, (0.1 + 4.9 * height) * torch.sin(x - math.pi * phase), SHOTS


def pictures(images: Tensor) -> Draw:
    """Tasks that tell WAYS classes apart by one picture of each; images (classes, samples, pixels)."""

    def draw(generator: Generator) -> tuple[Tensor, Tensor, int]:
        chosen = torch.randperm(len(images), generator=generator)[:WAYS]
        picks = torch.stack([torch.randperm(images.shape[1], generator=generator)[: 1 + QUERIES] for _ in range(WAYS)], 1)
        # Shuffled, lest whoever reads them in turn knows the answers from their places.
        order = torch.cat([torch.randperm(WAYS, generator=generator), WAYS + torch.randperm(WAYS * QUERIES, generator=generator)])
        return images[chosen, picks].flatten(0, 1)[order], torch.arange(WAYS).repeat(1 + QUERIES)[order], WAYS

    return draw


def turned(images: Tensor) -> Tensor:
    """Each class of images (classes, samples, height, width) in eight orientations, which are classes of their own; pixels flat."""
    return torch.cat([torch.rot90(side, turn, (2, 3)) for side in (images, images.flip(3)) for turn in range(4)]).flatten(2)


def digits() -> tuple[Draw, Draw]:
    """Digits 0 to 4, turned and mirrored, and letters for meta-training; 5 to 9 as they are for testing."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    by_class = torch.stack([images[labels == digit][:170] for digit in range(10)])
    known, letters = pictures(turned(by_class[:5])), alphabet()[0]

    def either(generator: Generator) -> tuple[Tensor, Tensor, int]:
        return (known if torch.rand((), generator=generator) < 0.5 else letters)(generator)

    return either, pictures(by_class[5:].flatten(2))


def alphabet(letters: int = 200, samples: int = 20) -> tuple[Draw, Draw]:
    """Letters of three curved strokes with random control points, which wobble from sample to sample; no letter is in both parts."""
    generator = Generator().manual_seed(0)
    points = 0.15 + 0.7 * torch.rand(letters, 1, 3, 3, 2, generator=generator)  # strokes, control points, x and y
    points = points + 0.05 * torch.randn(letters, samples, 3, 3, 2, generator=generator)
    points = points + 0.05 * torch.randn(letters, samples, 1, 1, 2, generator=generator)
    t = torch.linspace(0, 1, 12)[:, None]
    curve = ((1 - t) ** 2 * points[..., :1, :] + 2 * t * (1 - t) * points[..., 1:2, :] + t**2 * points[..., 2:, :]).flatten(2, 3)
    pixels = (torch.arange(SIZE) + 0.5) / SIZE
    ink = torch.exp(-0.5 * ((curve[..., None] - pixels) / 0.07).square())  # (letters, samples, points, x and y, SIZE)
    images = 2 * (ink[..., 0, :, None] * ink[..., 1, None, :]).amax(2).flatten(2) - 1
    return pictures(images[: letters // 2]), pictures(images[letters // 2 :])


def omniglot(folder: Path) -> tuple[Draw, Draw]:
    """Lake et al. 2015: images_background, turned and mirrored, for meta-training; images_evaluation for testing."""
    from matplotlib.image import imread

    def read(part: str) -> Tensor:
        characters = sorted((folder / part).glob("*/*/"))
        images = [
            [torch.tensor(imread(file)).reshape(105, 105, -1)[None, ..., 0] for file in sorted(one.glob("*.png"))] for one in characters
        ]
        return 1 - 2 * torch.stack([F.adaptive_avg_pool2d(torch.stack(each), 14).squeeze(1) for each in images])

    return pictures(turned(read("images_background"))), pictures(read("images_evaluation").flatten(2))


class Learner(nn.Module):
    """A task, drawn with torch's global generator, and the net that learns it.

    Its output is its loss, in training on the examples, else on the others, of which it notes squared error or accuracy as the score.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        x, y, self.examples = draw(Generator().manual_seed(int(torch.randint(2**31, ()))))
        outputs = 1 if y.is_floating_point() else WAYS
        self.net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))
        for name, value in {"x": x, "y": y, "score": torch.zeros(())}.items():
            self.register_buffer(name, value)

    def forward(self, _: Tensor) -> Tensor:
        part = slice(None, self.examples) if self.training else slice(self.examples, None)
        outputs, answers = self.net(self.x[part]), self.y[part]
        self.score.copy_(score(outputs, answers).mean().detach())
        return criterion(outputs, answers)


def criterion(outputs: Tensor, answers: Tensor) -> Tensor:
    return F.mse_loss(outputs, answers) if answers.is_floating_point() else F.cross_entropy(outputs, answers)


def score(outputs: Tensor, answers: Tensor) -> Tensor:
    """Of each answer: its squared error, or 1 if it is right."""
    return (outputs - answers).square() if answers.is_floating_point() else (outputs.argmax(-1) == answers).float()


def task(draw: Draw) -> ModuleTask:
    return ModuleTask(lambda: Learner(draw), lambda generator: (torch.zeros(()), torch.zeros(())), lambda loss, _: loss)


class Reader(nn.Module):
    """Reads a task as a sequence, the examples with their answers first, and attends to what came before."""

    def __init__(self, inputs: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))
        self.answer, self.head = nn.Linear(outputs, width), nn.Linear(width, outputs)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))

    def forward(self, x: Tensor, answers: Tensor) -> Tensor:
        """(R, S + Q, inputs), (R, S, outputs) -> (R, Q, outputs)."""
        sequence = self.embed(x) + F.pad(self.answer(answers), (0, 0, 0, x.shape[1] - answers.shape[1]))
        return self.head(self.blocks(sequence)[:, answers.shape[1] :])


def read(reader: Reader, draw: Draw, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """The reader's outputs for `count` tasks, (R Q, outputs), and the answers."""
    generator = Generator().manual_seed(seed)
    inputs, answers, (examples, *_) = zip(*(draw(generator) for _ in range(count)), strict=True)
    x, y = torch.stack(inputs), torch.stack(answers)
    shown = y if y.is_floating_point() else F.one_hot(y, WAYS).float()
    return reader(x, shown[:, :examples]).flatten(0, 1), y[:, examples:].flatten(0, 1)
