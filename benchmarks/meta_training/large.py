"""What does a meta-gradient through a real model cost, beside simply training it?

    python benchmarks/meta_training/large.py exact --steps 64
    python benchmarks/meta_training/large.py pes --steps 200

A character transformer of more than 10 million parameters, one replica, one meta-gradient: exact with recomputation, or by a PES pair. Its
time a step and its peak of memory are compared with those of training the same model by LearnedOptimizer, which has a compiled kernel, and
by the same rule in PyTorch operations; AdamW is shown too. Each has a process of its own. Training is measured before and after, since the
machine's load may change in between, and the median counts. Time is the process's CPU time, in which other programs do not count.
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

WIDTH, DEPTH, LENGTH, BATCH = 336, 8, 64, 16
TRAINING_STEPS = 5  # the first is left out of the time
TRAINING = ("LearnedOptimizer", "LearnedOptimizer, reference", "AdamW")
GOALS = {"exact": 6.0, "pes": 2.2}  # times the training's time; of PES, its memory too


class Measurement(NamedTuple):
    parameters: int
    steps: int
    seconds: float  # of CPU time, a step
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
        start = time.process_time()
        estimator(name)(unroll, network, weights, config)
        return Measurement(parameters, steps, (time.process_time() - start) / steps, peak_mib() - before)
    model, generator = task.build(), Generator().manual_seed(0)
    kernel = "reference" if "reference" in name else "auto"
    optimizer = torch.optim.AdamW(model.parameters()) if name == "AdamW" else LearnedOptimizer(model.parameters(), network, kernel=kernel)
    for step in range(steps + 1):
        if step == 1:
            start = time.process_time()
        inputs, targets = task.batch(generator)
        optimizer.zero_grad()
        token_loss(model(inputs), targets).backward()
        optimizer.step()
    return Measurement(parameters, steps, (time.process_time() - start) / steps, peak_mib() - before)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "large")
    options.add_argument("estimator", choices=GOALS)
    options.add_argument("--steps", type=int, default=64, help="of the unroll")
    arguments = options.parse_args(argv)
    training = [(name, TRAINING_STEPS) for name in TRAINING]
    measured: dict[str, list[Measurement]] = {}
    for name, count in (*training, (arguments.estimator, arguments.steps), *training):
        measured.setdefault(name, []).append(apart(measure, name, count, arguments.threads))
        print(name, measured[name][-1], flush=True)
    found = {name: each[0]._replace(seconds=statistics.median(one.seconds for one in each)) for name, each in measured.items()}
    compiled, reference = (found[name] for name in TRAINING[:2])
    rows: list[list[object]] = [["", "steps", "CPU s/step", "x compiled", "x reference", "peak MiB", "x compiled ", "x reference "]]
    for name, one in found.items():
        times = (one.seconds, one.seconds / compiled.seconds, one.seconds / reference.seconds)
        rows.append([name, one.steps, *times, one.mib, one.mib / compiled.mib, one.mib / reference.mib])
    print(f"\nA transformer of {compiled.parameters:,} parameters, {BATCH} x {LENGTH} characters a batch\n\n{table(rows)}")
    print(f"goal: at most {GOALS[arguments.estimator]} times the time of training{', and its memory' * (arguments.estimator == 'pes')}")

    figure = new_figure(7, 3)
    left, right = figure.subplots(1, 2)
    left.bar(list(found), [one.seconds for one in found.values()], color=COLOURS[0])
    right.bar(list(found), [one.mib / 1024 for one in found.values()], color=COLOURS[1])
    left.set(ylabel="CPU seconds per step")
    right.set(ylabel="peak memory (GiB)")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize="small", rotation=20)
    save(arguments.out, arguments.threads, {name: one._asdict() for name, one in found.items()}, figure)


if __name__ == "__main__":
    main()
