"""Where does the learned optimizer, untuned, stand on problems that nobody chose?

    python benchmarks/quality/distribution.py --problems 60             # development: rules and weights are chosen on these
    python benchmarks/quality/distribution.py --seeds 106 110 119       # some of them
    python benchmarks/quality/distribution.py --problems 60 --held-out  # other seeds, to publish only
    python benchmarks/quality/distribution.py --problems 60 --only-adamw  # what takes longest, once for all optimizer weights

Problems are drawn by seed (`learned_optim.meta_train.families.drawn`). AdamW is tuned on each: seven learning rates, constant and with a
cosine, with warm-up, and its best setting once more for other lengths of training. *Speed* is the number of steps that it needs for the
loss where ours ends, over the steps that ours took, from an eighth to four. Goes on where it was stopped. AdamW need not be tuned again on
problems of which the runs are committed, once they are unpacked:

    mkdir -p runs/distribution
    xz -dc benchmarks/quality/results/distribution_runs.jsonl.xz > runs/distribution/runs.jsonl

Shapes: `R` settings of AdamW that are trained side by side on the same batches, `N` coordinates of a model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from behaviour import behaviour, is_of
from torch import Generator, Tensor, nn
from torch.func import vmap

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.meta_train.families.drawn import Drawn, drawn
from learned_optim.meta_train.unroll import derive_seed, named
from learned_optim.speed import WARM_UP, envelope, final, geometric_mean, moments
from learned_optim.speed import speed as of_curves
from learned_optim.weights import fingerprint

HELD_OUT = 1_000_000  # seeds from here on are looked at to publish only
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCHEDULES = ("constant", "cosine")
LENGTHS = (0.25, 0.5, 2.0, 4.0)  # of runs with AdamW's best setting, beside 1
EXAMPLES = 256  # that a loss is measured on, at least
SOLVED = 1e-3  # of the loss at the start; below it, no optimizer is the better one
DEFAULT = "0.001 constant"

MODES = {"no settings": False, "total_steps": True}
QUANTILES = {"median": 0.5, "5th percentile": 0.05, "1st": 0.01}
Curve = list[tuple[int, float]]


class Trial:
    """A problem with its initial parameters and its measure."""

    def __init__(self, seed: int, folder: Path | None = None) -> None:
        self.seed = seed
        self.drawn: Drawn = drawn(Generator().manual_seed(seed), folder=folder)
        self.task = self.drawn.task
        generator = Generator().manual_seed(derive_seed(seed, "sample"))
        drawn_batches = [self.task.batch(generator) for _ in range(max(1, math.ceil(EXAMPLES / self.drawn.batch)))]
        self.sample = tuple(torch.cat(parts) for parts in zip(*drawn_batches, strict=True))

    def init(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.task.init(Generator().manual_seed(derive_seed(self.seed, "init")))

    def batch(self, t: int) -> tuple[Tensor, ...]:
        return self.task.batch(Generator().manual_seed(derive_seed(self.seed, "batch", t)))


def adamw(trial: Trial, settings: Sequence[tuple[float, str, int]]) -> list[Curve]:
    """Runs of AdamW, each (learning rate, schedule, steps), side by side."""
    params, buffers = trial.init()
    start = torch.cat([param.flatten() for param in params.values()])
    rows = [nn.Parameter(start.clone()) for _ in settings]
    optimizer = torch.optim.AdamW([{"params": [row], "lr": lr} for row, (lr, _, _) in zip(rows, settings, strict=True)], fused=True)

    def loss(row: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return trial.task.loss(named(trial.task, row), buffers, batch)[0]

    every = vmap(loss, in_dims=(0, None), randomness="same")
    curves: list[Curve] = [[] for _ in settings]
    wanted = [moments(steps) for _, _, steps in settings]
    active = list(range(len(settings)))

    def measure(t: int) -> None:
        due = [place for place, k in enumerate(active) if t == 0 or t in wanted[k]]
        if due:
            with torch.no_grad():
                values = every(torch.stack([rows[active[place]] for place in due]), trial.sample).tolist()
            for place, value in zip(due, values, strict=True):
                curves[active[place]].append((t, float(f"{value:.5g}")))

    measure(0)
    for t in range(max(steps for _, _, steps in settings)):
        active = [k for k in active if t < settings[k][2]]
        for k in active:
            lr, schedule, steps = settings[k]
            warm = min(1.0, (t + 1) / max(1, round(WARM_UP * steps)))
            optimizer.param_groups[k]["lr"] = lr * warm * (0.5 + 0.5 * math.cos(math.pi * t / steps) if schedule == "cosine" else 1.0)
        every(torch.stack([rows[k] for k in active]), trial.batch(t)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        measure(t + 1)
    return curves


def baseline(trial: Trial) -> dict[str, Any]:
    """Tunes AdamW: its grid's final losses, and curves of the best setting for each length of training."""
    steps = trial.drawn.steps
    grid = list(itertools.product(LEARNING_RATES, SCHEDULES))
    curves = adamw(trial, [(lr, schedule, steps) for lr, schedule in grid])
    finals = [final(curve) for curve in curves]
    best = min(range(len(grid)), key=finals.__getitem__)
    lr, schedule = grid[best]
    others = adamw(trial, [(lr, schedule, max(1, round(steps * length))) for length in LENGTHS])
    return {
        "seed": trial.seed,
        "kind": trial.drawn.kind,
        "start": trial.drawn.start,
        "steps": steps,
        "batch": trial.drawn.batch,
        "weights": sum(shape.numel() for shape in trial.task.shapes.values()),
        "first": curves[0][0][1],
        "best": f"{lr:g} {schedule}",
        "grid": {f"{lr:g} {schedule}": loss for (lr, schedule), loss in zip(grid, finals, strict=True)},
        "curves": {"1": curves[best], **{f"{length:g}": curve for length, curve in zip(LENGTHS, others, strict=True)}},
    }


def learned(trial: Trial, network: OptimizerNetwork, horizon: bool, lr: float = 1.0) -> Curve:
    """A run of the learned optimizer."""
    steps = trial.drawn.steps
    params, buffers = trial.init()
    leaves = {name: nn.Parameter(param.clone()) for name, param in params.items()}
    optimizer = LearnedOptimizer(leaves.values(), network, lr=lr, total_steps=steps if horizon else None)
    wanted, curve = moments(steps), []

    def measure(t: int) -> None:
        with torch.no_grad():
            curve.append((t, float(f"{float(trial.task.loss(leaves, buffers, trial.sample)[0]):.5g}")))  # type: ignore[arg-type]

    measure(0)
    for t in range(steps):
        optimizer.zero_grad()
        trial.task.loss(leaves, buffers, trial.batch(t))[0].backward()  # type: ignore[arg-type]
        optimizer.step()
        if t + 1 in wanted:
            measure(t + 1)
    return curve


def speed(base: dict[str, Any], curve: Curve) -> float:
    """Steps that tuned AdamW needs for the loss where a run ends, over the steps that this one took; see `learned_optim.speed`."""
    return of_curves(curve, envelope(list(base["curves"].values())), SOLVED * base["first"])


def measure(seed: int, folder: Path, pretrained: str | None, base: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Curve]]:
    """One problem: tuned AdamW, unless that is known, and ours in both modes, if there are weights to judge."""
    torch.set_num_threads(1)
    trial = Trial(seed, folder / "starts")
    base = base or baseline(trial)
    return base, {name: learned(trial, load_network(pretrained), known) for name, known in MODES.items()} if pretrained else {}


def summarise(rows: Sequence[dict[str, Any]], mode: str) -> dict[str, float]:
    """Quantiles of speed, and the shares of problems that end above something."""
    speeds = sorted(speed(row["base"], row["ours"][mode]) for row in rows)
    ends = [(final(row["ours"][mode]), row["base"]) for row in rows]
    found = {"problems": float(len(rows)), "geometric mean": geometric_mean(speeds)}
    found |= {name: speeds[min(len(speeds) - 1, int(share * len(speeds)))] for name, share in QUANTILES.items()}
    found["above AdamW at 1e-3"] = statistics.fmean(end > base["grid"][DEFAULT] for end, base in ends)
    found["above tuned AdamW"] = statistics.fmean(end > min(base["grid"].values()) for end, base in ends)
    found["above its start"] = statistics.fmean(not end <= base["first"] for end, base in ends)
    return found


def counts(ends: Iterable[tuple[float, float, float]]) -> dict[str, int]:
    """Of how many problems an end is lower than another, and of how many higher; each (end, other, first loss)."""
    found = {"lower": 0, "higher": 0}
    for end, other, first in ends:
        least = SOLVED * abs(first)
        found["lower"] += end < other - least
        found["higher"] += not end <= other + least  # also what diverged
    return found


def kinds(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        base = row["base"]
        found.setdefault(base["kind"].split()[0].strip(",") if base["start"] == "scratch" else base["start"], []).append(row)
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality/distribution.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="default", help="the weights to judge")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--held-out", action="store_true", help="seeds that nothing is chosen on")
    parser.add_argument("--seeds", type=int, nargs="+", help="these problems, in place of the first ones")
    parser.add_argument("--only-adamw", action="store_true", help="tune AdamW and stop")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="problems side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/distribution"))
    arguments = parser.parse_args(argv)
    if arguments.seeds and arguments.held_out:
        parser.error(f"--seeds names the problems, so --held-out has nothing to say; those from {HELD_OUT} on are held out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    network, first = load_network(arguments.pretrained), HELD_OUT if arguments.held_out else 0
    seeds = arguments.seeds or range(first, first + arguments.problems)
    mark = {"weights": fingerprint(network), "behaviour": behaviour(network)}
    path = arguments.out / "runs.jsonl"
    bases: dict[int, dict[str, Any]] = {}
    ours: dict[int, dict[str, Curve]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "base" in row:
            bases[row["base"]["seed"]] = row["base"]
        elif is_of(row, *mark.values()):
            ours[row["seed"]] = row["ours"]
    todo = [seed for seed in seeds if seed not in (bases if arguments.only_adamw else ours)]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        judged = None if arguments.only_adamw else arguments.pretrained
        jobs = [pool.submit(measure, seed, arguments.out, judged, bases.get(seed)) for seed in todo]
        for count, job in enumerate(as_completed(jobs), 1):
            base, curves = job.result()
            seed = base["seed"]
            new = [{"base": base}] if seed not in bases else []
            new += [{"seed": seed, "ours": curves} | mark] if curves else []
            bases[seed], ours[seed] = base, curves
            with path.open("a") as file:
                file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in new)
            print(f"\r{count}/{len(todo)} problems ", end="", file=sys.stderr, flush=True)
    if arguments.only_adamw:
        return
    mine = [{"base": bases[seed], "ours": ours[seed]} for seed in seeds]
    found = {
        "weights": mark["weights"],
        "held out": min(seeds) >= HELD_OUT,
        "machine": {"platform": platform.platform(), "torch": torch.__version__},
        "all": {mode: summarise(mine, mode) for mode in MODES},
        "kinds": {kind: {mode: summarise(some, mode) for mode in MODES} for kind, some in kinds(mine).items()},
    }
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    for mode, one in found["all"].items():
        print(f"\n{mode}: " + ", ".join(f"{name} {value:.3g}" for name, value in one.items()))
    for kind, modes in found["kinds"].items():
        print(f"{kind:16s}" + "  ".join(f"{mode} {one['geometric mean']:.2f} (of {one['problems']:.0f})" for mode, one in modes.items()))


if __name__ == "__main__":
    main()
