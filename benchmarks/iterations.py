"""What does a training iteration cost: forward, backward and step?

    pip install -c constraints.txt -e ".[demo]"
    python benchmarks/iterations.py

An iteration's time is that of forward and backward, which is the same for all optimizers, and of the optimizer's step, on models of the
kinds that people train. They take turns in one process, and medians of rounds are printed. Weights and data are random. They do not matter
here but for the words, of which a batch has nearly as many different ones as word pieces, and but for how weights look: matrices that look
trained are not orthogonalised. Muon is torch's, for the matrices of hidden layers, in fp32 where a processor would have to emulate bf16,
with AdamW for the rest.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("meta_training", "quality"))
from common import COLOURS, new_figure, parser, prepare, save, table
from optimizers import Both
from speed import GPT, seconds

from learned_optim import LearnedOptimizer

BASE, MINE, ADAMW = "forward and backward", "LearnedOptimizer", "AdamW, fused"


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def schedule_free(model: nn.Module) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(trained(model))
    optimizer.train()
    return optimizer


def prodigy(model: nn.Module) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(trained(model))


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    ADAMW: lambda model: torch.optim.AdamW(trained(model), fused=True),
    MINE: lambda model: LearnedOptimizer(trained(model)),
    "Muon": lambda model: Both(model, 1e-3),
    "Schedule-Free": schedule_free,
    "Prodigy": prodigy,
}


class Encoder(nn.Module):
    """A transformer that sees everything and classifies: of words, as MiniLM-L6 has them, or of patches, as ViT-Tiny."""

    def __init__(self, first: nn.Module, length: int, width: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.embed, self.positions = first, nn.Parameter(0.02 * torch.randn(length, width))
        block = functools.partial(nn.TransformerEncoderLayer, width, heads, 4 * width, 0.0, F.gelu, batch_first=True)
        self.blocks, self.out = nn.Sequential(*(block() for _ in range(layers))), nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        if hidden.ndim == 4:  # patches
            hidden = hidden.flatten(2).mT
        return self.out(self.blocks(hidden + self.positions).mean(1))


class Adapted(nn.Module):
    """A frozen layer with factors of rank 8 beside it (LoRA, Hu et al. 2022)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 8, bias=False)
        self.up = nn.Linear(8, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias  # which torch's layers look at

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


def minilm() -> Encoder:
    return Encoder(nn.Embedding(30522, 384), 48, 384, 12, 6, 2)


def minilm_trained() -> Encoder:
    """Its matrices look trained, since some of their directions are much larger than others."""
    model = minilm()
    with torch.no_grad():
        for param in model.blocks.parameters():
            if param.ndim == 2:
                param.mul_(torch.linspace(0, 2, param.shape[1]))
    return model


def minilm_adapted() -> Encoder:
    model = minilm().requires_grad_(False)
    for block in model.blocks:
        block.linear1, block.linear2 = Adapted(block.linear1), Adapted(block.linear2)
    model.out.requires_grad_(True)
    return model


def vision() -> Encoder:
    return Encoder(nn.Conv2d(3, 192, 16, 16), 196, 192, 3, 12, 1000)


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def mlp() -> nn.Module:
    widths = [64] + [72] * 9
    layers = [layer for into, out in itertools.pairwise(widths) for layer in (nn.Linear(into, out), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(72, 10))


def words(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(30522, shape)


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


# Each by what makes its model, its inputs, and the number of classes.
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "MiniLM-L6's shapes, fine-tuned, 16 sentences of 48 word pieces": (minilm_trained, words(16, 48), 2),
    "the same, LoRA of rank 8": (minilm_adapted, words(16, 48), 2),
    "the same, from scratch": (minilm, words(16, 48), 2),
    "GPT, 4,096 characters": (GPT, lambda: torch.randint(96, (16, 256)), 96),
    "GPT, 1,024 characters": (GPT, lambda: torch.randint(96, (4, 256)), 96),
    "ViT-Tiny, 32 images of 224 x 224": (vision, images(32, 3, 224, 224), 1000),
    "CNN, 64 images of 28 x 28": (cnn, images(64, 1, 28, 28), 10),
    "MLP of 20 tensors, 64 examples": (mlp, images(64, 64), 10),
}


def turns(
    model: nn.Module, backward: Callable[[], object], makers: dict[str, Callable[[nn.Module], Optimizer]], rounds: int
) -> dict[str, float]:
    """Median seconds of a forward and backward pass, and of each optimizer's step on a copy of the model, which take turns."""
    backward()
    copies = {name: copy.deepcopy(model) for name in makers}
    optimizers = {name: make(copies[name]) for name, make in makers.items()}
    found: dict[str, list[float]] = {name: [] for name in (BASE, *makers)}
    for counts in [False] * 2 + [True] * rounds:
        durations = {BASE: seconds(backward)}
        for optimizer, copied in copies.items():
            for param, own in zip(trained(copied), trained(model), strict=True):
                param.grad = None if own.grad is None else own.grad.clone()
            durations[optimizer] = seconds(optimizers[optimizer].step)
        if counts:
            for key, duration in durations.items():
                found[key].append(duration)
    return {key: statistics.median(durations) for key, durations in found.items()}


def measure(name: str, rounds: int) -> dict[str, float]:
    make, draw, classes = PROBLEMS[name]
    torch.manual_seed(0)
    model = make()

    def backward() -> None:
        inputs = draw()
        model.zero_grad()
        output = model(inputs)
        F.cross_entropy(output, torch.randint(classes, (len(output),))).backward()

    return turns(model, backward, MAKERS, rounds)


def plot(rows: list[list[Any]]) -> Any:
    """Iterations in units of AdamW's."""
    figure = new_figure(8, 0.5 + 0.7 * len(rows[1:]))
    axes = figure.subplots()
    for k, (optimizer, colour) in enumerate(zip(MAKERS, COLOURS, strict=True)):
        ratios = [row[3 + k] / row[3] for row in rows[1:]]
        axes.barh([place + (k - 2) * 0.16 for place in range(len(ratios))], ratios, 0.16, color=colour, label=optimizer)
    axes.set(yticks=range(len(rows) - 1), yticklabels=[row[0] for row in rows[1:]], xlabel="time of an iteration, AdamW's = 1")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small", loc="center right")
    return figure


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "iterations")
    options.set_defaults(out=Path("runs/iterations"))
    options.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="PROBLEM")
    options.add_argument("--rounds", type=int, default=9)
    arguments = options.parse_args(argv)
    prepare(arguments.threads)
    rows: list[list[Any]] = [["iteration", "weights", f"{BASE}, ms", *(f"{name}, ms" for name in MAKERS), "ours / AdamW"]]
    for name in arguments.problems:
        found = measure(name, arguments.rounds)
        base = found.pop(BASE)
        whole = {optimizer: base + step for optimizer, step in found.items()}
        weights = sum(param.numel() for param in trained(PROBLEMS[name][0]()))
        rows.append([name, weights, 1e3 * base, *(1e3 * one for one in whole.values()), whole[MINE] / whole[ADAMW]])
        print(table([rows[0], rows[-1]]), flush=True)
    print(f"\nWhole training iterations\n{table(rows)}")
    save(arguments.out, arguments.threads, {"iterations": rows}, plot(rows))


if __name__ == "__main__":
    main()
