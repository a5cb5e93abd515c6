"""What memory and time does an exact meta-gradient take, by the length of the unroll?

    python benchmarks/meta_training/memory.py

Keeping the graph of the whole unroll ("plain") is compared with computing it once more, segment by segment ("recompute"). Each measurement
has a process of its own; its peak is the growth of the resident set over that after a warm-up of four steps. The time is the CPU
time, in which other programs do not count, of a second estimate in the same process, which has its memory from the system already, as in
meta-training. Both must give the same gradient to the last bit. The optimizees are MLPs whose memory is nearly all the optimizer's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from typing import NamedTuple

import torch
from common import COLOURS, apart, new_figure, parser, peak_mib, prepare, save, table
from torch import Generator, nn
from torch.nn import functional as F

from learned_optim import load_network
from learned_optim.meta_train import MetaTrainConfig, ModuleTask
from learned_optim.meta_train.estimators import estimator
from learned_optim.meta_train.families.sampling import mlp_module, sampler
from learned_optim.meta_train.unroll import begin

REPLICAS = 4
PAGE = 2**-8  # MiB, the least that can be seen to grow: a tiny unroll may need no more than its warm-up left behind
GOALS = {"plain": 1.0, "recompute": 0.5}  # exponents of the memory's growth with the length


class Measurement(NamedTuple):
    coordinates: int  # of all replicas
    seconds: float
    mib: float
    digest: str  # of the gradient


def classification(width: int) -> ModuleTask:
    generator = Generator().manual_seed(0)
    inputs = torch.randn(1024, width, generator=generator)
    targets = (inputs @ torch.randn(width, 10, generator=generator)).argmax(1)
    return ModuleTask(lambda: mlp_module([width, width, width, 10], nn.Tanh), sampler(inputs, targets, 16), F.cross_entropy)


def measure(width: int, length: int, recompute: bool, threads: int) -> Measurement:
    """One meta-gradient of an unroll of so many steps."""
    prepare(threads)
    network = load_network("default").requires_grad_(True)
    weights = dict(network.named_parameters())
    options = {"horizon_min": length, "horizon_max": length, "recompute": recompute}
    config = MetaTrainConfig(truncation=length, **options)
    unroll = begin(classification(width), 0, None, REPLICAS, network.config, "cpu", horizon=length, horizon_known=True)
    estimator("exact")(unroll, network, weights, dataclasses.replace(config, truncation=4))
    before = peak_mib()
    _, estimate = estimator("exact")(unroll, network, weights, config)
    grown = max(peak_mib() - before, PAGE)
    assert estimate.gradient is not None
    flat = torch.cat([part.flatten() for part in estimate.gradient.values()])
    start = time.process_time()
    estimator("exact")(unroll, network, weights, config)
    seconds = time.process_time() - start
    return Measurement(unroll.optimizees.params.numel(), seconds, grown, hashlib.sha256(flat.numpy().tobytes()).hexdigest())


def slope(points: list[tuple[int, float]]) -> float:
    """Exponent of the power law through the points: least squares of their logarithms."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "memory")
    options.add_argument("--lengths", type=int, nargs="*", default=[64, 256, 1024, 4096], help="of the unroll, in steps")
    options.add_argument("--width", type=int, default=48, help="of the optimizees")
    options.add_argument("--repeats", type=int, default=3, help="up to 256 steps; longer unrolls are measured once")
    options.add_argument("--limit-gib", type=float, default=12.0, help="what would take more memory is left out")
    arguments = options.parse_args(argv)

    medians: dict[str, list[tuple[int, float, float]]] = {name: [] for name in GOALS}  # length, MiB, seconds
    ratios: dict[int, float] = {}
    rows: list[list[object]] = [["steps", "plain MiB", "recompute MiB", "plain ms/step", "recompute ms/step", "time ratio", "gradients"]]
    for length in sorted(arguments.lengths):
        names = list(GOALS)
        if medians["plain"]:
            last, mib, _ = medians["plain"][-1]
            needed = mib * length / last / 1024
            if needed > arguments.limit_gib:
                names.remove("plain")
                print(f"{length} steps: plain is left out, since it would take some {needed:.0f} GiB; the limit is {arguments.limit_gib:g}")
        found: dict[str, list[Measurement]] = {name: [] for name in names}
        for _ in range(arguments.repeats if length <= 256 else 1):  # side by side, so that both see the same load of the machine
            for name in names:
                found[name].append(apart(measure, arguments.width, length, name == "recompute", arguments.threads))
        for name in names:
            mib, seconds = (statistics.median(getattr(one, key) for one in found[name]) for key in ("mib", "seconds"))
            medians[name].append((length, mib, seconds))
        digests = {one.digest for both in found.values() for one in both}
        if "plain" in names:
            ratios[length] = statistics.median(b.seconds / a.seconds for a, b in zip(*found.values(), strict=True))
        now = {name: medians[name][-1] for name in names}
        cells = {name: (mib, 1000 * seconds / length) for name, (_, mib, seconds) in now.items()}
        none = ("-", "-")
        (mib0, ms0), (mib1, ms1) = cells.get("plain", none), cells["recompute"]
        same = "-" if len(names) == 1 else "same bits" if len(digests) == 1 else "DIFFER"
        rows.append([length, mib0, mib1, ms0, ms1, ratios.get(length, "-"), same])
    coordinates = found["recompute"][0].coordinates
    growth = {name: slope([(length, mib) for length, mib, _ in points]) for name, points in medians.items() if len(points) > 1}

    print(
        f"\nExact meta-gradient of {REPLICAS} optimizees, {coordinates} coordinates in all; medians of {arguments.repeats} to 256 steps\n"
    )
    print(table(rows))
    for name, exponent in growth.items():
        print(f"{name}: memory grows with the length to the power of {exponent:.2f} (goal {GOALS[name]})")
    print(f"time of recompute over plain: {statistics.median(ratios.values()):.2f}, median over the lengths (goal: at most 1.35)")

    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    for colour, (name, points) in zip(COLOURS, medians.items(), strict=False):
        lengths, mib, seconds = zip(*points, strict=True)
        left.plot(lengths, mib, "o-", color=colour, label=f"{name}: length^{growth[name]:.2f}" if name in growth else name)
        right.plot(lengths, [1000 * value / length for value, length in zip(seconds, lengths, strict=True)], "o-", color=colour, label=name)
    left.set(xscale="log", yscale="log", xlabel="steps of the unroll", ylabel="peak memory (MiB)")
    right.set(xscale="log", xlabel="steps of the unroll", ylabel="CPU ms per step", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    save(
        arguments.out,
        arguments.threads,
        {"coordinates": coordinates, "table": rows, "exponents": growth, "time_ratios": ratios, "repeats": arguments.repeats},
        figure,
    )


if __name__ == "__main__":
    main()
