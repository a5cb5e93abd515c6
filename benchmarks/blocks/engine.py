"""The meta-training engine."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

from .cost import MINE
from .files import ENGINE, Files
from .writing import bare, bold, prose, records, table, times


def estimators_bias(files: Files) -> str:
    found = {(one["task"], one["of"], one["estimator"], one["truncation"]): one for one in files(f"{ENGINE}/bias_variance.json")["rows"]}

    def digits(value: float) -> str:
        return bare(value, max(0, 1 - math.floor(math.log10(value)))) if value >= 1 else bare(value)

    head = [
        "task, meta-parameters",
        "exact, truncation 4 / 8 / 16",
        "first order, 4 / 16 / 32",
        "ES, 4",
        "PES, 8",
        "deviation of one PES pair",
    ]
    rows = [head]
    for group, (kind, label) in itertools.product(("step size", "LSTM"), (("mlp", "MLP"), ("regression", "regression"), ("cnn", "CNN"))):
        exact = " / ".join(bare(found[kind, group, "exact", n]["bias"]) for n in (4, 8, 16))
        first = " / ".join(bare(found[kind, group, "first_order", n]["bias"]) for n in (4, 16, 32))
        es, pes = found[kind, group, "es", 4], found[kind, group, "pes", 8]
        noisy = [f"{bare(es['bias'])} ({bare(es['of it noise'])})", f"{digits(pes['bias'])} ({digits(pes['of it noise'])})"]
        rows.append([f"{label}, {group}", exact, first, *noisy, digits(pes["deviation of a pair"])])
    return table(rows)


def estimators_short_horizon(files: Files) -> str:
    one = next(one for one in records(files(f"{ENGINE}/short_horizon.json")["table"]) if one["step size"] == 0.32)
    truth, backprop, es, pes = (one[key] for key in ("truth", "truncated backprop", "truncated ES", "PES"))
    signed = [f"{value:+.{fine}f}" for value, fine in ((truth, 2), (backprop, 3), (es, 3), (pes, 2))]
    return prose(f"""
        At a step size of 0.32 the truth is {signed[0]}, truncated backprop says {signed[1]} and truncated ES {signed[2]}, PES
        {signed[3]}; above zero smaller steps are better, below it larger ones.
    """)


def engine_memory(files: Files) -> str:
    found = records(files(f"{ENGINE}/memory.json")["table"])
    rows = [["steps", "plain", "recomputed", "plain, a step", "recomputed, a step", "ratio", "gradients"]]
    longest = next(one for one in reversed(found) if one["plain MiB"] != "-")

    def mib(value: float) -> str:
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)  # of the third digit
        return f"{math.floor(value / max(unit, 1.0) + 0.5) * max(unit, 1.0):,.0f} MiB"

    for one in found:
        measured = one["plain MiB"] != "-"
        plain = mib(one["plain MiB"]) if measured else f"would be {longest['plain MiB'] * one['steps'] / longest['steps'] / 1024:.0f} GiB"
        cells = [f"{one[f'{way} ms/step']:.1f} ms" if way == "recompute" or measured else "-" for way in ("plain", "recompute")]
        ratio = f"{one['time ratio']:.2f}" if measured else "-"
        rows.append([str(one["steps"]), plain, mib(one["recompute MiB"]), *cells, ratio, one["gradients"]])
    return table(rows)


def engine_memory_notes(files: Files) -> str:
    found = files(f"{ENGINE}/memory.json")
    ratio = statistics.median(found["time_ratios"].values())
    return prose(f"""
        Plain grows with the length to the power of {found["exponents"]["plain"]:.2f}, recomputed
        {found["exponents"]["recompute"]:.2f}. Recomputation takes {ratio:.2f} times as long, the median over the lengths.
    """)


def engine_large(files: Files) -> str:
    found = files(f"{ENGINE}/large_exact.json")
    labels = {
        MINE: "training by LearnedOptimizer, compiled kernel",
        "LearnedOptimizer, reference": "training by LearnedOptimizer, PyTorch operations",
        "AdamW": "training by AdamW",
        "exact": f"exact meta-gradient, {found['exact']['steps']} steps",
    }
    rows = [["", "a step", "times compiled", "times PyTorch operations", "peak memory"]]
    for name, label in labels.items():
        seconds = found[name]["seconds"]
        ratios = ["1" if name == other else times(seconds / found[other]["seconds"]) for other in [*labels][:2]]
        ratios[0] = bold(ratios[0], name == "exact")
        rows.append([label, f"{times(seconds)} s", *ratios, f"{found[name]['mib'] / 1024:.1f} GiB"])
    return table(rows)


def engine_pes(files: Files) -> str:
    found = files(f"{ENGINE}/large_pes.json")
    pair, one = found["pes"], found[MINE]
    return prose(f"""
        A pair of PES particles trains for {pair["steps"]} steps in **{pair["seconds"] / one["seconds"]:.2f}** times the time of one
        training by the compiled kernel ({pair["seconds"]:.2f} s against {one["seconds"]:.2f} s a step) and
        **{pair["mib"] / one["mib"]:.2f}** times its memory ({pair["mib"] / 1024:.2f} GiB against {one["mib"] / 1024:.2f}).
    """)


def engine_throughput(files: Files) -> str:
    found = files(f"{ENGINE}/throughput.json")
    peers = {"autograd loops": "plain autograd", "higher": "`higher` 0.2.1", "torchopt": "`torchopt` 0.7.3"}
    rows = [["optimizee, parameters", "millions of steps x parameters a second", *peers.values()]]
    for one in records(found["table"]):
        cells = [f"{one[f'x {peer}']:.1f}" for peer in peers]
        rows.append([f"{one['family']}, {one['parameters']:,}", f"{one['learned_optim M/s']:.2f}", *cells])
    return table([*rows, ["median", "", *(bold(f"{found['medians'][peer]:.1f}") for peer in peers)]])


def engine_processes(files: Files) -> str:
    found = files(f"{ENGINE}/processes.json")
    ways = ("CPU time", "clock")
    rows = [["", "by CPU time", "by the clock"]]
    for count, label in (("1", "one process"), ("2", "two processes")):
        rows.append([label, *(f"{statistics.median(found['unrolls_per_second'][way][count]):.2f}" for way in ways)])
    return table([*rows, ["ratio, median of two", *(bold(f"{found['gains'][way]:.2f}") for way in ways)]])


KINDS = {"curves": "curves, a small net", "digits": "digits, a small conv net", "sentences": "sentences, LoRA on MiniLM"}


def engine_specialise(files: Files) -> str:
    rows = [["", "minutes", "default", "specialised", "best baseline, tuned", "specialised / best", "steps to the default's end"]]
    for kind, label in KINDS.items():
        found = files(f"{ENGINE}/specialise_{kind}.json")
        results, best = found["results"], found["best"]
        for name in found["runs"]:
            one = results[name]
            ratio, low, high = one["over the best baseline"]
            reached, usual = (
                each["steps to default's end"] for each in (one, results["default"])
            )  # losses scatter: it may touch it before
            ends = [f"{results[each]['curve'][-1]:.2g}" for each in ("default", name, best)]
            ends[2] += f" ({best} {found['settings'][best]})"
            share = f"{100 * reached / usual:.0f} % of its own" if reached <= 1 else "not reached"
            rows.append([label, name.removesuffix(" min"), *ends, f"{bold(f'{ratio:.2f}', high < 1)} ({low:.2f} to {high:.2f})", share])
            label = ""
    return table(rows)


def engine_specialise_short(files: Files) -> str:
    """For each kind, with the longest budget."""
    said = []
    for kind, label in KINDS.items():
        found = files(f"{ENGINE}/specialise_{kind}.json")
        *_, name = found["runs"]
        mine, best = (found["results"][name][key][0] for key in ("over default", "over the best baseline"))
        said.append(f"{label}, {name.replace('min', 'minutes')}: {mine:.2f} and {best:.2f}")
    return prose(f"What it buys: final loss over the default's, and over the best tuned baseline's ({'; '.join(said)}).")


BLOCKS: dict[str, Callable[[Files], str]] = {
    "estimators.bias": estimators_bias,
    "estimators.short_horizon": estimators_short_horizon,
    "engine.memory": engine_memory,
    "engine.memory_notes": engine_memory_notes,
    "engine.large": engine_large,
    "engine.pes": engine_pes,
    "engine.throughput": engine_throughput,
    "engine.processes": engine_processes,
    "engine.specialise": engine_specialise,
    "engine.specialise_short": engine_specialise_short,
}
