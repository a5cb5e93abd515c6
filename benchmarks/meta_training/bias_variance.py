"""Which estimator of the meta-gradient is right, and how noisy is it, by truncation length?

    python benchmarks/meta_training/bias_variance.py

The truth is the exact gradient of a whole run. Each estimator's gradients are summed over the run, truncation by truncation, and compared
with it: cosine, relative bias |mean - truth| / |truth|, and for evolution strategies the standard deviation of one antithetic pair in the
same unit (an estimate of `pairs` of them divides it by their root; the bias that remains of that noise is printed too). Medians over runs.
Step size: `log_step_size` and `log_vector_gain`; LSTM: the coordinate-wise LSTM's weights. Each is perturbed alone.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from common import COLOURS, new_figure, parser, prepare, save, table
from torch import Generator, Tensor, nn

from learned_optim import OptimizerNetwork, load_network
from learned_optim.meta_train import FAMILIES, MetaTrainConfig
from learned_optim.meta_train.estimators import estimator, perturbations
from learned_optim.meta_train.unroll import Unroll, begin

KINDS = ("mlp", "regression", "cnn")
GROUPS = {"step size": "log_", "LSTM": "coordinate."}
REPLICAS = 2


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def backprop(name: str, unroll: Unroll, network: OptimizerNetwork, weights: dict[str, nn.Parameter], config: MetaTrainConfig) -> Tensor:
    """The sum of the gradients over a run, (dimensions,)."""
    total = torch.zeros(sum(weight.numel() for weight in weights.values()))
    while unroll.step < unroll.horizon:
        unroll, estimate = estimator(name)(unroll, network, weights, config)
        assert estimate.gradient is not None
        total += flat(estimate.gradient) * config.truncation / unroll.horizon
    return total


def evolved(name: str, unroll: Unroll, network: OptimizerNetwork, weights: dict[str, nn.Parameter], config: MetaTrainConfig) -> Tensor:
    """The same of every pair alone, (pairs, dimensions)."""
    since_start, total = torch.zeros(()), torch.zeros(())
    while unroll.step < unroll.horizon:
        noise = perturbations(weights, unroll.seed, unroll.step, config.pairs)
        now = torch.cat([noise[key].reshape(config.pairs, -1) for key in sorted(noise)], 1)
        since_start = since_start + now if name == "pes" else now
        unroll, estimate = estimator(name)(unroll, network, weights, config)
        pull = torch.tensor(estimate.differences)[:, None] / (2 * config.sigma)
        total = total + pull * since_start * config.truncation / unroll.horizon
    return total


def compare(kind: str, group: str, name: str, truncation: int, arguments: Any) -> dict[str, float]:
    network = load_network("default").requires_grad_(True)
    weights = {key: weight for key, weight in network.named_parameters() if key.startswith(GROUPS[group])}
    horizon = arguments.horizon
    found: dict[str, list[float]] = {"cosine": [], "bias": [], "noise": [], "deviation": [], "seconds": []}
    for seed in range(arguments.runs):
        task = FAMILIES[kind](Generator().manual_seed(seed))
        unroll = begin(task, seed, None, REPLICAS, network.config, "cpu", horizon=horizon, horizon_known=True)
        options = {"horizon_min": horizon, "horizon_max": horizon, "pairs": arguments.pairs, "sigma": arguments.sigma}
        truth = backprop("exact", unroll, network, weights, MetaTrainConfig(truncation=horizon, **options))
        config = MetaTrainConfig(truncation=truncation, **options)
        began = time.perf_counter()
        if name in ("exact", "first_order"):
            mean, deviation = backprop(name, unroll, network, weights, config), torch.zeros(1)
        else:
            each = evolved(name, unroll, network, weights, config)
            mean, deviation = each.mean(0), each.std(0)
        found["seconds"].append(time.perf_counter() - began)
        found["cosine"].append(float(torch.cosine_similarity(mean, truth, 0)))
        found["bias"].append(float((mean - truth).norm() / truth.norm()))
        found["deviation"].append(float(deviation.norm() / truth.norm()))
        found["noise"].append(found["deviation"][-1] / math.sqrt(arguments.pairs))
    return {key: statistics.median(values) for key, values in found.items()}


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "bias_variance")
    options.add_argument("--horizon", type=int, default=32)
    options.add_argument("--truncations", type=int, nargs="*", default=[4, 8, 16, 32])
    options.add_argument("--pairs", type=int, default=16)
    options.add_argument("--sigma", type=float, default=0.01)
    options.add_argument("--runs", type=int, default=2, help="tasks of each kind")
    arguments = options.parse_args(argv)
    prepare(arguments.threads)

    rows: list[list[object]] = [
        ["task", "of", "estimator", "truncation", "cosine", "bias", "of it noise", "deviation of a pair", "seconds"]
    ]
    results: dict[tuple[str, str, str], list[tuple[int, dict[str, float]]]] = {}
    for kind in KINDS:
        for group in GROUPS:
            for name in ("exact", "first_order", "es", "pes"):
                for truncation in arguments.truncations:
                    one = compare(kind, group, name, truncation, arguments)
                    results.setdefault((kind, group, name), []).append((truncation, one))
                    rows.append([kind, group, name, truncation, *(one[key] for key in ("cosine", "bias", "noise", "deviation", "seconds"))])
                    print(*rows[-1], flush=True)
    print(f"\nAgainst the exact gradient of whole runs of {arguments.horizon} steps; medians of {arguments.runs} runs\n")
    print(table(rows))

    figure = new_figure(11, 6)
    for column, kind in enumerate(KINDS):
        for row, group in enumerate(GROUPS):
            axes = figure.add_subplot(2, 3, row * 3 + column + 1)
            for colour, name in zip(COLOURS, ("exact", "first_order", "es", "pes"), strict=False):
                truncations, values = zip(*results[kind, group, name], strict=True)
                axes.plot(truncations, [value["bias"] for value in values], "o-", color=colour, label=name)
                if name in ("es", "pes"):
                    axes.plot(
                        truncations, [value["noise"] for value in values], ":", color=colour, label=f"noise of {arguments.pairs} pairs"
                    )
            axes.set(title=f"{kind}: {group}", xscale="log", yscale="log", ylim=(1e-3, None), xlabel="truncation", ylabel="relative bias")
            axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    plain = [dict(zip(map(str, rows[0]), row, strict=True)) for row in rows[1:]]
    save(arguments.out, arguments.threads, {"horizon": arguments.horizon, "pairs": arguments.pairs, "rows": plain}, figure)


if __name__ == "__main__":
    main()
