"""All of it on one screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .cost import FUSED, MINE, state
from .files import DISTRIBUTION, HORIZON, ITERATIONS, LEARNED, PLAIN, PRETRAINED, TRAINER, Files
from .quality import by_the_clock, tuned
from .writing import bold, geometric_mean, records, table, word


def summary(files: Files) -> str:
    """Wins and losses: from scratch, in fine-tuning, and what they cost."""
    found = files(LEARNED)["optimizers"]
    names = (PLAIN, HORIZON, "AdamW tuned", "Muon tuned")

    def row(label: str, cells: Sequence[str], best: Callable[[Iterable[float]], float]) -> list[str]:
        values = [float(cell.split()[0]) if cell else math.nan for cell in cells]
        lead = best(value for value in values if not math.isnan(value))
        return [label, *(bold(cell, value == lead) for cell, value in zip(cells, values, strict=True))]

    scratch = [f"{found[name]['speed']:.2f}" for name in names]
    clock = [f"{geometric_mean(by_the_clock(files, name).values()):.2f}" for name in names]
    worst = [f"{found[name]['worst']['speed']:.2f} ({found[name]['worst']['task']})" for name in names]
    every = files(PRETRAINED)["tasks"].values()
    tasks = [task for task in every if tuned(task)]
    tuning = [f"{geometric_mean(task[name]['loss'] / task[tuned(task)]['loss'] for task in tasks):.2f}" for name in names[:2]]
    ratios = {name: [task[name]["loss"] / task[TRAINER]["loss"] for task in every] for name in names[:2]}
    beside = [f"{geometric_mean(found):.2f} ({max(found):.2f})" for found in ratios.values()]
    drawn = files(DISTRIBUTION)["all"].values()
    speeds = [f"{one['median']:.2f} ({one['5th percentile']:.2f})" for one in drawn]
    problems = f"{next(iter(drawn))['problems']:.0f} problems drawn at random: speed, median (5th percentile)"
    models = records(files(ITERATIONS)["iterations"])

    def cost(name: str) -> str:
        ratios = [one[f"{name}, ms"] / one[f"{FUSED}, ms"] for one in models]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return table(
        [
            ["", "LearnedOptimizer, no settings", "with `total_steps`", "AdamW, tuned", "Muon, tuned"],
            row(f"from scratch: speed in steps, mean of {len(found[PLAIN]['tasks'])} tasks", scratch, max),
            row("the same by the clock, on one thread of a CPU", clock, max),
            row("from scratch: speed in steps on the worst task", worst, max),
            [problems, *speeds, "1.00 (by definition)", ""],
            row(f"fine-tuning: final loss / tuned AdamW's, {word(len(tasks))} task{'s' * (len(tasks) > 1)}", [*tuning, "1.00", ""], min),
            [f"the same / Trainer's default AdamW's, mean of {word(len(every))} tasks (worst one)", *beside, "", ""],
            [f"time of an iteration / with AdamW, {word(len(models))} models on a CPU", *[cost(MINE)] * 2, "1", cost("Muon")],
            ["state, bytes a weight", *[f"{state(files)[MINE]:.0f}"] * 2, f"{state(files)['AdamW']:.0f}", ""],
        ]
    )


BLOCKS: dict[str, Callable[[Files], str]] = {
    "summary": summary,
}
