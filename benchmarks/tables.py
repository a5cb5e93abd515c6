"""Writes the tables of the README, SECURITY.md, the guide, benchmarks/README.md and the model cards, from the result files.

    python benchmarks/tables.py            # fills in every table
    python benchmarks/tables.py --check    # changes nothing, and fails with a diff where a table and its file differ

What stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own, is what the function of that name in `BLOCKS`
makes of a committed result file: a table or a paragraph. A new one is such a function with its line in `BLOCKS`, and the two markers
where it is to stand.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "SECURITY.md", "docs/*.md", "benchmarks/README.md", "pretrained/*/README.md")
WIDTH = 140
START, END = re.compile(r"( *)<!-- table: (.*?) -->"), re.compile(r" *<!-- end -->")

QUALITY = "benchmarks/quality/results/results.json"
MNIST = "benchmarks/quality/results/mnist_wikitext.json"
LEARNED = "benchmarks/quality/results/learned.json"  # the same tasks with the present weights; ablations may be of those before
PRETRAINED = "benchmarks/quality/results/pretrained.json"
DISTRIBUTION = "benchmarks/quality/results/distribution.json"
TRAINER = "Trainer-default 5e-05 linear"
HISTORY = "benchmarks/quality/results/history.json"  # of the weights before, by hand: where the default weights change, they get a row
SPEED = "benchmarks/results/speed.json"
ITERATIONS = "benchmarks/results/iterations.json"
SHARDED = "benchmarks/results/sharded.json"
DEMO = "benchmarks/results/demo.json"
ATTACKS = "benchmarks/results/attacks.json"
ENGINE = "benchmarks/meta_training/results"
EXAMPLES = "examples/results"

PLAIN, HORIZON = "learned", "learned+T"  # as the quality benchmark calls the optimizer without and with `total_steps`
UNTUNED = "AdamW-default 0.001"
OPTIMIZERS = {
    HORIZON: "**LearnedOptimizer, `total_steps`**",
    PLAIN: "**LearnedOptimizer, no settings**",
    "Muon tuned": "Muon, tuned",
    "ScheduleFree tuned": "Schedule-Free AdamW, tuned",
    "AdamW tuned": "AdamW, tuned",
    "SGD tuned": "SGD with momentum, tuned",
    "Prodigy 1 cosine": "Prodigy",
    "ScheduleFree-default 0.0025 constant": "Schedule-Free AdamW, default",
    UNTUNED: "AdamW, default (0.001)",
    "Trainer-default 5e-05 linear": "Trainer's default (AdamW, 5e-5, linear)",
}


class TableError(Exception):
    """What is wrong with a document or a result file, and where."""


class Files:
    """The result files of a checkout, by their path in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.read = root, {}

    def __call__(self, path: str) -> Any:
        if path not in self.read:
            if not (self.root / path).is_file():
                raise TableError(f"{path} is missing")
            self.read[path] = json.loads((self.root / path).read_text(encoding="utf-8"))
        return self.read[path]


# How figures are written


def table(rows: Iterable[Sequence[str]]) -> str:
    """Markdown, of rows whose first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * (lines[0].count(" | ") + 1), *lines[1:]]).replace("|  |", "| |").replace("|  |", "| |")


def prose(text: str) -> str:
    """A paragraph, wherever the text's lines are broken."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def listing(items: Iterable[str]) -> str:
    *most, last = [*items] or ["none"]  # of an empty one
    return f"{', '.join(most)} and {last}" if most else last


def word(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def all_but(tasks: list[str]) -> str:
    return f"each task but {listing(tasks)}" if tasks else "each task"


def bare(value: float, decimals: int = 2) -> str:
    """Without the zero before the point."""
    return re.sub(r"^0(?=\.)", "", f"{value:.{decimals}f}")


def times(value: float) -> str:
    """A ratio or a time of a few units."""
    return f"{value:.2f}" if value < 3 else f"{value:.1f}"


def milliseconds(value: float) -> str:
    return f"{value:.{1 if value < 20 else 0}f} ms"


def decimals(value: float, digits: int) -> int:
    """That show so many significant digits, at most four."""
    return min(4, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else 4


def spread(one: dict[str, float | None]) -> str:
    """A mean to three digits and a deviation to two, no finer than that allows."""
    mean, deviation = one["mean"], one["deviation"]
    if mean is None:
        return "diverged"
    if deviation is None:
        return bare(mean, decimals(mean, 3))
    fine = decimals(deviation, 2)
    shown = min(decimals(mean, 3), fine)
    return f"{bare(mean, shown)} ± {bare(deviation, min(fine, shown + 1))}"


def records(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """Of a table in a result file, whose first row is the head."""
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def bold(text: str, whether: bool = True) -> str:
    return f"**{text}**" if whether else text


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# On one screen


def summary(files: Files) -> str:
    """Wins and losses: from scratch, in fine-tuning, and what they cost."""
    found = files(LEARNED)["optimizers"]
    names = (PLAIN, HORIZON, "AdamW tuned", "Muon tuned")

    def row(label: str, cells: Sequence[str], best: Callable[[Iterable[float]], float]) -> list[str]:
        values = [float(cell.split()[0]) if cell else math.nan for cell in cells]
        lead = best(value for value in values if not math.isnan(value))
        return [label, *(bold(cell, value == lead) for cell, value in zip(cells, values, strict=True))]

    scratch = [f"{found[name]['speed']:.2f}" for name in names]
    worst = [f"{found[name]['worst']['speed']:.2f} ({found[name]['worst']['task']})" for name in names]
    every = files(PRETRAINED)["tasks"].values()
    tasks = [task for task in every if tuned(task)]
    tuning = [f"{geometric_mean(task[name]['loss'] / task[tuned(task)]['loss'] for task in tasks):.2f}" for name in names[:2]]
    ratios = {name: [task[name]["loss"] / task[TRAINER]["loss"] for task in every] for name in names[:2]}
    beside = [f"{geometric_mean(found):.2f} ({max(found):.2f})" for found in ratios.values()]
    models = records(files(ITERATIONS)["iterations"])

    def cost(name: str) -> str:
        ratios = [one[f"{name}, ms"] / one[f"{FUSED}, ms"] for one in models]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return table(
        [
            ["", "LearnedOptimizer, no settings", "with `total_steps`", "AdamW, tuned", "Muon, tuned"],
            row(f"from scratch: speed in steps, mean of {len(found[PLAIN]['tasks'])} tasks", scratch, max),
            row("from scratch: speed on the worst task", worst, max),
            row(f"fine-tuning: final loss / tuned AdamW's, {word(len(tasks))} model{'s' * (len(tasks) > 1)}", [*tuning, "1.00", ""], min),
            [f"the same / Trainer's default AdamW's, mean of {word(len(every))} tasks (worst one)", *beside, "", ""],
            [f"time of an iteration / with AdamW, {word(len(models))} models on a CPU", *[cost(MINE)] * 2, "1", cost("Muon")],
            ["state, bytes a weight", *[f"{state(files)[MINE]:.0f}"] * 2, f"{state(files)['AdamW']:.0f}", ""],
        ]
    )


# Quality


def both(optimizers: dict[str, Any], suffix: str = "") -> list[str]:
    """The speeds without settings and with `total_steps`."""
    return [f"{optimizers[name + suffix]['speed']:.2f}" for name in (PLAIN, HORIZON)]


def quality_summary(files: Files) -> str:
    found = files(LEARNED)["optimizers"]
    ordered = sorted(OPTIMIZERS, key=lambda name: -found[name]["speed"])
    rows = [
        [OPTIMIZERS[name], bold(f"{one['speed']:.2f}", "**" in OPTIMIZERS[name]), f"{one['worst']['task']}, {one['worst']['speed']:.2f}"]
        for name in ordered
        for one in [found[name]]
    ]
    return table([["optimizer", "speed, geometric mean", "worst task"], *rows])


def quality_since(files: Files) -> str:
    """The held-out tasks with the weights as they are, and with those that ablations and formats of the state were measured with."""
    before, now = files(QUALITY)["optimizers"], files(LEARNED)["optimizers"]

    def cell(one: dict[str, Any], tasks: Iterable[str]) -> str:
        speeds = {task: one["tasks"][task]["speed"] for task in tasks}
        worst = min(speeds, key=lambda task: speeds[task])
        return f"{geometric_mean(speeds.values()):.2f} ({worst}, {speeds[worst]:.2f})"

    tasks = list(now[PLAIN]["tasks"])
    rows = [[OPTIMIZERS[name], cell(now[name], tasks), cell(before[name], tasks)] for name in (HORIZON, PLAIN)]
    names = [f"optimizer weights {files(path)['weights']}" for path in (LEARNED, QUALITY)]
    return table([[f"speed, geometric mean of {len(tasks)} tasks (worst one)", *names], *rows])


def tuned(found: dict[str, Any]) -> str:
    """The best of AdamW's settings on a pretrained model; none where its grid was not run."""
    grid = [name for name in found if name.startswith("AdamW ")]
    return min(grid, key=lambda name: float(found[name]["loss"])) if len(grid) >= 6 else ""


def quality_pretrained(files: Files) -> str:
    """What fine-tuning a real pretrained model ends at."""
    shown = {"LearnedOptimizer, no settings": PLAIN, "with `total_steps`": HORIZON}
    shown |= {"AdamW, best of six": "", "Trainer's default": TRAINER}
    rows = []
    for task, found in files(PRETRAINED)["tasks"].items():
        ends = [found.get(name or tuned(found)) for name in shown.values()]
        measured = [f"{one['loss']:.3f} ({one['accuracy']:.1%})" if one else "not run" for one in ends]
        rows.append([task, f"{found[PLAIN]['start']:.3f}", *measured])
    return table([["evaluation loss (accuracy)", "start", *shown], *rows])


DRAWN = {
    "median": "speed, median",
    "geometric mean": "geometric mean",
    "5th percentile": "5th percentile",
    "above tuned AdamW": "end above tuned AdamW",
    "above AdamW at 1e-3": "end above AdamW at 0.001",
    "above its start": "end above their start",
}


def quality_distribution(files: Files) -> str:
    """Speeds and shares of all problems, then speeds by what is trained."""
    found = files(DISTRIBUTION)
    modes = list(found["all"])
    rows = [[f"{found['all'][modes[0]]['problems']:.0f} problems, seeds nothing was chosen on", "no settings", "`total_steps`"]]
    for key, label in DRAWN.items():
        values = [found["all"][mode][key] for mode in modes]
        rows.append([label, *(f"{100 * value:.0f} %" if "above" in key else f"{value:.2f}" for value in values)])
    for kind, one in found["kinds"].items():
        what = kind if kind in ("adapters", "all weights", "last layers", "new head") else f"{kind}, from scratch"
        speeds = [f"{one[mode]['geometric mean']:.2f}" for mode in modes]
        rows.append([f"geometric mean, {what} ({one[modes[0]]['problems']:.0f})", *speeds])
    return table(rows)


def quality_standing(files: Files) -> str:
    """Whom the optimizer is ahead of, and the tasks on which it is behind."""
    found = files(LEARNED)["optimizers"]

    def behind(name: str) -> str:
        slow = sorted((one["speed"], task) for task, one in found[name]["tasks"].items() if one["speed"] < 1)
        return listing(f"{task} ({speed:.2f})" for speed, task in slow)

    def ahead(name: str) -> str:
        tuned = [
            one.removesuffix(", tuned") for key, one in OPTIMIZERS.items() if "tuned" in key and found[key]["speed"] < found[name]["speed"]
        ]
        return listing(tuned)

    def above(name: str) -> list[str]:
        return [task for task, one in found[name]["tasks"].items() if not one["train"] < found[UNTUNED]["tasks"][task]["train"]]

    diverged = sum(found[name]["diverged"] for name in OPTIMIZERS)
    known, unknown = (all_but(above(name)) for name in (HORIZON, PLAIN))
    either = f"{known}, with `total_steps` and without" if known == unknown else f"{known} with `total_steps`, on {unknown} without"
    return prose(f"""
        {word(diverged).capitalize()} run{"s" * (diverged > 1)} diverged. Without any setting it is ahead of {ahead(PLAIN)}, which were
        tuned for each task; with `total_steps` of {ahead(HORIZON)}. Tuned AdamW needs fewer steps on these tasks: with `total_steps`
        {behind(HORIZON)}; without, {behind(PLAIN)}. In the mean of {word(files(LEARNED)["seeds"])} seeds it ends below AdamW at 0.001
        on {either}.
    """)


def tail(files: Files, name: str) -> str:
    """How many runs end above untuned AdamW, by task."""
    one = files(QUALITY)["formats"][name]
    return listing(f"{count} of {one['counts'][task]} on {task}" for task, count in one["above"].items() if count)


def quality_tail(files: Files) -> str:
    return prose(f"""
        Of the benchmark's single runs these end above AdamW at 0.001: with `total_steps` {tail(files, HORIZON)}, without
        {tail(files, PLAIN)}.
    """)


def quality_seeds(files: Files) -> str:
    found, formats = files(QUALITY), files(QUALITY)["formats"]
    lowest = [min((speed, task) for task, speed in formats[name]["tasks"].items()) for name in (PLAIN, HORIZON)]
    worst = [f"{task} at {speed:.2f} ({formats[PLAIN]['counts'][task]} seeds)" for speed, task in lowest]
    (plain, horizon), counts = both(formats), formats[PLAIN]
    text = f"""
        {word(found["seeds"]).capitalize()} seeds are few: with the {counts["seeds"]} to {counts["most"]} seeds a task that were run to
        compare formats of the state the means are **{plain}** without settings and **{horizon}** with `total_steps`, and the worst tasks
        {worst[0]} and {worst[1]}; the baselines have {word(found["seeds"])} seeds
        ([last table](../benchmarks/quality/results/tables.md)).
    """
    return f"{prose(text)}\n\n{quality_tail(files)}"


def quality_ablations(files: Files) -> str:
    found = files(QUALITY)["optimizers"]
    skeletons = [" skeleton", " skeleton x0.6", " skeleton x2"]
    best = [f"{max(found[name + suffix]['speed'] for suffix in skeletons):.2f}" for name in (PLAIN, HORIZON)]
    rows = [
        ["what is left out", "speed, no settings", "with `total_steps`"],
        ["nothing", *map(bold, both(found))],
        ["the LSTM", *both(found, " -lstm")],
        ["the controller", *both(found, " -controller")],
        ["of the controller, the drift alone: the mean of some fifty gradients", *both(found, " -drift")],
        ["the pace: steps that follow how far gradients agree", *both(found, " -pace")],
        ["the LSTM, the controller and the pace, with the best of three constant step sizes", *best],
        ["nothing, `lr=0.3`", *both(found, " x0.3")],
        ["nothing, `lr=3`", *both(found, " x3")],
    ]
    return table(rows)


def quality_long_steps(files: Files) -> str:
    (plain, horizon), (plain_long, horizon_long) = (both(files(QUALITY)["optimizers"], suffix) for suffix in ("", " x3"))
    return prose(f"""
        With steps three times as long, `lr=3`, the means are {plain_long} in place of {plain} without settings, and {horizon_long} in
        place of {horizon} with `total_steps`.
    """)


def quality_drift(files: Files) -> str:
    found, without = files(QUALITY)["optimizers"], "reinforcement"

    def means(suffix: str) -> str:
        speeds = [
            {task: one["speed"] for task, one in found[name + suffix]["tasks"].items() if task != without} for name in (PLAIN, HORIZON)
        ]
        return " and ".join(f"{geometric_mean(one.values()):.2f}" for one in speeds)

    def on(task: str, suffix: str) -> str:
        return " and ".join(f"{found[name + suffix]['tasks'][task]['speed']:.2f}" for name in (PLAIN, HORIZON))

    task = "ill-conditioned"
    return prose(f"""
        On the tasks but {without} the means, without settings and with `total_steps`, are {means("")} with the drift,
        {means(" -drift")} without; on {task} least squares the speeds are {on(task, "")} with it, {on(task, " -drift")} without.
    """)


def quality_mnist(files: Files) -> str:
    found = files(MNIST)["optimizers"]
    plain, horizon = both(found)
    worst = [f"{found[name]['worst']['task']}, {found[name]['worst']['speed']:.2f}" for name in (PLAIN, HORIZON)]
    return prose(f"""
        The means there are {plain} without settings (worst task: {worst[0]}) and {horizon} with `total_steps` (worst task:
        {worst[1]}).
    """)


def quality_small(files: Files) -> str:
    found, formats = files(QUALITY)["optimizers"], files(QUALITY)["formats"]
    (small, default, exact), tasks = (both(found, suffix) for suffix in (" small-state", "", " fp32-state")), found[PLAIN]["tasks"]
    ratios = [f"{one['ratio']:.3f} ± {one['error']:.3f}" for one in (formats[f"{name} small-state"] for name in (PLAIN, HORIZON))]
    diverged = sum(found[f"{name} small-state"]["diverged"] for name in (PLAIN, HORIZON))
    seeds = formats[f"{PLAIN} small-state"]
    return prose(f"""
        On the quality benchmark's {len(tasks)} held-out tasks, {word(files(QUALITY)["seeds"])} seeds, its speed over tuned AdamW is
        {small[0]} without settings and {small[1]} with `total_steps`; that of `default` {default[0]} and {default[1]}, and with all
        state in fp32 {exact[0]} and {exact[1]}. On more seeds, {seeds["seeds"]} to {seeds["most"]} a task, it has {ratios[0]} and
        {ratios[1]} of the speed with fp32; `benchmarks/README.md`, under "Quality", has the commands. {diverged or "No"}
        run{"s" * (diverged > 1)} diverged.
    """)


def quality_history(files: Files) -> str:
    def pair(one: list[float] | None) -> str:
        return "{:.2f} / {:.2f}".format(*one) if one else ""

    head = ["speed, geometric mean", "first definition, no settings / `total_steps`", "second definition"]
    past = [[one["weights"], pair(one["first"]), pair(one["second"])] for one in files(HISTORY)["before"]]
    now = [f"**the default weights**: {files(HISTORY)['default']}", "", " / ".join(both(files(LEARNED)["optimizers"]))]
    return table([head, *past, now])


def quality_before(files: Files) -> str:
    *_, older, last = (f"{plain:.2f} and {horizon:.2f}" for plain, horizon in (one["second"] for one in files(HISTORY)["before"]))
    return prose(f"""
        The weights before had {last}, without settings and with `total_steps`, those before them {older}
        ([what they won and lost](../pretrained/RESEARCH.md)).
    """)


def quality_state(files: Files) -> str:
    formats = files(QUALITY)["formats"]
    rows = [["state", "bytes a weight", "no settings", "`total_steps`"]]
    for what, size, suffix in (
        ("default: LSTM and drift in bfloat16", "18", ""),
        ("small: moments in bfloat16, LSTM and drift in int8", "9.1", " small-state"),
    ):
        ones = [formats[name + suffix] for name in (PLAIN, HORIZON)]
        rows.append([what, size, *(f"{one['ratio']:.3f} ± {one['error']:.3f}" for one in ones)])
    return table(rows)


def quality_state_notes(files: Files) -> str:
    found, formats = files(QUALITY), files(QUALITY)["formats"]
    (plain, horizon), (plain_few, horizon_few) = both(formats), both(found["optimizers"])
    counts = formats[PLAIN]["counts"]
    by_count = {count: [task for task, n in counts.items() if n == count] for count in sorted(set(counts.values()), reverse=True)}
    seeds = [f"{count} on {listing(tasks) if count > min(by_count) else f'the other {len(tasks)}'}" for count, tasks in by_count.items()]

    def slow(suffix: str) -> str:
        labels = {PLAIN: "no settings", HORIZON: "`total_steps`"}
        named = {label: formats[name + suffix]["tasks"] for name, label in labels.items()}
        return listing(f"{task}, {label} ({speed:.2f})" for label, one in named.items() for task, speed in one.items() if speed < 0.7)

    diverged = sum(found["optimizers"][f"{name}{suffix}"]["diverged"] for name in (PLAIN, HORIZON) for suffix in ("", " small-state"))
    return prose(f"""
        Seeds: {listing(seeds)}. So many also say more about the speed itself: {plain} without settings and {horizon} with
        `total_steps` in the default state, where the {word(found["seeds"])} seeds of the other tables have {plain_few} and {horizon_few}.
        Below 0.7: in the default format {slow("")}, in the small one {slow(" small-state")}.
        AdamW has {word(found["seeds"])} seeds in both.
        {word(diverged).capitalize()} run{"s" * (diverged > 1)} diverged.
    """)


# Demo, Trainer and examples


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


# Cost

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
    labels = {"ours": "LearnedOptimizer", "ours, kernels": "the same, if the Triton kernels took shards"}
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
    found = files(SHARDED)
    assumed, counted, models = found["assumed"], found["PyTorch operations, bytes a weight"], found["models"]
    links = listing(f"{model['link, bytes a second'] / 1e9:.0f} GB/s between {model['GPUs']} GPUs" for model in models)
    sent = [model["forward and backward"]["sent"] / 1e9 for model in models]
    return prose(f"""
        Assumed: {links}, {1e6 * assumed["latency"]:.0f} µs a collective, {assumed["fp32"] / 1e12:.0f} TFLOP/s of products in fp32 and
        {assumed["bf16"] / 1e12:.0f} in bfloat16, {assumed["memory"] / 1e12:.0f} TB/s of memory, {assumed["tokens"]:,} tokens a GPU and
        batch, and that nothing overlaps. FSDP2 itself sends {sent[0]:.1f} and {sent[1]:.1f} GB in an iteration. PyTorch operations move
        {counted["moved"]:,.0f} bytes a weight, and hold at least {counted["temporary"]:.0f} at a time.
    """)


# The meta-training engine


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


KINDS = {"curves": "curves, a small net", "digits": "digits, a small conv net"}


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
        said.append(f"{label}, {name.replace('min', 'minutes')}: {mine:.2f} of the default's final loss, {best:.2f} of the best baseline's")
    return prose(f"What it buys depends on the problem ({'; '.join(said)}).")


def attacks_files(files: Files) -> str:
    rows = [["file", "damaged", "refused by name", "read", "anything else", "slowest"]]
    for part, found in files(ATTACKS).items():
        if part.startswith("file "):
            counts = found["tried"], found["refused"], found["read"], found["tried"] - found["refused"] - found["read"]
            rows.append([part.removeprefix("file "), *map(str, counts), f"{found['slowest, s']:.2f} s"])
    return table(rows)


def attacks_others(files: Files) -> str:
    rows = [["what is odd", "tried", "refused by name", "as the rule says", "anything else"]]
    for part in ("states", "gradients and parameters"):
        found = files(ATTACKS)[part]
        rows.append([part, *map(str, (found["tried"], found["refused"], found["fine"], len(found["other"])))])
    return table(rows)


def attacks_kills(files: Files) -> str:
    rows = [["what was killed", "kills", "runs", "runs that came to the same bits"]]
    for part, found in files(ATTACKS).items():
        if part.startswith("kills "):
            rows.append([part.removeprefix("kills "), *map(str, (found["kills"], found["runs"], found["the same bits"]))])
    return table(rows)


BLOCKS: dict[str, Callable[[Files], str]] = {
    "summary": summary,
    "quality.summary": quality_summary,
    "quality.since": quality_since,
    "quality.pretrained": quality_pretrained,
    "quality.distribution": quality_distribution,
    "quality.standing": quality_standing,
    "quality.seeds": quality_seeds,
    "quality.tail": quality_tail,
    "quality.ablations": quality_ablations,
    "quality.long_steps": quality_long_steps,
    "quality.drift": quality_drift,
    "quality.mnist": quality_mnist,
    "quality.small": quality_small,
    "quality.history": quality_history,
    "quality.before": quality_before,
    "quality.state": quality_state,
    "quality.state_notes": quality_state_notes,
    "demo.short": demo_short,
    "demo.full": demo_full,
    "trainer.losses": trainer_losses,
    "examples.dynamical": examples_dynamical,
    "examples.own": examples_own,
    "iterations": iterations,
    "speed.steps": speed_steps,
    "speed.pylo": speed_pylo,
    "speed.iterations": speed_iterations,
    "speed.kernel": speed_kernel,
    "speed.roofline": speed_roofline,
    "speed.tensors": speed_tensors,
    "sharded": sharded,
    "sharded.notes": sharded_notes,
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
    "attacks.files": attacks_files,
    "attacks.others": attacks_others,
    "attacks.kills": attacks_kills,
}


def documents(root: Path) -> list[Path]:
    return [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def render(path: Path, files: Files) -> tuple[str, set[str]]:
    """A document as it should be, and the names of its blocks."""
    lines, names = path.read_text(encoding="utf-8").splitlines(), set()
    found: list[str] = []
    opened: tuple[int, str] | None = None  # the line and the name of the block that is being read
    for number, line in enumerate(lines, 1):
        where = f"{path.relative_to(files.root)}:{number}"
        if start := START.fullmatch(line):
            if opened:
                raise TableError(f"{where}: a table begins, but {opened[1]!r} of line {opened[0]} has no <!-- end --> yet")
            indent, name = start.groups()
            if name not in BLOCKS:
                raise TableError(f"{where}: no table is called {name!r}; benchmarks/tables.py has {', '.join(BLOCKS)}")
            try:
                text = BLOCKS[name](files)
            except TableError as error:
                raise TableError(f"{where}: {name!r} cannot be made: {error}") from error
            except (ArithmeticError, LookupError, StopIteration, TypeError, ValueError) as error:
                raise TableError(f"{where}: {name!r} cannot be made, its result file lacks something: {error!r}") from error
            found += [line, *textwrap.indent(text, indent).splitlines()]
            opened = number, name
            names.add(name)
        elif END.fullmatch(line):
            if not opened:
                raise TableError(f"{where}: an <!-- end --> of no table")
            found.append(line)
            opened = None
        elif "<!-- table" in line or "<!-- end" in line:
            raise TableError(f"{where}: a marker is a line of its own, <!-- table: NAME --> or <!-- end -->")
        elif not opened:
            found.append(line)
    if opened:
        raise TableError(f"{path.relative_to(files.root)}:{opened[0]}: {opened[1]!r} has no <!-- end -->")
    return "\n".join(found) + "\n", names


def fill(root: Path = ROOT) -> list[str]:
    """Writes the documents that change. Their paths."""
    files, changed = Files(root), []
    for path in documents(root):
        text, _ = render(path, files)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(str(path.relative_to(root)))
    return changed


def check(root: Path = ROOT) -> str:
    """What `fill` would change, as a diff; empty where tables and result files agree."""
    files, found = Files(root), []
    for path in documents(root):
        name = str(path.relative_to(root))
        before, after = path.read_text(encoding="utf-8"), render(path, files)[0]
        found += difflib.unified_diff(before.splitlines(), after.splitlines(), name, f"{name}, from the result files", lineterm="")
    return "\n".join(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail with a diff where a table and its file differ")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.check:
            print("\n".join(f"filled in: {path}" for path in fill()) or "every table is up to date")
        elif difference := check():
            print(f"{difference}\n\ntables differ from their result files: run python benchmarks/tables.py", file=sys.stderr)
            return 1
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
