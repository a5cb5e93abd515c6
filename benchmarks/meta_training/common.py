"""What the programs of this folder share: options, tables and files, and measurements in a process of their own."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from learned_optim.meta_train import process

Result = TypeVar("Result")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666")  # Okabe & Ito (2008), which colour-blind readers can tell apart


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all programs have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/meta_training") / name, help="folder for results.json and plot.png")
    made.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    return made


def prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    process.settle()  # as `python -m learned_optim.meta_train` does


def machine(threads: int) -> dict[str, Any]:
    """Where the figures were measured. The load counts what else ran when the program ended, itself included."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns, a rule below the first; numbers to the right."""
    cells = [[f"{cell:#.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [any(isinstance(row[column], (int, float)) for row in rows) for column in range(len(widths))]
    lines = ["  ".join(f"{cell:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(out: Path, threads: int, results: dict[str, Any], figure: Any) -> None:
    """Writes `results.json` and `plot.png`, and prints where they are and where they come from."""
    out.mkdir(parents=True, exist_ok=True)
    where = machine(threads)
    (out / "results.json").write_text(json.dumps({"machine": where, **_plain(results)}, indent=1, allow_nan=False) + "\n")
    figure.savefig(out / "plot.png")
    print("\n" + ", ".join(f"{key}: {value}" for key, value in where.items()))
    print(f"figures: {out / 'results.json'}\nplot: {out / 'plot.png'}")


def _plain(value: Any) -> Any:
    """Floats with 6 digits; None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """The function's result, from a fresh process that does nothing else, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
