"""What are the quality benchmark's speeds by the clock?

    pip install -c constraints.txt -e ".[demo]"
    python benchmarks/clock.py

A task's *speed by the clock* is its speed in steps (see quality/__main__.py) times the time of an iteration with fused AdamW, over that
with the optimizer. Iterations are timed apart from the training runs: on each task forward and backward, and the optimizers' steps on
copies of the model, take turns in one process, so that what else the machine does falls on all alike. The tasks are small, so this is where
steps count for most.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from iterations import ADAMW, BASE, MAKERS, MINE, turns

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("meta_training", "quality"))
from common import COLOURS, new_figure, parser, prepare, save, table
from tasks import TASKS

TIMED = {name: MAKERS[name] for name in (ADAMW, MINE, "Muon", "Schedule-Free")}


def measure(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of an iteration with each optimizer, and of what is the same in all."""
    torch.manual_seed(0)
    problem = TASKS[name].make(0)

    def backward() -> None:
        problem.model.zero_grad()
        problem.loss(problem.model, problem.batch()).backward()

    found = turns(problem.model, backward, TIMED, rounds)
    base = found.pop(BASE)
    return {BASE: 1000 * base} | {optimizer: 1000 * (base + step) for optimizer, step in found.items()}


def plot(found: dict[str, dict[str, float]]) -> Any:
    """Iterations in units of AdamW's."""
    figure = new_figure(8, 0.5 + 0.4 * len(found))
    axes = figure.subplots()
    for k, (optimizer, colour) in enumerate(zip(list(TIMED)[1:], COLOURS[1:], strict=False)):
        ratios = [one[optimizer] / one[ADAMW] for one in found.values()]
        axes.barh([place + (k - 1) * 0.27 for place in range(len(ratios))], ratios, 0.27, color=colour, label=optimizer)
    axes.axvline(1, color="#666666", linewidth=0.7)
    axes.set(yticks=range(len(found)), yticklabels=list(found), xlabel="time of an iteration, AdamW's = 1")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "clock")
    options.set_defaults(out=Path("runs/clock"))
    options.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    options.add_argument("--rounds", type=int, default=60)
    arguments = options.parse_args(argv)
    prepare(arguments.threads)
    found = {name: measure(name, arguments.rounds) for name in arguments.tasks}
    head = ["ms of an iteration", BASE, *TIMED, "ours / AdamW"]
    print(table([head, *([name, *one.values(), one[MINE] / one[ADAMW]] for name, one in found.items())]))
    save(arguments.out, arguments.threads, {"iterations": found}, plot(found))


if __name__ == "__main__":
    main()
