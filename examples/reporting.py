"""What the research examples share: the folder that their results go to, tables, confidence intervals, plots."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe & Ito (2008), readable by all


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all research examples have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for table.md, results.json and plot.png")
    return made


def confidence(values: Tensor) -> tuple[float, float]:
    """The mean of independent values (n,), and half of its 95 % confidence interval by the normal approximation."""
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def bootstrap(values: Tensor, counted: Tensor, groups: Tensor) -> list[float]:
    """The mean of the values that are counted, (n, m) both, and its 95 % interval by bootstrap over groups of rows, (n,)."""
    size = int(groups.max()) + 1
    sums = torch.zeros(2, size).index_add(1, groups, torch.stack([(values * counted).sum(1), counted.sum(1).float()]))
    drawn = sums[:, torch.randint(size, (2000, size), generator=Generator().manual_seed(0))].sum(2)
    bounds = (drawn[0] / drawn[1]).nanquantile(torch.tensor([0.025, 0.975]))
    return [(sums[0].sum() / sums[1].sum()).item(), *bounds.tolist()]


class Report:
    """Collects an example's tables and figures, prints the tables at once, and writes everything at the end."""

    def __init__(self, out: Path) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        torch.manual_seed(0)
        self.out, self.text = out, ""

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """A Markdown table whose first row is the head."""
        cells = [[f"{cell:#.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        self.note("\n".join([title, "", *lines]))

    def note(self, text: str) -> None:
        print(text + "\n", flush=True)
        self.text += text + "\n\n"

    def figure(self, columns: int, rows: int = 1, size: tuple[float, float] = (4.5, 3.5)) -> tuple[Any, Any]:
        """A figure and its axes, (rows, columns)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False)

    def save(self, results: dict[str, Any], figure: Any) -> None:
        """Writes `table.md`, `results.json` and `plot.png`, with the command and the processor's seconds that they took."""
        seconds = round(time.process_time())
        self.out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        origin = {"command": command, "seconds": seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}
        (self.out / "results.json").write_text(json.dumps(origin | _plain(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        head = f"Made by `{command}`, in {seconds} s of one core.\n\n"
        (self.out / "table.md").write_text(head + self.text + "![](plot.png)\n", encoding="utf-8")
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize="small")
        figure.savefig(self.out / "plot.png")
        print(f"{seconds} s of one core; table, figures and plot are in {self.out}")


def _plain(value: Any) -> Any:
    """Values as JSON knows them: floats with 5 digits, None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
