"""The demo: `LearnedOptimizer` beside AdamW on two real problems that need no download. Run it with `learned-optim demo`.

`train` is the training loop that any PyTorch user would write, and `make_optimizer` is the only place where the optimizers differ. The
bundled weights were meta-trained on neither problem.

Shapes: `B` examples of a batch, `T` characters, `V` characters in the alphabet.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from .network import OptimizerNetwork
from .optimizer import LearnedOptimizer
from .weights import fingerprint

LEARNED = "LearnedOptimizer"
LEARNED_HORIZON = "LearnedOptimizer, total_steps"
ADAMW_DEFAULT = "AdamW lr=0.001"
# AdamW's grid: name -> (learning rate, whether it falls to zero along a cosine).
ADAMW_GRID = {f"AdamW lr={lr:g}{', cosine' * cosine}": (lr, cosine) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1) for cosine in (False, True)}
OPTIMIZERS = (LEARNED, LEARNED_HORIZON, *ADAMW_GRID)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training problem: a classifier of images (inputs (B, 1, 8, 8), targets (B,)) or of the next character (both (B, T))."""

    steps: int
    batch_size: int
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]  # where batches are drawn from
    train_slice: tuple[Tensor, Tensor]  # the part of it that the final training loss is measured on
    validation: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. Losses are cross-entropies in nats."""

    task: str
    optimizer: str
    seed: int
    losses: list[float]  # of every batch, before its step
    train_loss: float  # at the end, on `Task.train_slice`
    validation_loss: float
    validation_accuracy: float
    ms_per_step: float  # median over the steps: forward, backward and optimizer


class CharTransformer(nn.Module):
    """A causal transformer over characters: 2 layers of width 64."""

    def __init__(self, vocabulary: int, context: int, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        block = functools.partial(nn.TransformerEncoderLayer, width, 4, 4 * width, dropout=0.0, activation="gelu")
        self.layers = nn.ModuleList(block(batch_first=True, norm_first=True) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, text: Tensor) -> Tensor:
        """Args: text (B, T). Returns: logits (B, T, V) of each next character."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.characters(text) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]


def digits() -> Task:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of them for validation, and a small CNN."""
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:360], order[360:]
    train = (images[rest], labels[rest])

    def build() -> nn.Module:
        convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

    return Task(steps=300, batch_size=64, build=build, train=train, train_slice=train, validation=(images[held_out], labels[held_out]))


def text() -> Task:
    """The manual that comes with Python, some 465,000 characters, and a transformer that reads 64 of them.

    The last tenth is for validation. It is easier than the rest, since a twelfth of its windows stands there too, word for word.
    """
    from pydoc_data.topics import topics

    context = 64
    manual = "\n".join(topics.values())
    alphabet = {character: index for index, character in enumerate(sorted(set(manual)))}
    characters = torch.tensor([alphabet[character] for character in manual])
    border = len(characters) * 9 // 10

    def windows(part: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        rows = part.unfold(0, context + 1, stride)
        return rows[:, :-1], rows[:, 1:]

    return Task(
        steps=350,
        batch_size=8,
        build=functools.partial(CharTransformer, len(alphabet), context),
        train=windows(characters[:border], stride=1),
        train_slice=windows(characters[:border], stride=1024),
        validation=windows(characters[border:], stride=context),
    )


DIGITS, TEXT = "digits CNN", "text transformer"
TASKS = {DIGITS: functools.cache(digits), TEXT: functools.cache(text)}


def make_optimizer(
    name: str, params: Iterable[nn.Parameter], steps: int, pretrained: str
) -> tuple[torch.optim.Optimizer, CosineAnnealingLR | None]:
    if name == LEARNED:
        return LearnedOptimizer(params, pretrained), None
    if name == LEARNED_HORIZON:
        return LearnedOptimizer(params, pretrained, total_steps=steps), None
    lr, cosine = ADAMW_GRID[name]
    adamw = torch.optim.AdamW(params, lr=lr)
    return adamw, CosineAnnealingLR(adamw, steps) if cosine else None


def train(task_name: str, optimizer_name: str, seed: int, steps: int, pretrained: str) -> Run:
    """Trains one model. The seed alone decides its initialisation and its batches, so they are the same for every optimizer."""
    task = TASKS[task_name]()
    torch.manual_seed(seed)
    model = task.build()
    optimizer, schedule = make_optimizer(optimizer_name, model.parameters(), steps, pretrained)
    inputs, targets = task.train
    losses, seconds = [], []
    for _ in range(steps):
        batch = torch.randint(len(inputs), (task.batch_size,))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    validation_loss, accuracy = evaluate(model, *task.validation)
    return Run(
        task=task_name,
        optimizer=optimizer_name,
        seed=seed,
        losses=losses,
        train_loss=evaluate(model, *task.train_slice)[0],
        validation_loss=validation_loss,
        validation_accuracy=accuracy,
        ms_per_step=1000 * statistics.median(seconds),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Loss in nats, and the share of targets that the model thinks the likeliest."""
    logits = torch.cat([model(part) for part in torch.split(inputs, 64)])
    return cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).float().mean().item()


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal. The first one tells, once these have ended their present runs; were they to die, the pool
    # would raise errors of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(network: OptimizerNetwork, out: Path, *, seeds: int = 3, workers: int = 2, steps_scale: float = 1.0) -> str:
    """Trains every task with every optimizer and seed, and writes `demo.json`, `summary.json` and `demo.png` into `out`.

    Args:
        network: what `LearnedOptimizer` runs.
        out: a folder that exists.
        seeds: runs of every optimizer on every task; their seeds are 0, 1, ...
        workers: processes, each of one thread; a run belongs to one of them.
        steps_scale: multiplier of every task's steps.

    Returns:
        the report to print.
    """
    from tqdm import tqdm

    start = time.perf_counter()
    steps = {name: max(1, round(steps_scale * task().steps)) for name, task in TASKS.items()}
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
        network.save_pretrained(folder)
        # LearnedOptimizer's runs are the longest, so they come first: no process is left alone with one at the end.
        jobs = [(task, name, seed, steps[task], folder) for name in OPTIMIZERS for task in TASKS for seed in range(seeds)]
        runs = list(tqdm(pool.map(train, *zip(*jobs, strict=True)), total=len(jobs), unit="run", desc="demo"))
    seconds = round(time.perf_counter() - start)
    settings = {"weights": fingerprint(network), "steps": steps, "seeds": seeds, "workers": workers, "threads_per_worker": 1}
    machine = {"torch": torch.__version__, "python": platform.python_version(), "seconds": seconds}
    settings |= machine
    for name, figures in (("demo", {"runs": [asdict(run) for run in runs]}), ("summary", {"tasks": summary(runs)})):
        indent = None if name == "demo" else 1  # what is short is for readers too
        (out / f"{name}.json").write_text(json.dumps({"settings": settings} | _json_value(figures), allow_nan=False, indent=indent) + "\n")
    plot(runs, out / "demo.png")
    return (
        f"{report(runs)}\n\nweights {settings['weights']}, torch {torch.__version__}, Python {settings['python']}; "
        f"{workers} processes of 1 thread; {seconds} s in all\n"
        f"plot: {out / 'demo.png'}\nfigures: {out / 'demo.json'}, {out / 'summary.json'}"
    )


def _json_value(value: Any) -> Any:
    """Floats with 6 digits; None where a run diverged, since JSON knows neither NaN nor infinity."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def select(runs: Sequence[Run], task: str, optimizer: str) -> list[Run]:
    return [run for run in runs if (run.task, run.optimizer) == (task, optimizer)]


def best_adamw(runs: Sequence[Run], task: str) -> str:
    """The member of AdamW's grid with the lowest final training loss, mean over the seeds; one that diverged comes last."""

    def loss(name: str) -> float:
        mean = statistics.fmean(run.train_loss for run in select(runs, task, name))
        return mean if math.isfinite(mean) else math.inf

    return min(ADAMW_GRID, key=loss)


def summary(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Of each task the best AdamW's name, and the figures of the optimizers that are compared: losses as mean and deviation over the seeds
    (None of a single one), and the training loss over that of the best AdamW (None where that is zero)."""
    found = {}
    for task in TASKS:
        best = best_adamw(runs, task)
        reference = statistics.fmean(run.train_loss for run in select(runs, task, best))
        optimizers = {}
        for name in dict.fromkeys((LEARNED, LEARNED_HORIZON, ADAMW_DEFAULT, best)):
            mine = select(runs, task, name)
            train_losses = [run.train_loss for run in mine]
            optimizers[name] = {
                "train": _spread(train_losses),
                "validation": _spread([run.validation_loss for run in mine]),
                "accuracy": statistics.fmean(run.validation_accuracy for run in mine),
                "ms_per_step": statistics.median(run.ms_per_step for run in mine),
                "over_best": statistics.fmean(train_losses) / reference if reference > 0 else None,
            }
        found[task] = {"best": best, "optimizers": optimizers}
    return found


def report(runs: Sequence[Run]) -> str:
    """A table with a row per task and optimizer, how to read it, and a line per task with its outcome."""
    rows = [("task", "optimizer", "training loss", "validation loss", "accuracy", "ms/step", "loss / best AdamW")]
    outcomes = []
    for task, found in summary(runs).items():
        best, optimizers = found["best"], found["optimizers"]
        loss = {name: figures["train"]["mean"] for name, figures in optimizers.items()}
        for name, figures in optimizers.items():
            rows.append(
                (
                    task,
                    name + (f" (best of {len(ADAMW_GRID)})" if name == best else " (default)" if name == ADAMW_DEFAULT else ""),
                    _plus_minus(figures["train"]),
                    _plus_minus(figures["validation"]),
                    f"{figures['accuracy']:.1%}",
                    f"{figures['ms_per_step']:.1f}",
                    _times(figures["over_best"]),
                )
            )
        outcomes.append(
            f"{task}: {LEARNED} {loss[LEARNED]:#.3g} vs AdamW(1e-3) {loss[ADAMW_DEFAULT]:#.3g}, "
            f"best AdamW of {len(ADAMW_GRID)} {loss[best]:#.3g} ({_times(optimizers[LEARNED]['over_best'])})"
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    legend = (
        "Losses: cross-entropy in nats after the last step, mean ± standard deviation over the seeds; the training loss on a fixed\n"
        "part of the training data. The best AdamW of 5 learning rates (0.001 to 0.1), each constant and with a cosine to zero, was\n"
        "chosen by this very loss, which is optimistic for AdamW. Above 1x, AdamW is ahead. Accuracy: on the validation data.\n"
        "ms/step: a whole training step, forward and backward included."
    )
    return "\n".join([*lines, "", legend, "", *outcomes])


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def _plus_minus(spread: dict[str, float | None]) -> str:
    return f"{spread['mean']:#.3g}" + ("" if spread["deviation"] is None else f" ± {spread['deviation']:#.2g}")


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training loss against steps, a panel per task: median and range over the seeds of a running mean over 5% of the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.supylabel("training loss (nats)", fontsize="medium")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        best = best_adamw(runs, task)
        # Colours of Okabe & Ito (2008), which colour-blind readers can tell apart.
        styles = {
            LEARNED: ("#D55E00", "-", "LearnedOptimizer, no settings"),
            LEARNED_HORIZON: ("#D55E00", "--", "LearnedOptimizer, total_steps"),
            ADAMW_DEFAULT: ("#666666", "-", "AdamW, default (lr=0.001)"),
            best: ("#0072B2", "-", f"{best} (best of {len(ADAMW_GRID)})"),
        }
        for name, (colour, line, label) in styles.items():
            curves = torch.tensor([run.losses for run in select(runs, task, name)])  # (seeds, steps)
            window = max(1, curves.shape[1] // 20)
            smooth = curves.unfold(1, window, 1).mean(-1)
            low, middle, high = (smooth.quantile(q, dim=0).numpy() for q in (0.0, 0.5, 1.0))
            steps = range(window, curves.shape[1] + 1)
            axes.plot(steps, middle, color=colour, linestyle=line, label=label, linewidth=1.8)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=task, xlabel="step", yscale="log" if task == DIGITS else "linear")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", frameon=False)
    figure.savefig(path)
