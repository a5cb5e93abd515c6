"""The demo, Trainer and the examples."""

from __future__ import annotations

import re
from collections.abc import Callable

from .files import DEMO, EXAMPLES, Files
from .writing import bare, bold, prose, spread, table


def demo_short(files: Files) -> str:
    found = files(DEMO)
    head = [f"final training loss, {found['settings']['seeds']} seeds", "LearnedOptimizer, no settings", "with `total_steps`"]
    rows = [[*head, "AdamW, default (0.001)", "AdamW, best of 10"]]
    for task, label in (("digits CNN", "CNN on scikit-learn's digits"), ("text transformer", "transformer on Python's manual")):
        one = found["tasks"][task]
        names = ["LearnedOptimizer", "LearnedOptimizer, total_steps", "AdamW lr=0.001", one["best"]]
        losses = [one["optimizers"][name]["train"] for name in names]
        lowest = min((loss["mean"] for loss in losses if loss["mean"] is not None), default=None)
        rows.append(
            [label, *(re.sub(r"^[\d.]+", lambda mean: bold(mean[0]), spread(x)) if x["mean"] == lowest else spread(x) for x in losses)]
        )
    return table(rows)


def demo_full(files: Files) -> str:
    rows = [["task", "optimizer", "training loss", "validation loss", "accuracy", "loss / best AdamW"]]
    for task, one in files(DEMO)["tasks"].items():
        for name, figures in one["optimizers"].items():
            setting = name.removeprefix("AdamW lr=")
            label = {
                "LearnedOptimizer": "**LearnedOptimizer, no settings**",
                "LearnedOptimizer, total_steps": "LearnedOptimizer, `total_steps`",
            }.get(name)
            label = label or (f"AdamW, best of 10 ({setting})" if name == one["best"] else f"AdamW, default ({setting})")
            ratio = figures["over_best"]
            shown = "1" if name == one["best"] else "" if ratio is None else f"{ratio:.{0 if ratio >= 10 else 2}f}"
            losses = [spread(figures[key]) for key in ("train", "validation")]
            rows.append([task if name == "LearnedOptimizer" else "", label, *losses, f"{100 * figures['accuracy']:.1f} %", shown])
    return table(rows)


def trainer_losses(files: Files) -> str:
    names = ("AdamW, Trainer's default", "LearnedOptimizer in Trainer", "LearnedOptimizerTrainer")
    programs = {
        "trainer_gpt": "[GPT from scratch](../examples/trainer_gpt.py), Python's manual",
        "trainer_classifier": "[fine-tuning a classifier](../examples/trainer_classifier.py) of code",
    }
    read = {label: files(f"{EXAMPLES}/{name}/results.json") for name, label in programs.items()}
    first = next(iter(read.values()))
    title = f"evaluation loss, mean and each of {len(first['evaluation loss'][names[0]]['seeds'])} seeds, {first['steps']} steps"
    rows = [[title, "Trainer's default: AdamW, 5e-5, linear", "`LearnedOptimizer` in Trainer", "`LearnedOptimizerTrainer`"]]
    for label, found in read.items():
        losses = [found["evaluation loss"][name] for name in names]
        lowest = min(loss["mean"] for loss in losses)
        means = [bold(f"{loss['mean']:.3f}", loss["mean"] == lowest) for loss in losses]
        seeds = [", ".join(f"{one:.3f}" for one in loss["seeds"]) for loss in losses]
        rows.append([label, *(f"{mean} ({each})" for mean, each in zip(means, seeds, strict=True))])
    return table(rows)


def examples_dynamical(files: Files) -> str:
    perplexity = {name: first for name, first, *_ in files(f"{EXAMPLES}/dynamical_language_model/results.json")["table"]}
    return prose(f"""
        perplexity {float(perplexity["learned"]):.1f} on held-out articles, {float(perplexity["RMS"]):.1f} with tuned dynamic evaluation,
        {float(perplexity["static"]):.1f} static;
    """)


def examples_own(files: Files) -> str:
    found = files(f"{EXAMPLES}/meta_train_your_own/results.json")["final loss"]
    lowest = min(one["mean"] for one in found.values())
    labels = {"default": "default weights", "mine": "meta-trained"}
    rates = [name for name in found if name not in labels]
    head = [*labels.values(), *(name.replace("AdamW 0", "AdamW " if i == 0 else "") for i, name in enumerate(rates))]
    cells = [
        f"{bold(bare(one['mean'], 4), one['mean'] == lowest)} ± {bare(one['deviation'], 4)}"
        for one in (found[n] for n in (*labels, *rates))
    ]
    return table([head, cells])


BLOCKS: dict[str, Callable[[Files], str]] = {
    "demo.short": demo_short,
    "demo.full": demo_full,
    "trainer.losses": trainer_losses,
    "examples.dynamical": examples_dynamical,
    "examples.own": examples_own,
}
