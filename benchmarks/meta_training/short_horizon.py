"""A problem with a known answer, on which truncated backprop has the wrong sign and PES the right one.

    python benchmarks/meta_training/short_horizon.py

A noisy quadratic, after Wu et al. 2018 ("Understanding short-horizon bias in stochastic meta-optimization"). Half of its directions are
steep, noisy and solved from the start, the others flat and far from solved. Noise drives the steep ones away step by step, so what too
large a step costs adds up over many more steps than a short truncation sees, and whoever looks two steps ahead takes it for harmless.
One meta-parameter, the logarithm of the step size. The truth is the exact gradient of the whole run.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from common import COLOURS, new_figure, parser, prepare, save, table
from torch import Generator, Tensor

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.meta_train.estimators import estimator, evolved_gradient
from learned_optim.meta_train.unroll import begin

DIMENSIONS, REPLICAS = 20, 4
CURVES = {"truth": ("exact", None), "truncated backprop": ("exact", 2), "truncated ES": ("es", 2), "PES": ("pes", 2)}


class NoisyQuadratic:
    """Half the sum of `curvature * (w - noise)^2`: the steep half is noisy and starts solved, the flat half is neither."""

    def __init__(self) -> None:
        self.shapes = {"w": torch.Size([DIMENSIONS])}
        steep = torch.arange(DIMENSIONS) < DIMENSIONS // 2
        self.curvature = torch.where(steep, 1.0, 0.01)
        self.noise = torch.where(steep, 2.0, 0.0)
        self.start = torch.where(steep, 0.0, 4.0)

    def init(self, generator: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"w": self.start + 0.1 * torch.randn(DIMENSIONS, generator=generator)}, {}

    def batch(self, generator: Generator) -> tuple[Tensor, ...]:
        return (self.noise * torch.randn(DIMENSIONS, generator=generator),)

    def validation_batch(self, generator: Generator) -> tuple[Tensor, ...]:
        return (torch.zeros(DIMENSIONS),)

    def loss(self, params: dict[str, Tensor], buffers: Any, batch: tuple[Tensor, ...], training: bool = True) -> tuple[Tensor, Any]:
        return 0.5 * (self.curvature * (params["w"] - batch[0]).square()).sum(), buffers


def meta_gradient(name: str, truncation: int, log_step_size: float, seed: int, arguments: Any) -> float:
    """The sum over a run of an estimator's gradients by the step size's logarithm; the loss is the noise-free one."""
    network = OptimizerNetwork(NetworkConfig()).requires_grad_(True)
    network.log_step_size.data.fill_(log_step_size)
    weights = {"log_step_size": network.log_step_size}
    horizon = arguments.horizon
    unroll = begin(NoisyQuadratic(), seed, None, REPLICAS, network.config, "cpu", horizon=horizon, horizon_known=False, validation=True)
    config = MetaTrainConfig(truncation=truncation, horizon_min=horizon, horizon_max=horizon, pairs=arguments.pairs, sigma=0.03)
    total = 0.0
    while unroll.step < horizon:
        unroll, estimate = estimator(name)(unroll, network, weights, config)
        gradient = estimate.gradient or evolved_gradient(estimate, weights, config, name)
        total += gradient["log_step_size"].item() * truncation / horizon
    return total


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "short_horizon")
    options.add_argument("--horizon", type=int, default=64)
    options.add_argument("--pairs", type=int, default=64)
    options.add_argument("--seeds", type=int, default=4)
    arguments = options.parse_args(argv)
    prepare(arguments.threads)

    step_sizes = [0.08 * 2 ** (exponent / 2) for exponent in range(9)]
    rows: list[list[object]] = [["step size", *CURVES]]
    for step_size in step_sizes:
        row: list[object] = [step_size]
        for name, truncation in CURVES.values():
            runs = [
                meta_gradient(name, truncation or arguments.horizon, math.log(step_size), seed, arguments)
                for seed in range(arguments.seeds)
            ]
            row.append(statistics.fmean(runs))
        rows.append(row)
        print(*row, flush=True)
    print(
        f"\nMeta-gradient by the logarithm of the step size, {arguments.horizon} steps, truncations of 2; mean of {arguments.seeds} seeds."
    )
    print("Where it is negative, larger steps are better.\n")
    print(table(rows))
    wrong = {
        name: sum(row[1] * row[1 + index] < 0 for row in rows[1:])  # type: ignore[operator]
        for index, name in enumerate(CURVES)
        if index
    }
    print("\nstep sizes at which the sign is wrong: " + ", ".join(f"{name}: {count} of {len(step_sizes)}" for name, count in wrong.items()))

    figure = new_figure(6, 4)
    axes = figure.subplots()
    for index, (colour, name) in enumerate(zip(COLOURS, CURVES, strict=False), 1):
        axes.plot(step_sizes, [row[index] for row in rows[1:]], "o-", color=colour, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="step size", ylabel="meta-gradient by its logarithm")
    axes.legend(frameon=False)
    save(arguments.out, arguments.threads, {"table": rows, "wrong_signs": wrong}, figure)


if __name__ == "__main__":
    main()
