"""Is 1 the best `lr`, and where is it not?

    python benchmarks/quality/multipliers.py                                    # an hour on two cores
    python benchmarks/quality/multipliers.py --seeds 30 --multipliers 0.5 2

Trains problems drawn at random (see distribution.py) with several multipliers of the learned update, without and with a known horizon, and
counts on how many of them each ends lower and higher than 1 does, by where they begin and by how many examples a batch has. What differs by
less than a thousandth of the first loss counts as equal. Rules are chosen on such problems too, so this says where a rule is weak, and not
how good it is. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from behaviour import behaviour, is_of
from distribution import MODES, Trial, counts, learned

from learned_optim import load_network
from learned_optim.speed import final
from learned_optim.weights import fingerprint

FIRST = 2000  # seed; none is held out
STEPS = 200  # longer trainings are left out, since there are many to do
MULTIPLIERS = (0.25, 0.5, 2.0, 4.0)
SIZES = {"1 to 3": 3, "4 to 31": 31, "32 and more": 512}  # the largest batch of each


def measure(seed: int, folder: Path, pretrained: str, multipliers: Sequence[float]) -> dict[str, Any]:
    """Where each multiplier ends, in both modes; of trainings that are too long nothing."""
    torch.set_num_threads(1)
    trial, network = Trial(seed, folder), load_network(pretrained)
    drawn, values = trial.drawn, sorted({1.0, *multipliers})
    first = float(trial.task.loss(*trial.init(), trial.sample)[0])
    row = {"seed": seed, "kind": drawn.kind, "start": drawn.start, "batch": drawn.batch, "steps": drawn.steps, "first": first}
    modes = MODES if drawn.steps <= STEPS else {}
    return row | {"ends": {mode: {f"{lr:g}": final(learned(trial, network, known, lr)) for lr in values} for mode, known in modes.items()}}


def group(row: dict[str, Any]) -> str:
    if row["start"] != "scratch":
        return "adapters" if row["start"] == "adapters" else "other starts"
    return next(name for name, largest in SIZES.items() if row["batch"] <= largest)


def ends(rows: Sequence[dict[str, Any]], mode: str, lr: str) -> list[tuple[float, float, float]]:
    """Where a multiplier ends, where 1 does, and the first loss."""
    return [(row["ends"][mode][lr], row["ends"][mode]["1"], row["first"]) for row in rows]


def summarise(rows: Sequence[dict[str, Any]], multipliers: Sequence[str]) -> dict[str, Any]:
    groups = {name: [row for row in rows if group(row) == name] for name in (*SIZES, "adapters", "other starts")}
    return {
        name: {"problems": len(some), **{mode: {lr: counts(ends(some, mode, lr)) for lr in multipliers} for mode in MODES}}
        for name, some in {"all": rows, **groups}.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/quality/multipliers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="default", help="the weights to judge")
    parser.add_argument("--seeds", type=int, default=90, help=f"that many, from {FIRST} on; those of more than {STEPS} steps are left out")
    parser.add_argument("--multipliers", type=float, nargs="+", default=MULTIPLIERS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="problems side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/multipliers"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    network, names = load_network(arguments.pretrained), [f"{lr:g}" for lr in arguments.multipliers]
    mark, path, folder = (
        {"weights": fingerprint(network), "behaviour": behaviour(network)},
        arguments.out / "runs.jsonl",
        arguments.out / "starts",
    )
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if is_of(row, *mark.values()) and all({"1", *names} <= ends.keys() for ends in row["ends"].values()):
            rows[row["seed"]] = row
    seeds = range(FIRST, FIRST + arguments.seeds)
    todo = [seed for seed in seeds if seed not in rows]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(measure, seed, folder, arguments.pretrained, arguments.multipliers) for seed in todo]
        for count, job in enumerate(as_completed(jobs), 1):
            row = job.result()
            rows[row["seed"]] = row
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | mark, separators=(",", ":")) + "\n")
            print(f"\r{count}/{len(todo)} problems ", end="", file=sys.stderr, flush=True)
    found = {
        "weights": mark["weights"],
        "machine": {"platform": platform.platform(), "torch": torch.__version__},
        "groups": summarise([rows[seed] for seed in seeds if rows[seed]["ends"]], names),
    }
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for mode in MODES:
        print(f"\n{mode}: problems that end lower / higher than with lr=1")
        for name, one in found["groups"].items():
            cells = [f"{lr}: {one[mode][lr]['lower']} / {one[mode][lr]['higher']}" for lr in names]
            print(f"{name:14s}{one['problems']:4d}  {'   '.join(cells)}")


if __name__ == "__main__":
    main()
