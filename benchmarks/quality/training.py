"""One training run, and the file of all runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from behaviour import behaviour, is_of
from development import TASKS as DEVELOPMENT
from optimizers import GRIDS, LEARNED_NAMES, make
from tasks import MORE_TASKS, TASKS, Problem

from learned_optim import OptimizerNetwork, speed
from learned_optim.speed import EVALUATIONS
from learned_optim.weights import fingerprint

PROBLEMS = TASKS | MORE_TASKS | DEVELOPMENT
Run = dict[str, Any]
Job = tuple[str, str, int, float]  # task, optimizer, seed, length


def losses(problem: Problem, measure: Any) -> tuple[float, float]:
    """On the samples of training and of validation data."""
    found = tuple(float(measure(problem.model, part).detach()) for part in (problem.train, problem.validation))
    return found[0], found[1]


def train(job: Job, pretrained: str) -> Run:
    """One run: its curve of (steps, training loss, validation loss, seconds), from before the first step to after the last."""
    task_name, optimizer_name, seed, length = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = PROBLEMS[task_name]
    steps = max(1, round(task.steps * length))
    problem = task.make(seed)
    measure = problem.measure or problem.loss
    trained = make(optimizer_name, problem.model, steps, pretrained)
    curve, seconds = [(0, *losses(problem, measure), 0.0)], 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        trained.mode(training=True)
        trained.optimizer.zero_grad()
        loss = problem.loss(problem.model, problem.batch())
        loss.backward()
        trained.step()
        seconds += time.perf_counter() - start
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            trained.mode(training=False)
            curve.append((step, *losses(problem, measure), round(seconds, 3)))
            if not all(map(math.isfinite, curve[-1])):
                break
    rounded = [[point if isinstance(point, int) else float(f"{point:.5g}") for point in points] for points in curve]
    return {"task": task_name, "optimizer": optimizer_name, "seed": seed, "length": length, "curve": rounded}


class Results:
    """All runs so far, in a file of one line each: a benchmark that was stopped goes on from there."""

    def __init__(self, path: Path, network: OptimizerNetwork) -> None:
        self.path, self.weights, self.behaviour = path, fingerprint(network), behaviour(network)
        self.runs: dict[Job, Run] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            run = json.loads(line)
            if is_of(run, self.weights, self.behaviour):
                self.runs[self.job(run)] = run

    @staticmethod
    def job(run: Run) -> Job:
        return run["task"], run["optimizer"], run["seed"], run["length"]

    def add(self, run: Run) -> None:
        if run["optimizer"].split()[0] in LEARNED_NAMES:
            run |= {"weights": self.weights, "behaviour": self.behaviour}
        self.runs[self.job(run)] = run
        with self.path.open("a") as file:
            file.write(json.dumps(run, separators=(",", ":")) + "\n")

    def complete(self, task: str, names: Sequence[str], seeds: int) -> bool:
        return all((task, name, seed, 1.0) in self.runs for name in names for seed in range(seeds))

    def best(self, task: str, family: str, seeds: int) -> str:
        """The setting of a family's grid with the lowest final training loss, mean over the seeds."""
        return min(GRIDS[family], key=lambda name: sum(final(self.runs[task, name, seed, 1.0]) for seed in range(seeds)))


def training_curve(run: Run) -> list[tuple[float, float]]:
    return [(point[0], point[1]) for point in run["curve"]]


def final(run: Run) -> float:
    """Mean training loss at the last three evaluations, a thirteenth of the run; infinite for a run that diverged."""
    return speed.final(training_curve(run))
