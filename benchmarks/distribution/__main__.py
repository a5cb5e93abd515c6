"""Where does the learned optimizer, untuned, stand on problems that nobody chose?

    python benchmarks/distribution --problems 60             # development: rules and weights are chosen on these
    python benchmarks/distribution --problems 60 --held-out  # other seeds, to publish only

Problems are drawn by seed (`learned_optim.meta_train.families.drawn`). AdamW is tuned on each: seven learning rates, constant and with a
cosine, with warm-up, and its best setting once more for other lengths of training. *Speed* is the number of steps that it needs for the
loss where ours ends, over the steps that ours took, from an eighth to four (two, where AdamW was not run for longer). Goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
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
from training import DEFAULT, HELD_OUT, Trial, baseline, final, learned, speed

from learned_optim import load_network
from learned_optim.weights import fingerprint

MODES = {"no settings": False, "total_steps": True}
QUANTILES = {"median": 0.5, "5th percentile": 0.05, "1st": 0.01}


def measure(seed: int, folder: Path, pretrained: str, base: dict[str, Any] | None) -> dict[str, Any]:
    """One problem: tuned AdamW, unless that is known, and ours in both modes."""
    torch.set_num_threads(1)
    trial = Trial(seed, folder / "starts")
    base = base or baseline(trial)
    network = load_network(pretrained)
    return {"base": base, "ours": {name: learned(trial, network, known) for name, known in MODES.items()}}


def summarise(rows: Sequence[dict[str, Any]], mode: str) -> dict[str, float]:
    """Quantiles of speed, and the shares of problems that end above something."""
    speeds = sorted(speed(row["base"], row["ours"][mode]) for row in rows)
    ends = [(final(row["ours"][mode]), row["base"]) for row in rows]
    found = {"problems": float(len(rows)), "geometric mean": math.exp(statistics.fmean(map(math.log, speeds)))}
    found |= {name: speeds[min(len(speeds) - 1, int(share * len(speeds)))] for name, share in QUANTILES.items()}
    found["above AdamW at 1e-3"] = statistics.fmean(end > base["grid"][DEFAULT] for end, base in ends)
    found["above tuned AdamW"] = statistics.fmean(end > min(base["grid"].values()) for end, base in ends)
    found["above its start"] = statistics.fmean(not end <= base["first"] for end, base in ends)
    return found


def kinds(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        base = row["base"]
        found.setdefault(base["kind"].split()[0].strip(",") if base["start"] == "scratch" else base["start"], []).append(row)
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/distribution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="default", help="the weights to judge")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--held-out", action="store_true", help="seeds that nothing is chosen on")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="problems side by side, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/distribution"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights, first = fingerprint(load_network(arguments.pretrained)), HELD_OUT if arguments.held_out else 0
    seeds = range(first, first + arguments.problems)
    path = arguments.out / "runs.jsonl"
    known: dict[int, dict[str, Any]] = {}
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        known[row["base"]["seed"]] = row["base"]
        if row.get("weights") == weights:
            rows[row["base"]["seed"]] = row
    todo = [seed for seed in seeds if seed not in rows]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(measure, seed, arguments.out, arguments.pretrained, known.get(seed)) for seed in todo]
        for count, job in enumerate(as_completed(jobs), 1):
            row = {**job.result(), "weights": weights}
            rows[row["base"]["seed"]] = row
            with path.open("a") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            print(f"\r{count}/{len(todo)} problems ", end="", file=sys.stderr, flush=True)
    mine = [rows[seed] for seed in seeds]
    found = {
        "weights": weights,
        "held out": arguments.held_out,
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
