"""Judges optimizer weights while they are being developed: larger siblings of the meta-training tasks, with other data.

    python benchmarks/validation.py --pretrained default --out runs/validation

Prints the final training loss (mean over the last tenth of the steps, over seeds) of AdamW with its best learning rate and schedule, of the
rule before meta-training, of the weights, and of the weights with a part switched off; the geometric mean of the ratio to tuned AdamW; and
writes the figures as JSON. These tasks choose between weights, so they prove nothing about the chosen ones; held-out tasks do that.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.meta_train.families import images, sampling, text
from learned_optim.meta_train.tasks import ModuleTask

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def transformer(generator: Generator, tied: bool = False) -> ModuleTask:
    blocks = 2, 64

    def build() -> nn.Module:
        return text.TextModel(blocks[1], [text.Block(blocks[1], 4) for _ in range(blocks[0])], 48, tied)

    return ModuleTask(build, text.text_samplers(generator, 48, 16)[0], text.token_loss)


def recurrent(generator: Generator) -> ModuleTask:
    sample = text.text_samplers(generator, 24, 16)[0]
    return ModuleTask(lambda: text.TextModel(64, [text.Recurrence(64)], 0, False), sample, text.token_loss)


def cnn(generator: Generator) -> ModuleTask:
    def build() -> nn.Module:
        first = [nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24, track_running_stats=False), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 10))

    return ModuleTask(build, sampling.sampler(*images.synthetic_images(generator, 16, 3, 10), 32), F.cross_entropy)


def autoencoder(generator: Generator) -> ModuleTask:
    pixels = images.synthetic_images(generator, 12, 1, 10)[0].flatten(1)
    return ModuleTask(lambda: sampling.mlp_module([144, 96, 12, 96, 144], nn.Tanh), sampling.sampler(pixels, pixels, 32), F.mse_loss)


def mlp(generator: Generator) -> ModuleTask:
    """Labels made by a random network."""
    inputs = torch.randn(4000, 40, generator=generator)
    hidden = torch.tanh(inputs @ torch.randn(40, 30, generator=generator) / 2)
    labels = (hidden @ torch.randn(30, 10, generator=generator)).argmax(1)
    return ModuleTask(lambda: sampling.mlp_module([40, 128, 128, 10], nn.ReLU), sampling.sampler(inputs, labels, 64), F.cross_entropy)


def smooth(generator: Generator) -> ModuleTask:
    """A function of one variable, in full batches."""
    x = torch.linspace(-3, 3, 256)[:, None]
    y = torch.sin(3 * x) + 0.5 * torch.sin(7 * x + 1)
    return ModuleTask(lambda: sampling.mlp_module([1, 64, 64, 1], nn.Tanh), lambda _: (x, y), F.mse_loss)


TASKS: dict[str, tuple[Callable[[Generator], ModuleTask], int]] = {
    "transformer": (transformer, 400),
    "tied transformer": (functools.partial(transformer, tied=True), 400),
    "recurrent": (recurrent, 400),
    "cnn": (cnn, 400),
    "autoencoder": (autoencoder, 500),
    "mlp": (mlp, 500),
    "smooth": (smooth, 800),
}


def lstm_off(network: OptimizerNetwork) -> None:
    fresh = OptimizerNetwork(network.config).coordinate
    network.coordinate.skip.data, network.coordinate.out.data = fresh.skip.data, fresh.out.data


def controller_off(network: OptimizerNetwork) -> None:
    network.controller.log_rate.data.fill_(-math.inf)


def run(job: tuple[str, str, int, dict[str, Any], int]) -> float:
    """Final training loss of one run."""
    task_name, kind, seed, options, steps = job
    torch.set_num_threads(1)
    task = TASKS[task_name][0](Generator().manual_seed(77))
    generator = Generator().manual_seed(seed)
    params = {name: nn.Parameter(param) for name, param in task.init(generator)[0].items()}
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(params.values(), lr=options["lr"])
    else:
        torch.manual_seed(0)
        network = OptimizerNetwork(NetworkConfig()) if kind == "untrained" else load_network(options["pretrained"])
        if "off" in options:
            {"lstm": lstm_off, "controller": controller_off}[options["off"]](network)
        optimizer = LearnedOptimizer(params.values(), network, total_steps=steps if options["horizon"] else None)
    anneal = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps) if options.get("cosine") else 1.0
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = task.loss(params, {}, task.batch(generator))
        loss.backward()
        optimizer.step()
        anneal.step()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", nargs="*", default=["default"], help="weights to judge; several for a comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=Path("runs/validation"), help="where results.json goes; AdamW's results there are reused"
    )
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)

    columns: dict[str, tuple[str, dict[str, Any]]] = {}
    for lr, cosine in itertools.product(LEARNING_RATES, (False, True)):
        columns[f"adamw {lr:g}{' cosine' if cosine else ''}"] = ("adamw", {"lr": lr, "cosine": cosine})
    for horizon in (False, True):
        suffix = " +T" if horizon else ""
        columns["untrained" + suffix] = ("untrained", {"horizon": horizon})
        for name in arguments.pretrained:
            columns[name + suffix] = ("pretrained", {"pretrained": name, "horizon": horizon})
            for off in () if arguments.no_ablations else ("lstm", "controller"):
                columns[f"{name} {off} off{suffix}"] = ("pretrained", {"pretrained": name, "horizon": horizon, "off": off})

    cache = arguments.out / "adamw.json"
    cached: dict[str, float] = json.loads(cache.read_text()) if cache.exists() else {}
    jobs = list(itertools.product(arguments.tasks, columns, range(arguments.seeds)))
    todo = [job for job in jobs if "/".join(map(str, job)) not in cached]
    with ProcessPoolExecutor(arguments.workers) as pool:
        finals = pool.map(run, [(task, columns[column][0], seed, columns[column][1], TASKS[task][1]) for task, column, seed in todo])
        fresh = {"/".join(map(str, job)): final for job, final in zip(todo, finals, strict=True)}
    results = cached | fresh
    cache.write_text(
        json.dumps({key: value for key, value in results.items() if key.split("/")[1].startswith(("adamw", "untrained"))}, indent=1)
    )

    table = {
        task: {column: sum(results[f"{task}/{column}/{seed}"] for seed in range(arguments.seeds)) / arguments.seeds for column in columns}
        for task in arguments.tasks
    }
    best = {task: min(value for column, value in row.items() if column.startswith("adamw")) for task, row in table.items()}
    shown = ["adamw 0.001", "adamw best", *[column for column in columns if not column.startswith("adamw")]]
    for row, value in best.items():
        table[row]["adamw best"] = value
    width = max(map(len, shown)) + 2
    print("final training loss".ljust(width), *[task.rjust(16) for task in arguments.tasks], "ratio to best".rjust(14))
    for column in shown:
        # The floor keeps tasks that are solved to rounding from deciding the mean.
        ratios = [math.log((table[task][column] + 1e-3) / (best[task] + 1e-3)) for task in arguments.tasks]
        values = [f"{table[task][column]:16.4f}" for task in arguments.tasks]
        print(column.ljust(width), *values, f"{math.exp(sum(ratios) / len(ratios)):14.3f}")
    (arguments.out / "results.json").write_text(
        json.dumps({"torch": torch.__version__, "seeds": arguments.seeds, "final_loss": table}, indent=1)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
