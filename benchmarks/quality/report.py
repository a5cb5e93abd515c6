"""Tables, JSON and plots of the quality benchmark."""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from optimizers import DEFAULTS, EXACT, GRIDS, HORIZON, LEARNED, LEARNED_NAMES, REFERENCE, SENSITIVITY, STORED
from training import PROBLEMS, Results, final, training_curve

from learned_optim import speed as measure
from learned_optim.speed import BOUNDS, LENGTHS, geometric_mean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666", "#E69F00", "#56B4E9")  # Okabe & Ito (2008)


def envelope(results: Results, task: str, seeds: int) -> list[tuple[float, float]]:
    """(steps, lowest training loss) that tuned AdamW reaches by then, whatever length it is run for: mean over the seeds, smoothed."""
    best = results.best(task, REFERENCE, seeds)
    lengths = (1.0, *LENGTHS)
    return measure.envelope(
        [measure.mean([training_curve(results.runs[task, best, seed, length]) for seed in range(seeds)]) for length in lengths]
    )


def speed(results: Results, task: str, name: str, seed: int, seeds: int) -> float:
    """See the program's description."""
    curve = training_curve(results.runs[task, name, seed, 1.0])
    return measure.speed(curve, envelope(results, task, seeds), PROBLEMS[task].solved)


def formats(tasks: list[str], results: Results, seeds: int, untuned: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The speed with each format of the state over that with fp32: `ratio`, a geometric mean over tasks of that over seeds, and `error`,
    the standard error of its logarithm. Both formats have the same seeds, on each task as many as were run: `seeds` (fewest) to `most`.
    And the speed itself with so many seeds of ours, which scatters less than with those of the other tables, each task's, and of each
    task how many seeds there are and how many of their runs end above a loss, `untuned`."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*LEARNED_NAMES, *STORED):
        exact = f"{name.split()[0]} {EXACT}"
        counts = [next(n for n in itertools.count() if not results.complete(task, [name, exact], n + 1)) for task in tasks]
        if name == exact or min(counts) < 2:
            continue
        means, variances, speeds, above = [], [], [], {}
        for task, count in zip(tasks, counts, strict=True):
            pairs = [[math.log(speed(results, task, one, seed, seeds)) for one in (name, exact)] for seed in range(count)]
            gains = [mine - others for mine, others in pairs]
            means.append(statistics.fmean(gains))
            speeds.append(math.exp(statistics.fmean(mine for mine, _ in pairs)))
            variances.append(statistics.variance(gains) / count)
            if task in untuned:
                above[task] = sum(final(results.runs[task, name, seed, 1.0]) > untuned[task] for seed in range(count))
        error = math.sqrt(sum(variances)) / len(tasks)
        found[name] = {"ratio": math.exp(statistics.fmean(means)), "error": error, "seeds": min(counts), "most": max(counts)}
        found[name] |= {"speed": geometric_mean(speeds), "tasks": dict(zip(tasks, speeds, strict=True)), "above": above}
        found[name]["counts"] = dict(zip(tasks, counts, strict=True))
    return found


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table."""
    cells = [[f"{cell:#.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def report(tasks: list[str], results: Results, seeds: int, out: Path) -> None:
    """Prints the tables and writes results.json and the plots, for what has been run on all of the tasks."""

    def complete(*names: str) -> bool:
        return all(results.complete(task, names, seeds) for task in tasks)

    def runs(task: str, name: str) -> list[dict[str, Any]]:
        return [results.runs[task, name, seed, 1.0] for seed in range(seeds)]

    tuned = {family: {task: results.best(task, family, seeds) for task in tasks} for family, grid in GRIDS.items() if complete(*grid)}
    columns = {f"{family} tuned": names for family, names in tuned.items()}
    untuned = [*LEARNED_NAMES, *DEFAULTS, *SENSITIVITY, *STORED]
    columns |= {name: dict.fromkeys(tasks, name) for name in untuned if complete(name)}
    figures: dict[str, dict[str, Any]] = {}
    for column, names in columns.items():
        by_task = {}
        for task in tasks:
            found = runs(task, names[task])
            by_task[task] = {
                "setting": names[task],
                "train": statistics.fmean(map(final, found)),
                "validation": statistics.fmean(statistics.fmean(point[2] for point in run["curve"][-3:]) for run in found),
                "speed": geometric_mean([speed(results, task, names[task], seed, seeds) for seed in range(seeds)]),
                "diverged": sum(diverged(run) for run in found),
                "ms_per_step": statistics.median(1000 * run["curve"][-1][3] / run["curve"][-1][0] for run in found),
            }
        speeds = {task: found["speed"] for task, found in by_task.items()}
        worst = min(speeds, key=lambda task: speeds[task])
        figures[column] = {
            "speed": geometric_mean(list(speeds.values())),
            "worst": {"task": worst, "speed": speeds[worst]},
            "diverged": sum(found["diverged"] for found in by_task.values()),
            "tasks": by_task,
        }

    summary: list[list[object]] = [["", "speed, geometric mean", "worst task", "its speed", "runs that diverged"]]
    ordered = sorted(figures.items(), key=lambda item: -item[1]["speed"])
    summary += [[name, one["speed"], one["worst"]["task"], one["worst"]["speed"], one["diverged"]] for name, one in ordered]
    shown = [name for name in (f"{REFERENCE} tuned", DEFAULTS[0], LEARNED, HORIZON) if name in figures]
    by_task: list[list[object]] = [["task", "tuned to", *(f"{name}: train" for name in shown), *(f"{name}: speed" for name in shown[2:])]]
    for task in tasks:
        losses = [figures[name]["tasks"][task]["train"] for name in shown]
        by_task.append([task, tuned[REFERENCE][task], *losses, *(figures[name]["tasks"][task]["speed"] for name in shown[2:])])
    text = f"{table(summary)}\n\n{table(by_task)}\n"
    untuned_losses = {task: found["train"] for task, found in figures.get(DEFAULTS[0], {"tasks": {}})["tasks"].items()}
    if stored := formats(tasks, results, seeds, untuned_losses):
        heads = ["format of the state", "speed / with fp32", "standard error", "seeds", "on some tasks", "speed", "below 0.7"]
        rows: list[list[object]] = [[*heads, f"runs that end above {DEFAULTS[0]}"]]
        for name, one in stored.items():
            slow = ", ".join(f"{task} {value:.2f}" for task, value in one["tasks"].items() if value < 0.7)
            above = ", ".join(f"{task} {count}" for task, count in one["above"].items() if count)
            rows.append([name, *(one[key] for key in ("ratio", "error", "seeds", "most", "speed")), slow, above])
        text += f"\n{table(rows)}\n"
    print(f"\n{len(tasks)} tasks, {seeds} seeds, weights {results.weights}\n\n{text}")
    machine = {"platform": platform.platform(), "torch": torch.__version__}
    found = {"weights": results.weights, "seeds": seeds, "machine": machine, "optimizers": figures, "formats": stored}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "tables.md").write_text(text)
    draw(tasks, results, figures, seeds, out)
    print(f"figures: {out / 'results.json'}\ntables: {out / 'tables.md'}\nplots: {out / 'speed.png'}, {out / 'curves.png'}")


def diverged(run: dict[str, Any]) -> bool:
    """Not finite, or at the end above twice the start."""
    return not math.isfinite(final(run)) or final(run) > 2 * max(run["curve"][0][1], 0.1)


def draw(tasks: list[str], results: Results, figures: dict[str, dict[str, Any]], seeds: int, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in (LEARNED, HORIZON) if name in figures]
    figure = Figure(figsize=(8, 0.28 * len(tasks) + 1), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, name in zip(COLOURS, shown, strict=False):
        axes.plot([figures[name]["tasks"][task]["speed"] for task in tasks], tasks, "o", color=colour, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="speed: steps of tuned AdamW over ours", xlim=BOUNDS)
    axes.set_xticks([0.125, 0.25, 0.5, 0.7, 1, 1.5, 2, 4], ["1/8", "1/4", "1/2", "0.7", "1", "1.5", "2", "4"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    figure.savefig(out / "speed.png")

    columns = 5
    figure = Figure(figsize=(3.2 * columns, 2.4 * math.ceil(len(tasks) / columns)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    for index, task in enumerate(tasks):
        axes = figure.add_subplot(math.ceil(len(tasks) / columns), columns, index + 1)
        for colour, name in zip(COLOURS, [*shown, f"{REFERENCE} tuned", DEFAULTS[0]], strict=False):
            if name not in figures:
                continue
            setting = figures[name]["tasks"][task]["setting"]
            for seed in range(seeds):
                curve = results.runs[task, setting, seed, 1.0]["curve"]
                steps, losses = [point[0] for point in curve], [point[1] for point in curve]
                axes.plot(steps, losses, color=colour, linewidth=0.9, alpha=0.8, label=name if seed == 0 else None)
        axes.set(title=task, yscale="log")
        if index == 0:
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(out / "curves.png")
