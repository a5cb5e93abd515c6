"""What is each part of the rule worth, on problems that nobody chose?

    python benchmarks/quality/ablations.py                              # an hour on two cores
    python benchmarks/quality/ablations.py --seeds 30 --parts LSTM pace

Trains problems drawn at random (see distribution.py) without and with a known horizon, with the whole rule and without each of its parts.
The weights are those that were meta-trained for the whole rule. Says how fast each is, beside AdamW that is tuned on each problem, and on
how many of them it ends lower and higher than the whole rule; what differs by less than a thousandth of the first loss counts as equal.
Rules are chosen on such problems too, so this says what a part is worth, and not how good the rule is. Goes on where it was stopped.
AdamW need not be tuned again where the committed runs are unpacked:

    mkdir -p runs/ablations
    xz -dc benchmarks/quality/results/ablations_runs.jsonl.xz > runs/ablations/runs.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from behaviour import behaviour, is_of
from distribution import MODES, Curve, Trial, baseline, counts, learned, speed, summarise

from learned_optim import OptimizerNetwork, load_network, network, optimizer, rule
from learned_optim.speed import final, geometric_mean
from learned_optim.weights import fingerprint

FIRST = 3000  # seed; none is held out
STEPS = 600  # longer trainings are left out, since there are many to do
WHOLE = "nothing"
TOGETHER = 8  # problems of a process
Change = Callable[[OptimizerNetwork], None]


def without(name: str) -> Change:
    """Sets a parameter of the controller to zero, with which it does nothing."""
    return lambda net: getattr(net.controller, name).data.zero_()


def constant(module: ModuleType, name: str, value: float) -> Change:
    """Gives a constant of the rule another value, in the whole process."""
    return lambda net: setattr(module, name, type(getattr(module, name))(value))


def without_lstm(net: OptimizerNetwork) -> None:
    fresh = OptimizerNetwork(net.config).coordinate
    net.coordinate.skip.data, net.coordinate.out.data = fresh.skip.data, fresh.out.data


def without_orthogonalization(net: OptimizerNetwork) -> None:
    net.config = dataclasses.replace(net.config, orthogonalize_steps=0)


def without_lengthening(net: OptimizerNetwork) -> None:
    net.controller.log_rate.data.fill_(-1000)  # its exponential is zero


def without_controller(net: OptimizerNetwork) -> None:
    without_lengthening(net)
    without("shrink")(net)


PARTS: dict[str, Change] = {
    WHOLE: lambda net: None,
    "LSTM": without_lstm,
    "orthogonalisation": without_orthogonalization,
    "controller": without_controller,
    "lengthening": without_lengthening,
    "bouncing": without("shrink"),
    "pace": without("power"),
    "warm-up": without("log_start"),
    "proof": constant(network, "PROOF", 0.0),
    "care": constant(network, "HASTE", math.inf),
    "creep": constant(network, "CREEP", 0.0),
    "Adam's direction": constant(optimizer, "SURELY", math.inf),
    "few matrices": constant(rule, "MANY", 1),
    "long runs": constant(rule, "SHORT_RUN", math.inf),
}


def tune(seed: int, folder: Path) -> dict[str, Any]:
    """Tuned AdamW on a problem; of trainings that are too long nothing but how long they are."""
    torch.set_num_threads(1)
    trial = Trial(seed, folder)
    return baseline(trial) if trial.drawn.steps <= STEPS else {"seed": seed, "steps": trial.drawn.steps}


def measure(part: str, seeds: Sequence[int], folder: Path, pretrained: str) -> list[dict[str, Any]]:
    """What is left of the rule, in both modes."""
    torch.set_num_threads(1)
    net, rows = load_network(pretrained), []
    PARTS[part](net)
    for seed in seeds:
        trial = Trial(seed, folder)
        rows.append({"seed": seed, "part": part, "ours": {name: learned(trial, net, known) for name, known in MODES.items()}})
    return rows


def compare(
    bases: Sequence[dict[str, Any]], ours: dict[int, dict[str, Curve]], whole: dict[int, dict[str, Curve]], mode: str
) -> dict[str, Any]:
    """Speeds without a part, and on how many problems ends are lower and higher than with it."""
    rows = [{"base": base, "ours": ours[base["seed"]]} for base in bases]
    ends = [(final(ours[base["seed"]][mode]), final(whole[base["seed"]][mode]), base["first"]) for base in bases]
    found: dict[str, Any] = summarise(rows, mode) | counts(ends)
    for name, scratch in {"from scratch": True, "from a trained model": False}.items():
        found[name] = geometric_mean(
            speed(row["base"], row["ours"][mode]) for row in rows if (row["base"]["start"] == "scratch") is scratch
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality/ablations.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="default", help="the weights to judge")
    parser.add_argument("--seeds", type=int, default=110, help=f"that many, from {FIRST} on; those of more than {STEPS} steps are left out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="problems side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    net, path, folder = load_network(arguments.pretrained), arguments.out / "runs.jsonl", arguments.out / "starts"
    mark, parts = {"weights": fingerprint(net), "behaviour": behaviour(net)}, list(dict.fromkeys([WHOLE, *arguments.parts]))
    bases: dict[int, dict[str, Any]] = {}
    ours: dict[str, dict[int, dict[str, Curve]]] = {part: {} for part in PARTS}

    def keep(rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            if "base" in row:
                bases[row["base"]["seed"]] = row["base"]
            elif is_of(row, *mark.values()):
                ours[row["part"]][row["seed"]] = row["ours"]

    def run(jobs: list[Any], into: Callable[[Any], list[dict[str, Any]]]) -> None:
        for count, job in enumerate(as_completed(jobs), 1):
            rows = into(job.result())
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
            keep(rows)
            print(f"\r{count}/{len(jobs)} jobs ", end="", file=sys.stderr, flush=True)

    keep([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else [])
    seeds = range(FIRST, FIRST + arguments.seeds)
    # A constant is changed for a whole process, so each job has a process of its own.
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        run([pool.submit(tune, seed, folder) for seed in seeds if seed not in bases], lambda base: [{"base": base}])
        short = [bases[seed] for seed in seeds if bases[seed]["steps"] <= STEPS]
        todo = {part: [base["seed"] for base in short if base["seed"] not in ours[part]] for part in parts}
        batches = [(part, todo[part][i : i + TOGETHER]) for part in parts for i in range(0, len(todo[part]), TOGETHER)]
        run(
            [pool.submit(measure, *batch, folder, arguments.pretrained) for batch in batches],
            lambda rows: [row | mark for row in rows],
        )
    found = {
        "weights": mark["weights"],
        "machine": {"platform": platform.platform(), "torch": torch.__version__},
        "parts": {part: {mode: compare(short, ours[part], ours[WHOLE], mode) for mode in MODES} for part in parts},
    }
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for mode, part in itertools.product(MODES, parts):
        one = found["parts"][part][mode]
        shown = ("geometric mean", "from scratch", "from a trained model", "median", "5th percentile", "above AdamW at 1e-3")
        print(f"\n{mode}, without {part:18s}" + ", ".join(f"{name} {one[name]:.2f}" for name in shown), end="")
        print(f", lower {one['lower']}, higher {one['higher']}", end="")
    print()


if __name__ == "__main__":
    main()
