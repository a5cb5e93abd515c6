"""Would it help on my model? `compare` trains a model of yours with `LearnedOptimizer` and with tuned AdamW, and says which is ahead."""

from __future__ import annotations

import copy
import itertools
import json
import math
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from . import speed
from .meta_train.tasks import Batch, Family, ModuleTask, check_problem, sampled
from .meta_train.unroll import derive_seed, moved, seed_all
from .network import OptimizerNetwork, load_network
from .optimizer import LearnedOptimizer
from .report import aligned, count, plain
from .weights import fingerprint

LEARNED, HORIZON = "LearnedOptimizer", "LearnedOptimizer, total_steps"
OURS = (LEARNED, HORIZON)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LADDER = tuple(float(f"{digit}e{exponent}") for exponent in range(-7, 2) for digit in (1, 3))  # where the search may go on
SCHEDULES = ("constant", "cosine")
BATCHES = 8  # that a loss is measured on, the same ones throughout: AdamW's lowest would be luck with easy batches otherwise
FEWEST_STEPS = 20
TRAINING, HELD_OUT = "training loss", "held-out loss"
SOLVED = 1e-3  # of the loss at the start; below it, no optimizer is the better one
LEVEL = 1.05  # a smaller lead is none
COLOURS = {LEARNED: "#D55E00", HORIZON: "#CC79A7", "AdamW": "#0072B2"}  # Okabe & Ito (2008)


@dataclass
class Run:
    """One training run."""

    optimizer: str
    seed: int
    length: float  # in units of the comparison's steps
    curve: list[tuple[float, float]]  # (steps, loss)
    training: float  # mean loss of the last batches that it was trained on
    milliseconds: float | None  # median of an iteration; only of those that were timed in turns


@dataclass
class Row:
    """What a comparison says of one optimizer."""

    optimizer: str
    losses: list[float]  # at the end, of each seed
    training: float  # loss of the last batches that it was trained on, mean over the seeds
    milliseconds: float  # of an iteration: forward, backward and step
    speeds: list[float]  # in steps, of each seed; none for AdamW

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def speed(self) -> float:
        return speed.geometric_mean(self.speeds)


@dataclass
class Comparison:
    """What `compare` found out.

    Args:
        steps: of a training run.
        seeds: how many were run with every optimizer; the figures are of those.
        measure: which loss it is.
        rows: `LearnedOptimizer` without and with `total_steps`, the best AdamW, and AdamW with PyTorch's learning rate.
        grid: AdamW's settings -> loss at the end, mean over the seeds; infinite where it diverged.
        best: AdamW's best setting.
        runs: all of them, with their curves.
        weights: fingerprint of the optimizer's.
        stopped: whether Ctrl-C ended it early.
    """

    steps: int
    seeds: int
    measure: str
    rows: list[Row]
    grid: dict[str, float]
    best: str
    runs: list[Run]
    weights: str
    stopped: bool = False

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.verdict}"

    def row(self, optimizer: str) -> Row:
        return next(row for row in self.rows if row.optimizer == optimizer)

    def by_clock(self, optimizer: str) -> float:
        """The speed by the clock: the time that AdamW's best setting needs for the same loss, over that which this optimizer took."""
        row = self.row(optimizer)
        return row.speed * self.row(self.best).milliseconds / row.milliseconds

    @property
    def table(self) -> str:
        """The optimizers side by side, and AdamW's grid, as text."""
        held_out = self.measure != TRAINING
        head = [f"{self.steps} steps, {count(self.seeds, 'seed')}", self.measure, "speed in steps", "by the clock", "ms/step"]
        head += [TRAINING] if held_out else []
        cells: list[Sequence[str]] = [head]
        for row in self.rows:
            spread = f" ± {statistics.stdev(row.losses):#.2g}" if len(row.losses) > 1 and math.isfinite(row.loss) else ""
            name = f"{row.optimizer} (best of {len(self.grid)})" if row.optimizer == self.best else row.optimizer
            figures = [f"{row.loss:#.4g}{spread}", "", "", f"{row.milliseconds:.3g}"]
            if row.speeds:
                seeds = f" ({min(row.speeds):.2f} to {max(row.speeds):.2f})" if len(row.speeds) > 1 else ""
                figures[1:3] = f"{row.speed:.2f} x{seeds}", f"{self.by_clock(row.optimizer):.2f} x"
            cells.append((name, *figures, *([f"{row.training:#.4g}"] if held_out else [])))
        rates = sorted({name.split()[1] for name in self.grid}, key=float)
        grid: list[Sequence[str]] = [("AdamW's learning rate", *rates)]
        for shape in SCHEDULES:
            losses = [self.grid.get(_adamw(rate, shape)) for rate in rates]
            grid.append((shape, *("" if loss is None else f"{loss:#.4g}" for loss in losses)))
        legend = (
            "Speed: the steps that the best AdamW needs for the loss where an optimizer ends, over those that it took itself; 1/8 to 4.\n"
            f"All saw the same batches. AdamW warms up over {speed.WARM_UP:.0%} of the steps; the runs that found its best do not count."
        )
        return f"{aligned(cells)}\n\n{legend}\n\n{aligned(grid)}"

    @property
    def verdict(self) -> str:
        """Which is ahead, in a sentence."""
        rate, shape = self.best.split()[1:]
        found = f"{LEARNED} with total_steps: {self._judged(HORIZON)}; without: {self._judged(LEARNED)}; AdamW's best is {rate}, {shape}"
        if self.stopped:
            found += f" (stopped by Ctrl-C: {count(self.seeds, 'seed')} and {len(self.grid)} settings of AdamW so far)"
        elif rate in (ends := self._ends()) and len(self.grid) > len(SCHEDULES):
            found += f", {'the lowest' if rate == ends[0] else 'the highest'} that was tried, so others may be better"
        ours, others = self.row(HORIZON), self.row(self.best)
        if self.measure == HELD_OUT and ours.speed < 1 / LEVEL and ours.training < others.training:
            found += (
                f". With total_steps its training loss is lower, {ours.training:.3g} where AdamW's best has {others.training:.3g}: "
                "it overfits, so try fewer steps or weight decay"
            )
        return f"{found}."

    def _ends(self) -> tuple[str, str]:
        rates = sorted((name.split()[1] for name in self.grid), key=float)
        return rates[0], rates[-1]

    def _judged(self, name: str) -> str:
        row = self.row(name)
        if (lost := sum(not math.isfinite(loss) for loss in row.losses)) == len(row.losses):
            return "diverged"
        diverged = f" (it diverged with {count(lost, 'seed')})" if lost else ""
        clock = self.by_clock(name)
        if min(row.speeds) < 1 < max(row.speeds):
            return f"ahead with some seeds and behind with others, {row.speed:.2f} x in steps, {clock:.2f} x by the clock{diverged}"
        return f"{_lead(row.speed, at_bounds=True)} in steps, {_lead(clock)} by the clock{diverged}"

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them: None where a run diverged."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if row["speeds"]:
                row |= {"speed": self.row(row["optimizer"]).speed, "by_clock": self.by_clock(row["optimizer"])}
        found = {name: getattr(self, name) for name in ("steps", "seeds", "measure", "best", "grid", "weights", "stopped", "verdict")}
        return plain(found | {"rows": rows, "torch": torch.__version__, "runs": [asdict(run) for run in self.runs]})  # type: ignore[no-any-return]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False, indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the losses against steps and against time: the mean over the seeds, and their range.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("the plot needs matplotlib; install it with: pip install matplotlib") from None
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, label, timed in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), (False, True), strict=True):
            others = [name for name in self.grid if name != self.best]
            lowest = math.inf
            for name in (*others, self.best, *OURS):
                curves = [run.curve for run in self.runs if (run.optimizer, run.length) == (name, 1.0) and run.seed < self.seeds]
                points = list(zip(*curves, strict=False))
                scale = self.row(name if name in OURS else self.best).milliseconds / 1000 if timed else 1.0
                steps = [scale * together[0][0] for together in points]
                losses = [[loss for _, loss in together] for together in points]
                means = [statistics.fmean(each) for each in losses]
                lowest = min([lowest, *(loss for each in losses for loss in each if math.isfinite(loss))])
                if name in others:
                    label_of = "AdamW's other settings" if name == others[0] else None
                    axes.plot(steps, means, color="#BBBBBB", linewidth=0.7, label=label_of)
                    continue
                colour = COLOURS.get(name, COLOURS["AdamW"])
                axes.plot(steps, means, color=colour, linewidth=1.8, label=f"{name} (best)" if name == self.best else name)
                axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15, linewidth=0)
            axes.set(xlabel=label, yscale="log" if lowest > 0 else "linear")
            axes.grid(alpha=0.3)
        # What diverged need not fit.
        start = max(run.curve[0][1] for run in self.runs)
        figure.axes[0].set(ylabel=self.measure, ylim=(lowest * 0.9 if lowest > 0 else lowest, start * 1.1 if start > 0 else None))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path)


def compare(
    problem: ModuleTask | Family,
    *,
    steps: int = 300,
    seeds: int = 3,
    pretrained: str | os.PathLike[str] | OptimizerNetwork = "default",
    learning_rates: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    out: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Comparison:
    """Trains a model of yours with `LearnedOptimizer`, without and with `total_steps`, and with AdamW over a grid, and says which is ahead.

    All begin with the same parameters and see the same batches, by seed. The loss is that on eight held-out batches, where the problem has
    validation data, and otherwise on eight of the training data, in evaluation mode. Speed is measured as in the quality benchmark
    (`learned_optim.speed`); AdamW is run for other lengths, too, where that can matter. For the speed by the clock, the optimizers take
    their iterations in turns. Ctrl-C ends it with what is known so far.

    Args:
        problem: what `meta_train` trains on, too: a `learned_optim.meta_train.ModuleTask` (module, data and loss), or a function of a
            `torch.Generator` that makes one, anew for each seed.
        steps: optimizer steps of a training run, at least 20.
        seeds: training runs of each optimizer. AdamW's settings take at least ten runs a seed.
        pretrained: the weights, as for `LearnedOptimizer`.
        learning_rates: AdamW's grid; each is run constant and with a cosine, after a warm-up. By default five from 3e-4 to 3e-2, and
            further ones for as long as the best one is the outermost.
        device: where to train, "cpu" or "cuda". Three copies of the model are there at a time.
        out: a folder for `compare.json` and, where matplotlib is installed, `compare.png`.
        show: print the table and the verdict, and show a progress bar.

    Examples:
        >>> import torch
        >>> from learned_optim import compare
        >>> from learned_optim.meta_train import ModuleTask
        >>> inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> batches = [(inputs, inputs.sin().sum(1, keepdim=True))]
        >>> problem = ModuleTask(lambda: torch.nn.Linear(4, 1), batches, torch.nn.functional.mse_loss)
        >>> result = compare(problem, steps=20, seeds=1, learning_rates=[1e-2], show=False)
        >>> [row.optimizer for row in result.rows][:2]
        ['LearnedOptimizer', 'LearnedOptimizer, total_steps']
        >>> result.row("LearnedOptimizer").loss < result.row(result.best).loss
        True

    Raises:
        ValueError: the problem is none, its loss is not finite at the start, or an argument is out of range.
        KeyboardInterrupt: Ctrl-C, before anything could be compared.
    """
    rates = LEARNING_RATES if learning_rates is None else tuple(sorted(set(map(float, learning_rates))))
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates must be positive numbers, got {learning_rates}")
    for name, value, least in (("steps", steps, FEWEST_STEPS), ("seeds", seeds, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    check_problem(problem)
    network = pretrained if isinstance(pretrained, OptimizerNetwork) else load_network(pretrained)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(problem, steps, network, torch.device(device), show)
    stopped = False
    try:
        with trainer.bar:
            trainer.run(rates, seeds, extend=learning_rates is None)
    except KeyboardInterrupt:
        if not trainer.runs:
            raise
        stopped = True
    result = _summary(trainer.runs, trainer.grid, steps, trainer.measure, fingerprint(network), stopped)
    if show:
        print(result)
    if out is not None:
        (Path(out) / "compare.json").write_text(result.to_json() + "\n", encoding="utf-8")
        try:
            result.plot(Path(out) / "compare.png")
        except ImportError as error:
            print(f"compare.png is left out: {error}", file=sys.stderr)
    return result


class _Trainee:
    """A model with its optimizer, somewhere in its training."""

    def __init__(self, name: str, model: nn.Module, steps: int, network: OptimizerNetwork) -> None:
        self.name, self.model, self.steps = name, model, steps
        params = [param for param in model.parameters() if param.requires_grad]
        self.schedule = None
        if name in OURS:
            self.optimizer: Optimizer = LearnedOptimizer(params, network, total_steps=steps if name == HORIZON else None)
        else:
            rate, shape = name.split()[1:]
            self.optimizer = AdamW(params, lr=float(rate))
            self.schedule = speed.schedule(shape, self.optimizer, steps)
        self.curve: list[tuple[float, float]] = []
        self.losses: list[float] = []  # of all batches, each before its step
        self.seconds: list[float] = []
        self.diverged = False

    def step(self, loss_of: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch) -> float:
        """One iteration, timed. Returns the loss before it."""
        device = next(self.model.parameters()).device
        start = _now(device)
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch)
        loss.backward()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.seconds.append(_now(device) - start)
        return float(loss.detach())


class _Trainer:
    """Runs all trainings, and keeps those that are finished."""

    def __init__(self, problem: ModuleTask | Family, steps: int, network: OptimizerNetwork, device: torch.device, show: bool) -> None:
        self.problem, self.steps, self.network, self.device = problem, steps, network, device
        self.runs: list[Run] = []
        self.grid: list[str] = []  # AdamW's settings
        self.measure = TRAINING
        self.bar = tqdm(desc="compare", unit="step", total=0, leave=False, disable=not show)

    def run(self, rates: Sequence[float], seeds: int, extend: bool) -> None:
        first = _adamw(rates[len(rates) // 2], SCHEDULES[0])
        self.grid = grid = [_adamw(rate, shape) for rate, shape in itertools.product(rates, SCHEDULES)]
        self.bar.total = self.steps * seeds * (len(OURS) + len(grid))
        for seed in range(seeds):
            self.train(seed, [*OURS, first])
            for name in grid:
                if name != first:
                    self.train(seed, [name])
        while extend and (further := self.further(grid)):
            self.bar.total += self.steps * seeds * len(further)
            for seed, name in itertools.product(range(seeds), further):
                self.train(seed, [name])
            grid += further  # once they are complete
        best = self.best(grid)
        # Other lengths of AdamW's training count only where a run of ours ends above or below what they reach.
        longer = sorted(length for length in speed.LENGTHS if length > 1)
        shorter = sorted((length for length in speed.LENGTHS if length < 1), reverse=True)
        for lengths, beyond in ((longer, operator.lt), (shorter, operator.gt)):
            reached = 1.0
            for length in lengths:
                ends = [(speed.final(run.curve), self.end(best, run.seed, reached)) for run in self.runs if run.optimizer in OURS]
                if not any(beyond(end, adamws) for end, adamws in ends):
                    break
                self.bar.total += round(self.steps * length) * seeds
                for seed in range(seeds):
                    self.train(seed, [best], length)
                reached = length

    def further(self, grid: Sequence[str]) -> list[str]:
        """Settings with the next learning rate, where AdamW's best one is the outermost."""
        tried = sorted(float(name.split()[1]) for name in grid)
        best = float(self.best(grid).split()[1])
        beyond = [rate for rate in LADDER if (rate < tried[0] and best == tried[0]) or (rate > tried[-1] and best == tried[-1])]
        rate = (max(beyond) if best == tried[0] else min(beyond)) if beyond else None
        return [] if rate is None else [_adamw(rate, shape) for shape in SCHEDULES]

    def best(self, grid: Sequence[str]) -> str:
        return min(grid, key=lambda name: sum(speed.final(run.curve) for run in self.runs if run.optimizer == name))

    def end(self, name: str, seed: int, length: float) -> float:
        (run,) = (run for run in self.runs if (run.optimizer, run.seed, run.length) == (name, seed, length))
        return speed.final(run.curve)

    def train(self, seed: int, names: Sequence[str], length: float = 1.0) -> None:
        """Trains with some optimizers, which take their iterations in turns."""
        steps = max(FEWEST_STEPS // 8, round(self.steps * length))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            task, model = self.start(seed)
            trainees = [_Trainee(name, copy.deepcopy(model), steps, self.network) for name in names]
            moments = speed.moments(steps)
            generator = Generator()
            draw = task.validation_batch if task.held_out else task.batch
            sample = [moved(draw(generator.manual_seed(derive_seed(seed, "measure", k))), self.device) for k in range(BATCHES)]
            for trainee in trainees:
                trainee.curve.append((0, self.measured(task, trainee.model, sample, seed)))
                if not math.isfinite(start := trainee.curve[0][1]):
                    raise ValueError(f"the loss at the start is {start}, so there is nothing to compare; look at the data and the loss")
            for t in range(steps):
                batch = moved(task.batch(generator.manual_seed(derive_seed(seed, "batch", t))), self.device)
                turn = t % len(trainees)
                for trainee in (*trainees[turn:], *trainees[:turn]):
                    if trainee.diverged:
                        continue
                    seed_all(derive_seed(seed, "step", t), self.device)
                    loss = trainee.step(task.loss_of, batch)
                    trainee.losses.append(loss)
                    trainee.diverged = not math.isfinite(loss)
                    if t + 1 in moments or trainee.diverged:
                        value = loss if trainee.diverged else self.measured(task, trainee.model, sample, seed)
                        trainee.curve.append((t + 1, value))
                self.bar.update(len(trainees))
        for trainee in trainees:
            milliseconds = 1000 * statistics.median(trainee.seconds) if len(trainees) > 1 else None
            last = statistics.fmean(trainee.losses[-max(1, steps * 3 // speed.EVALUATIONS) :])
            self.runs.append(Run(trainee.name, seed, length, trainee.curve, last, milliseconds))

    def start(self, seed: int) -> tuple[ModuleTask, nn.Module]:
        """The problem of a seed, and its model as every optimizer gets it."""
        number = derive_seed(seed, "compare")
        generator = Generator().manual_seed(number)
        task = self.problem if isinstance(self.problem, ModuleTask) else sampled(self.problem, generator, number)
        if not isinstance(task, ModuleTask):
            raise ValueError(f"the problem must make a learned_optim.meta_train.ModuleTask, but returned {type(task).__name__}")
        self.measure = HELD_OUT if task.held_out else TRAINING
        params, buffers = task.init(generator)
        values = params | buffers
        model = task.build()
        with torch.no_grad():
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                tensor.copy_(values[name])
        return task, model.to(self.device).train()

    def measured(self, task: ModuleTask, model: nn.Module, batches: Sequence[Batch], seed: int) -> float:
        """The mean loss on some batches. With gradients, since a model may differentiate in its forward pass."""
        seed_all(seed, self.device)
        model.eval()
        value = statistics.fmean(float(task.loss_of(model, batch).detach()) for batch in batches)
        model.train()
        return value


def _summary(runs: Sequence[Run], settings: Sequence[str], steps: int, measure: str, weights: str, stopped: bool) -> Comparison:
    """Of the seeds with which AdamW's whole grid was run, or where there is none yet, of the first one with what was run."""
    plain = {(run.optimizer, run.seed): run for run in runs if run.length == 1.0}
    tried = [name for name in settings if (name, 0) in plain]
    seeds = max(1, next(seed for seed in itertools.count() if not all((name, seed) in plain for name in settings)))
    grid = {name: statistics.fmean(speed.final(plain[name, seed].curve) for seed in range(seeds)) for name in tried}
    best = min(grid, key=lambda name: grid[name])
    timed = [run for run in runs if run.milliseconds is not None]
    share = -math.inf if any(loss < 0 for run in runs for _, loss in run.curve) else SOLVED  # losses below zero have no floor

    def milliseconds(ours: str | None) -> float:
        """The median over the seeds; AdamW's is that of the one setting that was timed, since all cost the same."""
        return statistics.median(run.milliseconds or 0 for run in timed if (run.optimizer if run.optimizer in OURS else None) == ours)

    def row(name: str, speeds: list[float]) -> Row:
        mine = [plain[name, seed] for seed in range(seeds)]
        took = milliseconds(name if name in OURS else None)
        return Row(name, [speed.final(run.curve) for run in mine], statistics.fmean(run.training for run in mine), took, speeds)

    rows = []
    for name in OURS:
        speeds = []
        for seed in range(seeds):
            mine = plain[name, seed].curve
            reference = speed.envelope([run.curve for run in runs if (run.optimizer, run.seed) == (best, seed)])
            speeds.append(speed.speed(mine, reference, share * mine[0][1]))
        rows.append(row(name, speeds))
    default = _adamw(1e-3, "constant")
    rows += [row(name, []) for name in dict.fromkeys((best, default)) if name in grid]
    return Comparison(steps, seeds, measure, rows, grid, best, list(runs), weights, stopped)


def _adamw(rate: float | str, shape: str) -> str:
    return f"AdamW {float(rate):g} {shape}"


def _now(device: torch.device) -> float:
    """The time once the device has done what it was given, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _lead(value: float, at_bounds: bool = False) -> str:
    if 1 / LEVEL < value < LEVEL:
        return "level"
    most = "at least " if at_bounds and value in speed.BOUNDS else ""
    return f"ahead by {most}{value:.1f} x" if value > 1 else f"behind by {most}{1 / value:.1f} x"
