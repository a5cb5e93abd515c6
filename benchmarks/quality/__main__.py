"""Does the learned optimizer, untuned, beat tuned AdamW on tasks that nothing was tuned on?

    python benchmarks/quality                        # every task, three seeds; goes on where it was stopped
    python benchmarks/quality --data ../data         # MNIST and WikiText-2 too, from a folder of yours
    python benchmarks/quality --development          # not the held-out tasks but those that weights and rules are chosen on

Each baseline is tuned task by task: of a grid of learning rates and schedules, the best on the mean of all seeds. A run's result is its
loss at the end on a fixed sample of the training data, and on validation data.

**Speed** is the number of steps that tuned AdamW needs to get to the loss where an optimizer ends, over the steps that this one needed to
get there (VeLOdrome's measure, Metz et al. 2022, section 4). AdamW may take its best setting for each of several lengths, from an eighth
to four times the steps; what it does not reach then counts as four times. What diverges, or ends above where AdamW is after an eighth of
the steps, counts as an eighth.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from development import TASKS as DEVELOPMENT
from optimizers import DEFAULTS, GRIDS, LEARNED_NAMES, REFERENCE, SENSITIVITY, STORED
from report import report
from tasks import MORE_TASKS, TASKS
from training import PROBLEMS, Job, Results, train

from learned_optim import load_network
from learned_optim.speed import LENGTHS

PARTS = ["baselines", "learned", "sensitivity", "state"]


def wanted(tasks: list[str], results: Results, seeds: int, state_seeds: int, parts: set[str]) -> list[Job]:
    """What can be run by now: the grids, and once a task's is complete, AdamW's best setting for other lengths of training."""
    jobs: list[Job] = []
    for task in tasks:
        jobs += [(task, name, seed, 1.0) for name, seed in itertools.product(GRIDS[REFERENCE], range(seeds))]
        if results.complete(task, GRIDS[REFERENCE], seeds):
            best = results.best(task, REFERENCE, seeds)
            jobs += [(task, best, seed, length) for seed, length in itertools.product(range(seeds), LENGTHS)]
        names = [*itertools.chain(*GRIDS.values()), *DEFAULTS] if "baselines" in parts else []
        names += LEARNED_NAMES if "learned" in parts else ()
        names += SENSITIVITY if "sensitivity" in parts else ()
        jobs += [(task, name, seed, 1.0) for name in names for seed in range(seeds)]
        stored = [*LEARNED_NAMES, *STORED] if "state" in parts else []
        jobs += [(task, name, seed, 1.0) for name in stored for seed in range(state_seeds)]
    return [job for job in dict.fromkeys(jobs) if job not in results.runs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="default", help="the weights to judge")
    parser.add_argument("--tasks", nargs="*", choices=list(PROBLEMS), metavar="TASK", help="all held-out ones by default")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--development", action="store_true", help="the tasks that weights and rules are chosen on")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="beside tuned AdamW; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--state-seeds",
        type=int,
        default=6,
        help="of the part `state`, whose formats differ by less than three seeds do; some tasks want more",
    )
    kind.add_argument("--data", type=Path, help="folder with mnist/ and wikitext-2/: adds their tasks")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, each on one thread")
    parser.add_argument("--out", type=Path, help="where runs.jsonl, results.json and the plots go; runs/quality or runs/development")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs/development" if arguments.development else "runs/quality")
    tasks = arguments.tasks or list(DEVELOPMENT if arguments.development else TASKS)
    if arguments.data:
        os.environ["QUALITY_DATA"] = str(arguments.data.resolve())
        tasks += [name for name in MORE_TASKS if name not in tasks]
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "runs.jsonl", load_network(arguments.pretrained))
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        while todo := wanted(tasks, results, arguments.seeds, arguments.state_seeds, set(arguments.parts)):
            began = time.monotonic()
            for count, done in enumerate(as_completed([pool.submit(train, job, arguments.pretrained) for job in todo]), 1):
                results.add(done.result())
                ahead = (time.monotonic() - began) / count * (len(todo) - count)
                print(f"\r{count}/{len(todo)} runs, {ahead / 60:.0f} min to go ", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
    report(tasks, results, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
