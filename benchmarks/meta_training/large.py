"""What does a meta-gradient through a real model cost, beside simply training it?

    python benchmarks/meta_training/large.py

A character transformer of more than 10 million parameters, one replica. Time a step and peak memory of training it with AdamW and with
LearnedOptimizer, of an exact meta-gradient with recomputation through 64 steps, and of a PES pair over 200 steps; each in a process of its
own. The same rule runs in all but the first, so LearnedOptimizer is what the estimators are compared with; it is measured before, between
and after them, since the machine's load may change within the hour, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from common import COLOURS, apart, new_figure, parser, peak_mib, prepare, save, table
from torch import Generator

from learned_optim import LearnedOptimizer, load_network
from learned_optim.meta_train import MetaTrainConfig, ModuleTask
from learned_optim.meta_train.estimators import estimator
from learned_optim.meta_train.families.text import Block, TextModel, text_samplers, token_loss
from learned_optim.meta_train.unroll import begin

WIDTH, DEPTH, LENGTH, BATCH = 336, 8, 64, 8
TRAINING_STEPS = 5  # the first is left out of the time
GOALS = {"exact": 6.0, "pes": 2.2}  # times the training's time; of PES, its memory too


class Measurement(NamedTuple):
    parameters: int
    steps: int
    seconds: float  # a step
    mib: float  # peak of the process, without what Python and torch take


def transformer() -> ModuleTask:
    train, validation = text_samplers(Generator().manual_seed(0), LENGTH, BATCH)
    return ModuleTask(lambda: TextModel(WIDTH, [Block(WIDTH, 8) for _ in range(DEPTH)], LENGTH, tied=False), train, token_loss, validation)


def measure(name: str, steps: int, threads: int) -> Measurement:
    prepare(threads)
    network, before, task = load_network("default"), peak_mib(), transformer()
    parameters = sum(shape.numel() for shape in task.shapes.values())
    if name in GOALS:
        unroll = begin(task, 0, None, 1, network.config, "cpu", horizon=steps, horizon_known=True)
        config = MetaTrainConfig(truncation=steps, horizon_min=steps, horizon_max=steps, recompute=True, pairs=1)
        weights = dict(network.requires_grad_(True).named_parameters())
        start = time.perf_counter()
        estimator(name)(unroll, network, weights, config)
        return Measurement(parameters, steps, (time.perf_counter() - start) / steps, peak_mib() - before)
    model, generator = task.build(), Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters()) if name == "AdamW" else LearnedOptimizer(model.parameters(), network)
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        inputs, targets = task.batch(generator)
        optimizer.zero_grad()
        token_loss(model(inputs), targets).backward()
        optimizer.step()
    return Measurement(parameters, steps, (time.perf_counter() - start) / steps, peak_mib() - before)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "large")
    options.add_argument("--exact-steps", type=int, default=64)
    options.add_argument("--pes-steps", type=int, default=200)
    arguments = options.parse_args(argv)
    training = ("LearnedOptimizer", TRAINING_STEPS)
    runs = [("AdamW", TRAINING_STEPS), training, ("exact", arguments.exact_steps), training, ("pes", arguments.pes_steps), training]
    measured: dict[str, list[Measurement]] = {}
    for name, count in runs:
        measured.setdefault(name, []).append(apart(measure, name, count, arguments.threads))
        print(name, measured[name][-1], flush=True)
    found = {name: each[0]._replace(seconds=statistics.median(one.seconds for one in each)) for name, each in measured.items()}
    base = found["LearnedOptimizer"]
    rows: list[list[object]] = [["", "steps", "s/step", "times training", "goal", "peak MiB", "times training "]]
    for name, one in found.items():
        rows.append([name, one.steps, one.seconds, one.seconds / base.seconds, GOALS.get(name, "-"), one.mib, one.mib / base.mib])
    print(f"\nA transformer of {base.parameters:,} parameters, {BATCH} x {LENGTH} characters a batch\n\n{table(rows)}")

    figure = new_figure(7, 3)
    left, right = figure.subplots(1, 2)
    left.bar(list(found), [one.seconds for one in found.values()], color=COLOURS[0])
    right.bar(list(found), [one.mib / 1024 for one in found.values()], color=COLOURS[1])
    left.set(ylabel="seconds per step")
    right.set(ylabel="peak memory (GiB)")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize="small", rotation=20)
    save(arguments.out, arguments.threads, {name: one._asdict() for name, one in found.items()}, figure)


if __name__ == "__main__":
    main()
