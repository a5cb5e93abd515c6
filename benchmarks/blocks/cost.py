"""What steps and iterations cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .files import ITERATIONS, SHARDED, SPEED, Files
from .writing import bold, listing, milliseconds, prose, records, table

MINE, FUSED, PYLO = "LearnedOptimizer", "AdamW, fused", "PyLO small_fc_lopt"


def by_weights(files: Files) -> dict[int, dict[str, Any]]:
    return {one["weights"]: one for one in records(files(SPEED)["by weights"])}


def tensors(files: Files, count: int) -> dict[str, Any]:
    (found,) = (one for one in records(files(SPEED)["by tensors"]) if one["tensors, dtype"] == f"{count}, float32")
    return found


def state(files: Files) -> dict[str, float]:
    return {one["optimizer"]: one["state, bytes a weight"] for one in records(files(SPEED)["state"])}


def speed_steps(files: Files) -> str:
    shown = {FUSED: "fused AdamW", "AdamW": "AdamW", "Schedule-Free AdamW": "Schedule-Free", "Prodigy": "Prodigy", MINE: "LearnedOptimizer"}
    labels = {f"{weights / 1e6:.0f} million weights": one for weights, one in by_weights(files).items() if weights >= 10**6}
    rows = [["a step", *shown.values(), "ours / fused AdamW"]]
    for label, one in (labels | {"1000 tensors of 1000 weights": tensors(files, 1000)}).items():
        cells = [milliseconds(one[f"{name}, ms"]) if f"{name}, ms" in one else "" for name in shown]
        rows.append([label, *cells, f"{one['ours / AdamW']:.1f}"])
    return table(rows)


def iterations(files: Files) -> str:
    found = records(files(ITERATIONS)["iterations"])
    names = [key.removesuffix(", ms") for key in found[0] if key.endswith(", ms")]
    rows = [
        [
            f"{one['iteration']} ({one['weights'] / 1e6:.2g} million weights)",
            *(milliseconds(one[f"{name}, ms"]) for name in names),
            f"{one['ours / AdamW']:.2f}",
        ]
        for one in found
    ]
    return table([["an iteration", *names, "ours / fused AdamW"], *rows])


def speed_pylo(files: Files) -> str:
    """Nothing where it did not take part."""
    if PYLO not in state(files):
        return ""
    return prose(f"""
        PyLO's `small_fc_lopt`, which has PyTorch operations only on a CPU, takes
        {milliseconds(by_weights(files)[10**6][f"{PYLO}, ms"])} for a million weights and {state(files)[PYLO]:.0f} bytes of state a
        weight; the program's description says how to have it take part.
    """)


def speed_iterations(files: Files) -> str:
    gpt, cnn = records(files(SPEED)["iterations"])
    matrix = dict(files(SPEED)["matrix"][1:])
    side = math.isqrt(max(weights for weights in by_weights(files) if weights <= 2**21))
    lstm, whole = ([one[key].replace("%", " %") for one in (gpt, cnn)] for key in ("our LSTM pass's share", "Newton-Schulz's share"))
    return prose(f"""
        In training a GPT of {gpt["weights"] / 1e6:.1f} million weights on 4,096 characters a batch the LSTM takes {lstm[0]} of an
        iteration, in training a CNN on 128 images {lstm[1]}. Matrices are orthogonalised beside that, in {whole[0]} and {whole[1]}:
        Newton-Schulz on one of {side} x {side} takes {milliseconds(matrix["Newton-Schulz"])}, a step of `torch.optim.Muon`
        {milliseconds(matrix["Muon (bfloat16)"])}. State is {state(files)[MINE]:.0f} bytes a weight (AdamW:
        {state(files)["AdamW"]:.0f}).
    """)


def speed_kernel(files: Files) -> str:
    one = by_weights(files)[10**6]
    plain = one["LearnedOptimizer, reference, ms"]
    mine = one[f"{MINE}, ms"]
    return prose(f"{milliseconds(mine)} against {milliseconds(plain)} for a million weights, {plain / mine:.0f} times as fast.")


def speed_roofline(files: Files) -> str:
    copy = files(SPEED)["bytes a second of a copy"]
    large = [one["ours / roofline"] for weights, one in by_weights(files).items() if weights >= 2 * 10**6]
    moved = by_weights(files)[10**6]["roofline, ms"] * copy / 1e9
    return prose(f"""
        {moved:.0f} bytes a weight and step with the default state. The step takes {min(large):.1f} to {max(large):.1f} times the time
        of copying that many from two million weights on (at {copy / 1e9:.1f} GB a second).
    """)


def speed_tensors(files: Files) -> str:
    many, one = tensors(files, 1000), tensors(files, 1)
    mine, fused = ([row[f"{name}, ms"] for row in (many, one)] for name in (MINE, FUSED))
    return prose(f"""
        A thousand of a thousand weights take {milliseconds(mine[0])}, {mine[0] / mine[1]:.2f} times one of a million in the same table
        ({milliseconds(mine[1])}); fused AdamW takes {fused[0] / fused[1]:.1f} times.
    """)


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}" if value >= 1e9 or not value else f"{value / 1e9:.2f}"


def sharded(files: Files) -> str:
    """What a step of a sharded model would cost each GPU."""
    labels = {"ours": "LearnedOptimizer"}
    parts = ("seconds of links", "seconds of products", "seconds of memory", "seconds")
    rows = [
        [
            "each GPU, a step",
            "state, GB",
            "for the step, GB",
            "sent, GB",
            "links, ms",
            "products, ms",
            "memory, ms",
            "all, ms",
            "of an iteration",
        ]
    ]
    for model in files(SHARDED)["models"]:
        training = model["forward and backward"]["seconds of products"]
        rows.append([bold(f"{model['model']} on {model['GPUs']}"), *[""] * 8])
        for name, one in model["optimizers"].items():
            sizes = [gigabytes(one[key]) for key in ("state", "temporary", "sent")]
            share = one["seconds"] / (one["seconds"] + training)
            rows.append([labels.get(name, name), *sizes, *(f"{1e3 * one[key]:.1f}" for key in parts), f"{share:.0%}"])
    return table(rows)


def sharded_notes(files: Files) -> str:
    assumed, models = files(SHARDED)["assumed"], files(SHARDED)["models"]
    links = listing(f"{model['link, bytes a second'] / 1e9:.0f} GB/s between {model['GPUs']} GPUs" for model in models)
    sent = [model["forward and backward"]["sent"] / 1e9 for model in models]
    return prose(f"""
        Assumed: {links}, {1e6 * assumed["latency"]:.0f} µs a collective, {assumed["bf16"] / 1e12:.0f} TFLOP/s of products in bfloat16,
        {assumed["memory"] / 1e12:.0f} TB/s of memory, {assumed["tokens"]:,} tokens a GPU and batch, and that nothing overlaps. FSDP2
        itself sends {sent[0]:.1f} and {sent[1]:.1f} GB in an iteration.
    """)


BLOCKS: dict[str, Callable[[Files], str]] = {
    "iterations": iterations,
    "speed.steps": speed_steps,
    "speed.pylo": speed_pylo,
    "speed.iterations": speed_iterations,
    "speed.kernel": speed_kernel,
    "speed.roofline": speed_roofline,
    "speed.tensors": speed_tensors,
    "sharded": sharded,
    "sharded.notes": sharded_notes,
}
