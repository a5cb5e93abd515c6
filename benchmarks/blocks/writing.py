"""How figures are written in tables and sentences."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 140


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
