"""Problems that nobody chose: a distribution that architecture, data, initialisation, loss, batch and length of training are drawn from.

A list of tasks can be fitted, knowingly or not; draws by seed cannot, as long as other seeds are looked at than those chosen on. The
ranges are what people train at, cut to what a core does in seconds.

Shapes: `B` examples of a batch, `D` features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import ModuleTask, Sampler, draw_seed
from .images import VisionTransformer, synthetic_images
from .sampling import ACTIVATIONS, VALIDATION, choose, mlp_module, sampler
from .text import Block, Recurrence, TextModel, source_text, token_loss, windows

COST = 4e9  # floating-point operations of a problem's training, at most
LARGEST = 40_000  # weights of a problem to meta-train on, whose unrolls keep a state for each weight and step
EXAMPLES = 2048
PRETRAINING_STEPS = 1500


@dataclass(frozen=True)
class Drawn:
    """A problem of the distribution."""

    task: ModuleTask
    steps: int
    kind: str  # of model and data, "dense standardised" say
    start: str  # "scratch", "all weights", "new head", "adapters", "last layers"
    batch: int


@dataclass(frozen=True)
class Problem:
    """Data with what reads them: `build` makes a module with fresh parameters."""

    kind: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], tuple[Sampler, Sampler]]  # batches of a size, to train on and for validation
    criterion: Callable[[Tensor, Tensor], Tensor]
    positions: int  # per example at which weights are used


def drawn(generator: Generator, horizon_max: int = 5000, folder: Path | None = None) -> Drawn:
    """Draws a problem.

    Args:
        horizon_max: the longest training, in steps; the shortest are 50.
        folder: where pretrained weights are kept; without it they are made again in every process.
    """
    family = choose(generator, (dense,) * 9 + (images,) * 4 + (text,) * 4 + (reconstruction,) * 2)
    seed = draw_seed(generator)
    steps = log_uniform(generator, 50, horizon_max)
    batch = log_uniform(generator, 1, 512)
    start = choose(generator, ("scratch",) * 6 + ("all weights", "new head", "adapters", "last layers"))
    problem = family(Generator().manual_seed(seed), 0)
    build = initialised(problem.build, choose(generator, ("own",) * 5 + ("0.02", "large", "orthogonal", "zero read-out")))
    if start != "scratch":
        steps, batch = min(steps, 800), max(batch, 4)
        build = started(problem, family(Generator().manual_seed(seed), 1), start, draw_seed(generator), folder)
    used = sum(param.numel() for param in problem.build().parameters()) * problem.positions * 6
    if problem.kind.startswith("dense contrastive"):
        batch = max(batch, 8)
    while used * batch * steps > COST and batch > 16:
        batch //= 2
    steps = max(50, min(steps, int(COST / (used * batch))))
    train, validation = problem.sample(batch)
    return Drawn(ModuleTask(build, train, problem.criterion, validation), steps, problem.kind, start, batch)


def drawn_task(generator: Generator) -> ModuleTask:
    """A family for meta-training: the distribution without its large problems. How long runs are says the meta-training."""
    while True:
        task = drawn(generator, 1000).task
        if sum(shape.numel() for shape in task.shapes.values()) <= LARGEST:
            return task


def log_uniform(generator: Generator, low: int, high: int) -> int:
    return int(round(low * math.pow(high / low, float(torch.rand((), generator=generator)))))  # noqa: RUF046


# Data and models. `turn` is 0 for a problem, and 1 for the related one that a pretrained model learned before.


def dense(generator: Generator, turn: int) -> Problem:
    """Vectors of features, from raw to one-hot, and MLPs of any width and depth, or none."""
    width, features = log_uniform(generator, 8, 1024), log_uniform(generator, 1, 2000)
    depth = choose(generator, (0, 1, 1, 2, 2, 3, 5, 8))
    form = choose(generator, ("standardised", "standardised", "correlated", "raw", "heavy-tailed", "one-hot", "mostly zero"))
    loss = choose(generator, ("classes", "classes", "classes", "squares", "squares", "huber", "binary", "ranking", "contrastive"))
    outputs = {"classes": choose(generator, (2, 5, 10, 100)), "squares": choose(generator, (1, 4)), "contrastive": 16}.get(loss, 1)
    activation, norm = choose(generator, (*ACTIVATIONS, nn.Sigmoid)), choose(generator, ("", "", "layer", "batch"))
    noise, count = choose(generator, (0.0, 0.1, 0.3)), choose(generator, (200, EXAMPLES, EXAMPLES))
    if depth > 3 and not norm:
        norm = "layer"
    if loss == "contrastive" and norm == "batch":
        norm = "layer"

    values = torch.randn(count, features, generator=generator)
    if form == "correlated":
        factors = max(1, features // 8)
        mix = torch.randn(factors, features, generator=generator) * torch.logspace(0, -1.5, factors)[:, None]
        values = values[:, :factors] @ mix + 0.05 * values
        values = (values - values.mean(0)) / (values.std(0) + 1e-6)
    elif form == "raw":
        smooth = values.cumsum(1) / (1 + torch.arange(features)).sqrt()
        values = (128 + 60 * smooth + 20 * values).clamp(0, 255)
    elif form == "heavy-tailed":
        values = values.sign() * (values.abs() * 1.2).exp()
    elif form == "one-hot":
        groups = max(1, features // 12)
        index = torch.randint(features, (count, groups), generator=generator)
        values = torch.zeros(count, features).scatter_(1, index, 1.0)
    elif form == "mostly zero":
        values = values * (torch.rand(values.shape, generator=generator) < 0.05)
    readable = (values - values.mean(0)) / (values.std() + 1e-6)
    teacher = torch.randn(features, 24, generator=generator) / math.sqrt(features)
    hidden = readable @ teacher
    hidden = choose(generator, (torch.tanh, torch.sin, lambda x: x))(2 * hidden)
    scores = [hidden @ torch.randn(24, outputs, generator=generator) for _ in range(2)]
    score = scores[0] if turn == 0 else scores[1]
    score = (score - score.mean(0)) / (score.std(0) + 1e-6)
    scattered = score + noise * torch.randn(score.shape, generator=generator)
    if loss == "classes":
        wrong = torch.rand(count, generator=generator) < noise / 2
        targets = torch.where(wrong, torch.randint(outputs, (count,), generator=generator), score.argmax(1))
    elif loss == "binary":
        targets = (scattered > 0).float()
    else:
        targets = scattered
    if loss == "contrastive":
        scale = values.std() * 0.5
        views = [values + scale * torch.randn(values.shape, generator=generator) for _ in range(2)]
        values, targets = torch.stack(views, 1), torch.zeros(count)
    criteria: dict[str, Callable[..., Tensor]] = {"classes": F.cross_entropy, "squares": F.mse_loss, "huber": F.smooth_l1_loss}
    criteria |= {"binary": F.binary_cross_entropy_with_logits, "ranking": ranking, "contrastive": contrastive}
    criterion = criteria[loss]

    def build() -> nn.Module:
        module = mlp_module([features, *[width] * depth, outputs], activation, norm=bool(norm))
        for place, layer in enumerate(module):
            if isinstance(layer, nn.LayerNorm) and norm == "batch":
                module[place] = nn.BatchNorm1d(width, track_running_stats=False)
        return module

    def sample(size: int) -> tuple[Sampler, Sampler]:
        size = max(size, 4) if norm == "batch" or loss == "ranking" else size
        return split(values, targets, size)

    return Problem(f"dense {loss}, {form}", build, sample, criterion, 2 if loss == "contrastive" else 1)


def ranking(scores: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss of every pair in the wrong order (Burges et al. 2005)."""
    order = (targets - targets.mT).sign()
    return (F.softplus(-order * (scores - scores.mT)) * order.abs()).mean()


def contrastive(codes: Tensor, _: Tensor) -> Tensor:
    """Two views (B, 2, D) of each example find each other (van den Oord et al. 2018)."""
    one, two = F.normalize(codes, dim=-1, eps=1e-6).unbind(1)
    return F.cross_entropy(one @ two.mT / 0.1, torch.arange(len(codes)))


def images(generator: Generator, turn: int) -> Problem:
    channels, classes, size = choose(generator, (1, 3)), choose(generator, (5, 10)), choose(generator, (8, 12))
    width, depth = choose(generator, (8, 16, 32)), choose(generator, (1, 2, 3))
    activation, norm = choose(generator, ACTIVATIONS), choose(generator, ("", "batch"))
    raw, attention = choose(generator, (False, False, True)), choose(generator, (False, True))
    pixels, labels = [synthetic_images(generator, size, channels, classes) for _ in range(2)][turn]
    if raw:
        pixels = (128 + 50 * pixels).clamp(0, 255)

    def build() -> nn.Module:
        if attention:
            return VisionTransformer(channels, size, width, depth, classes)
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in ((channels, width, 1), (width, 2 * width, 2), *[(2 * width, 2 * width, 1)] * (depth - 1)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1)]
            layers += [nn.BatchNorm2d(fan_out, track_running_stats=False)] if norm else []
            layers += [activation()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, classes))

    name = ("vision transformer" if attention else "convolutions") + (", raw" if raw else "")
    return Problem(f"images {name}", build, lambda batch: split(pixels, labels, batch), F.cross_entropy, (size // 2) ** 2)


def text(generator: Generator, turn: int) -> Problem:
    width, depth, length = choose(generator, (16, 32, 64, 96)), choose(generator, (1, 2, 3, 4)), choose(generator, (8, 16, 32))
    tied, recurrent = choose(generator, (False, True)), choose(generator, (False, False, True))
    code = source_text()
    begin = int(torch.randint(len(code) - 80_000, (), generator=generator))
    exchanged = torch.randperm(96, generator=generator)
    changed = torch.where(torch.rand(96, generator=generator) < choose(generator, (0.0, 0.05, 0.3)), exchanged, torch.arange(96))
    part = changed[code[begin : begin + 40_000]] if turn == 0 else code[begin + 40_000 : begin + 80_000]

    def build() -> nn.Module:
        blocks = [Recurrence(width)] if recurrent else [Block(width, 4) for _ in range(depth)]
        return TextModel(width, blocks, 0 if recurrent else length, tied)

    def sample(batch: int) -> tuple[Sampler, Sampler]:
        batch = max(1, batch // 8)
        border = len(part) - len(part) // VALIDATION
        return windows(part[:border], length, batch), windows(part[border:], length, batch)

    name = ("recurrent" if recurrent else "transformer") + (", tied" if tied else "")
    return Problem(f"text {name}", build, sample, token_loss, length // 8 or 1)


def reconstruction(generator: Generator, turn: int) -> Problem:
    size, code = choose(generator, (8, 12)), choose(generator, (4, 16))
    hidden, activation = choose(generator, (32, 128)), choose(generator, ACTIVATIONS)
    raw = choose(generator, (False, False, True))
    pixels = [synthetic_images(generator, size, 1, 10)[0].flatten(1) for _ in range(2)][turn]
    if raw:
        pixels = (128 + 50 * pixels).clamp(0, 255)
    sizes = [size * size, hidden, code, hidden, size * size]
    return Problem(
        "reconstruction" + (", raw" if raw else ""),
        lambda: mlp_module(sizes, activation),
        lambda batch: split(pixels, pixels, batch),
        F.mse_loss,
        1,
    )


def split(inputs: Tensor, targets: Tensor, size: int) -> tuple[Sampler, Sampler]:
    border = len(inputs) - len(inputs) // VALIDATION
    return sampler(inputs[:border], targets[:border], size), sampler(inputs[border:], targets[border:], size)


# Starts


def initialised(build: Callable[[], nn.Module], how: str) -> Callable[[], nn.Module]:
    """The module with other initial weights than torch's."""

    def made() -> nn.Module:
        module = build()
        matrices = [param for param in module.parameters() if param.ndim > 1]
        with torch.no_grad():
            for param in matrices:
                if how == "0.02":
                    param.normal_(std=0.02)
                elif how == "large":
                    param.mul_(3)
                elif how == "orthogonal" and param.ndim == 2:
                    nn.init.orthogonal_(param)
            if how == "zero read-out":
                matrices[-1].zero_()
        return module

    return made


def started(problem: Problem, before: Problem, start: str, seed: int, folder: Path | None) -> Callable[[], nn.Module]:
    """The module as it comes from training on a related problem, with what `start` says to be trained."""

    @functools.cache
    def learned() -> dict[str, Tensor]:
        if folder is None:
            return pretrain(before, seed)
        path = folder / f"{seed}.pt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(pretrain(before, seed), path)
        found: dict[str, Tensor] = torch.load(path, weights_only=True)
        return found

    def build() -> nn.Module:
        module, fresh = problem.build(), problem.build()
        module.load_state_dict(learned())
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        if start == "new head":
            module.get_submodule(linear[-1]).load_state_dict(fresh.get_submodule(linear[-1]).state_dict())
        elif start == "last layers" and len(linear) > 1:
            module.requires_grad_(False)
            for name in linear[-2:]:
                module.get_submodule(name).requires_grad_(True)
        elif start == "adapters":
            module.requires_grad_(False)
            for name in linear:
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, Adapter(module.get_submodule(name)))  # type: ignore[arg-type]
        return module

    return build


class Adapter(nn.Module):
    """A frozen linear layer with a trained correction of low rank (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + 2 * self.up(self.down(x))
        return output


def pretrain(problem: Problem, seed: int) -> dict[str, Tensor]:
    """The weights after AdamW with a cosine to zero, trained to where it gains little more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, generator = problem.build(), Generator().manual_seed(seed)
        sample = problem.sample(32)[0]
        used = sum(param.numel() for param in module.parameters()) * problem.positions * 6 * 32
        steps = min(PRETRAINING_STEPS, max(200, int(2 * COST / used)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                inputs, targets = sample(generator)
                optimizer.zero_grad()
                problem.criterion(module(inputs), targets).backward()
                optimizer.step()
                schedule.step()
        return {name: value.detach() for name, value in module.state_dict().items()}
