"""From scratch, in fine-tuning, and on problems drawn at random."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from .files import (
    ABLATIONS,
    CLOCK,
    DISTRIBUTION,
    HISTORY,
    HORIZON,
    LEARNED,
    MNIST,
    MULTIPLIERS,
    OPTIMIZERS,
    PLAIN,
    PRETRAINED,
    PRETRAINED_HELD_OUT,
    QUALITY,
    TRAINER,
    UNTUNED,
    Files,
)
from .writing import all_but, bold, geometric_mean, listing, prose, table, word

# What is trained where drawn problems begin from a trained model.
STARTED = {"adapters": "adapters", "all weights": "all weights of a trained model", "last layers": "last layers of a trained model"}
STARTED |= {"new head": "new head"}


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


# What each was timed as.
TIMED = {HORIZON: "LearnedOptimizer", PLAIN: "LearnedOptimizer", "Muon tuned": "Muon", "ScheduleFree tuned": "Schedule-Free"}
TIMED |= {"AdamW tuned": "AdamW, fused"}


def by_the_clock(files: Files, name: str) -> dict[str, float]:
    """An optimizer's speed on each task, by the time and not the number of its iterations."""
    times = files(CLOCK)["iterations"]
    return {
        task: one["speed"] * times[task]["AdamW, fused"] / times[task][TIMED[name]]
        for task, one in files(LEARNED)["optimizers"][name]["tasks"].items()
    }


def quality_clock(files: Files) -> str:
    rows, times = [], files(CLOCK)["iterations"].values()
    for name in sorted(TIMED, key=lambda name: -geometric_mean(by_the_clock(files, name).values())):
        speeds, label = by_the_clock(files, name), OPTIMIZERS[name]
        worst = min(speeds, key=lambda task: speeds[task])
        ratio = geometric_mean(one[TIMED[name]] / one["AdamW, fused"] for one in times)
        mean = bold(f"{geometric_mean(speeds.values()):.2f}", "**" in label)
        rows.append([label, f"{files(LEARNED)['optimizers'][name]['speed']:.2f}", f"{ratio:.2f}", mean, f"{worst}, {speeds[worst]:.2f}"])
    return table([["optimizer", "speed in steps", "time of an iteration / fused AdamW's", "speed by the clock", "worst task"], *rows])


def quality_since(files: Files) -> str:
    """The held-out tasks with the weights as they are, and with those that formats of the state were measured with."""
    before, now = files(QUALITY)["optimizers"], files(LEARNED)["optimizers"]

    def cell(one: dict[str, Any], tasks: Iterable[str]) -> str:
        speeds = {task: one["tasks"][task]["speed"] for task in tasks}
        worst = min(speeds, key=lambda task: speeds[task])
        return f"{geometric_mean(speeds.values()):.2f} ({worst}, {speeds[worst]:.2f})"

    tasks = list(now[PLAIN]["tasks"])
    rows = [[OPTIMIZERS[name], cell(now[name], tasks), cell(before[name], tasks)] for name in (HORIZON, PLAIN)]
    names = [f"optimizer weights {files(path)['weights']}" for path in (LEARNED, QUALITY)]
    return table([[f"speed, geometric mean of {len(tasks)} tasks (worst one)", *names], *rows])


GRID = 6  # settings of AdamW at least that it counts as tuned with


def tried(found: dict[str, Any]) -> list[str]:
    """AdamW's settings that were run on a pretrained model, the best first."""
    return sorted((name for name in found if name.startswith("AdamW ")), key=lambda name: float(found[name]["loss"]))


def tuned(found: dict[str, Any]) -> str:
    """The best of AdamW's settings on a pretrained model; none where its grid was not run."""
    grid = tried(found)
    return grid[0] if len(grid) >= GRID else ""


def quality_pretrained(files: Files) -> str:
    """What fine-tuning a real pretrained model ends at."""
    return fine_tuned(files(PRETRAINED)["tasks"], "AdamW, tuned")


def quality_pretrained_held_out(files: Files) -> str:
    """The same of tasks that nothing was chosen on, for which AdamW was not tuned."""
    return fine_tuned(files(PRETRAINED_HELD_OUT)["tasks"])


def fine_tuned(tasks: dict[str, Any], adamw: str = "") -> str:
    """Where tasks end, with a column for tuned AdamW if it has a name."""
    shown = {"LearnedOptimizer, no settings": PLAIN, "with `total_steps`": HORIZON}
    shown |= ({adamw: ""} if adamw else {}) | {"Trainer's default": TRAINER}
    rows = []
    for task, found in tasks.items():
        grid = tried(found)
        ends = [found.get(name or next(iter(grid), "")) for name in shown.values()]
        measured = [f"{one['loss']:.3f} ({one['accuracy']:.1%})" if one else "not run" for one in ends]
        if adamw and 0 < len(grid) < GRID:
            measured[list(shown).index(adamw)] += f", {word(len(grid))} rate{'s' * (len(grid) > 1)} tried"
        count = found[PLAIN]["seeds"]
        rows.append([f"{task}{f', {word(count)} seeds' if count > 1 else ''}", f"{found[PLAIN]['start']:.3f}", *measured])
    return table([["evaluation loss (accuracy)", "start", *shown], *rows])


DRAWN = {
    "geometric mean": "speed, geometric mean",
    "median": "speed, median",
    "5th percentile": "speed, 5th percentile",
    "1st": "speed, 1st percentile; the lowest, if there are fewer than a hundred",
    "above tuned AdamW": "end above tuned AdamW",
    "above AdamW at 1e-3": "end above AdamW at 0.001",
    "above its start": "end above their start",
}


def quality_distribution(files: Files) -> str:
    """Speeds and shares of all problems, then speeds by what is trained."""
    found = files(DISTRIBUTION)
    modes = list(found["all"])
    rows = [
        [f"{found['all'][modes[0]]['problems']:.0f} problems, drawn by seeds that nothing was chosen on", "no settings", "`total_steps`"]
    ]
    for key, label in DRAWN.items():
        values = [found["all"][mode][key] for mode in modes]
        rows.append([label, *(f"{100 * value:.0f} %" if "above" in key else f"{value:.2f}" for value in values)])
    for kind, one in found["kinds"].items():
        what = STARTED.get(kind, f"{kind}, from scratch")
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


# What each part is, by its name in ablations.py.
LEFT_OUT = {
    "nothing": "nothing",
    "LSTM": "the LSTM",
    "orthogonalisation": "orthogonalisation",
    "warm-up": "the warm-up",
    "pace": "the pace: steps that follow how far gradients agree",
    "controller": "both of what follows: no correction adds up",
    "lengthening": "steps that lengthen while gradients agree",
    "bouncing": "steps that shorten where they bounce",
    "proof": "full steps that have to prove themselves",
    "care": "slow climbing of what looks trained",
    "creep": "its climbing without evidence",
    "Adam's direction": "Adam's direction for what looks trained",
    "few matrices": "longer steps in models of one or two matrices",
    "long runs": "shorter steps in long runs",
}


def quality_ablations(files: Files) -> str:
    parts = files(ABLATIONS)["parts"]
    modes = list(parts["nothing"])
    rows = [["what is left out", "speed, no settings", "ends lower / higher", "speed, `total_steps`", "ends lower / higher"]]
    for part, label in LEFT_OUT.items():
        cells = [label]
        for one in (parts[part][mode] for mode in modes):
            cells.append(bold(f"{one['geometric mean']:.2f}", part == "nothing"))
            cells.append("" if part == "nothing" else f"{one['lower']} / {one['higher']}")
        rows.append(cells)
    return table(rows)


def quality_ablations_count(files: Files) -> str:
    one = files(ABLATIONS)["parts"]["nothing"]["no settings"]
    return prose(f"""
        {one["problems"]:.0f} problems drawn at random, of up to 600 steps: the geometric mean of the speed over tuned AdamW, and on how
        many problems a run without the part ends lower and higher than with it.
    """)


def quality_long_steps(files: Files) -> str:
    (plain, horizon), (plain_long, horizon_long) = (both(files(QUALITY)["optimizers"], suffix) for suffix in ("", " x3"))
    return prose(f"""
        With steps three times as long, `lr=3`, the means are {plain_long} in place of {plain} without settings, and {horizon_long} in
        place of {horizon} with `total_steps`.
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
        ("default: LSTM in bfloat16", "16", ""),
        ("small: moments in bfloat16, LSTM in int8", "8.1", " small-state"),
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


def quality_multipliers(files: Files) -> str:
    groups = files(MULTIPLIERS)["groups"]
    names = list(groups["all"]["no settings"])
    rows = [["", "problems", *(f"`lr={name}`" for name in names)]]
    for mode, (group, one) in itertools.product(("no settings", "total_steps"), groups.items()):
        kind = f"from scratch, batches of {group}" if group[0].isdigit() else group
        cells = (f"{one[mode][name]['lower']} / {one[mode][name]['higher']}" for name in names)
        rows.append([kind + (", with `total_steps`" if mode == "total_steps" else ""), str(one["problems"]), *cells])
    return table(rows)


BLOCKS: dict[str, Callable[[Files], str]] = {
    "quality.summary": quality_summary,
    "quality.clock": quality_clock,
    "quality.since": quality_since,
    "quality.pretrained": quality_pretrained,
    "quality.pretrained_held_out": quality_pretrained_held_out,
    "quality.distribution": quality_distribution,
    "quality.standing": quality_standing,
    "quality.seeds": quality_seeds,
    "quality.tail": quality_tail,
    "quality.ablations": quality_ablations,
    "quality.ablations_count": quality_ablations_count,
    "quality.long_steps": quality_long_steps,
    "quality.multipliers": quality_multipliers,
    "quality.mnist": quality_mnist,
    "quality.small": quality_small,
    "quality.history": quality_history,
    "quality.before": quality_before,
    "quality.state": quality_state,
    "quality.state_notes": quality_state_notes,
}
