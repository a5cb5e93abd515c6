"""What a finished run leaves in its folder: weights, configuration, curves and a model card, ready for `LearnedOptimizer` and the Hub."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import to_json
from ..network import OptimizerNetwork
from ..weights import CARD, CURVES, META_TRAIN, fingerprint
from . import distributed
from .checkpoint import Progress
from .config import MetaTrainConfig
from .evaluate import MODES, final

SMOOTH = 20  # parts of a run that the plot of the meta-loss averages over


def hand_over(
    folder: str | os.PathLike[str],
    network: OptimizerNetwork,
    config: MetaTrainConfig,
    families: Sequence[str],
    progress: Progress,
    command: str,
    timed: bool,
) -> None:
    """Writes `config.json`, `model.safetensors`, `meta_train.json`, `README.md` and, where matplotlib is installed, `curves.png`.

    Args:
        families: the names of those trained on.
        command: how to make the run again.
        timed: it had a budget, so another time it may end some meta-steps earlier or later.
    """
    history, evaluations, adamw = progress.history, progress.evaluations, progress.adamw
    path = Path(folder)
    network.save_pretrained(path)
    (path / META_TRAIN).write_text(to_json(config))
    plotted = plot(path / CURVES, history, evaluations, adamw)
    finite = [loss for loss in history if math.isfinite(loss)]
    part = max(1, len(finite) // 10)
    tenths = f"{sum(finite[:part]) / part:.3f} in the first tenth, {sum(finite[-part:]) / part:.3f} in the last" if finite else "none"
    facts = {
        "families": ", ".join(dict.fromkeys(families)),
        "meta-parameters trained": ", ".join(f"`{prefix or 'all'}`: {name}" for prefix, name in config.estimators.items()),
        "meta-steps": f"{len(history)}, of {config.unrolls_per_step} unrolls of {config.replicas} replicas; {progress.dropped} dropped",
        "horizons, truncation": f"{config.horizon_min} to {config.horizon_max} steps, {config.truncation}",
        "seed": config.seed,
        "meta-loss": tenths,
        "wall time": f"{progress.seconds / 60:.1f} minutes",
        "machine": f"{machine()}, {distributed.world_size()} process(es)",
        "versions": f"learned_optim {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "fingerprint": fingerprint(network),
    }
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: learned-optim\ntags: [learned-optimizer, meta-learning, optimizer, pytorch]\n---\n",
        "# A learned optimizer for PyTorch\n",
        "Meta-trained with learned_optim. It takes the place of AdamW and needs no learning rate. `source`: this folder, or its Hub id.\n",
        "    optimizer = learned_optim.LearnedOptimizer(model.parameters(), source)\n",
        "## How it was made\n\n| | |\n| --- | --- |",
        *(f"| {fact} | {value} |" for fact, value in facts.items()),
        f"\n{'To make it again' if timed else 'The same numbers come out again on the same kind of machine'}:\n\n    {command}\n",
        *table(evaluations, adamw, config),
        *([f"![Meta-loss, score and training curves]({CURVES})"] if plotted else []),
    ]
    (path / CARD).write_text("\n".join(lines) + "\n")


def table(evaluations: Sequence[Mapping[str, Any]], adamw: Mapping[str, Sequence[float]], config: MetaTrainConfig) -> list[str]:
    if not evaluations:
        return []
    best = min(evaluations, key=lambda evaluation: float(evaluation["score"]))
    head = [
        "## What it does\n",
        f"Final loss over AdamW's on held-out tasks of the same families, {config.horizon_max} steps; AdamW with the best of five learning",
        f"rates, constant or with a cosine. Geometric mean {best['score']:.3f}, at meta-step {best['meta_step'] + 1}; it began with",
        f"{evaluations[0]['score']:.3f}.\n",
        f"| task | AdamW's final loss over the first | {' | '.join(MODES)} |\n| --- | --- |{' --- |' * len(MODES)}",
    ]
    rows = [
        f"| {name} | {final(adamw[name]):.4f} | {' | '.join(f'{ratios[mode]:.2f}' for mode in MODES)} |"
        for name, ratios in best["ratios"].items()
    ]
    return [*head, *rows, ""]


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def plot(path: Path, history: Sequence[float], evaluations: Sequence[Mapping[str, Any]], adamw: Mapping[str, Sequence[float]]) -> bool:
    """Draws the meta-loss, the score, and the best evaluation's curves beside AdamW's. Returns whether matplotlib is there to do so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("curves.png is left out, since matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return False
    tasks = list(evaluations[-1]["curves"]) if evaluations else []
    columns = 4
    rows = math.ceil((2 + len(tasks)) / columns)
    figure = Figure(figsize=(3.2 * (columns if tasks else 2), 2.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(rows, columns if tasks else 2, squeeze=False).flat)
    losses = torch.tensor([loss for loss in history if math.isfinite(loss)])
    window = max(1, len(losses) // SMOOTH)
    first = next(axes)
    if len(losses):
        smooth = losses.unfold(0, window, 1).mean(1)
        first.plot(range(window, len(losses) + 1), smooth.tolist(), color="#D55E00")
    first.set(title="meta-loss", xlabel="meta-step")
    second = next(axes)
    second.plot([item["meta_step"] + 1 for item in evaluations], [item["score"] for item in evaluations], "o-", color="#D55E00")
    second.axhline(1, color="#0072B2", linestyle=":")
    second.set(title="final loss / tuned AdamW's", xlabel="meta-step")
    best = min(evaluations, key=lambda evaluation: float(evaluation["score"]))["curves"] if evaluations else {}
    for name in tasks:
        panel = next(axes)
        for curve, colour, line, label in (
            (adamw[name], "#0072B2", "-", "AdamW, tuned"),
            (best[name]["no horizon"], "#D55E00", "-", "learned"),
            (best[name]["horizon"], "#D55E00", "--", "learned, horizon known"),
        ):
            panel.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=line, label=label, linewidth=1)
        panel.set(title=name, yscale="log")
    for panel in axes:
        panel.set_visible(False)
    if tasks:
        figure.legend(*figure.axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    return True
