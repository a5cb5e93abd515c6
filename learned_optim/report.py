"""What the commands print: columns of text, and figures as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text. The first column is flush left, the others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def plain(value: Any) -> Any:
    """Figures in six digits, and None for those that JSON does not have: infinite ones and NaN."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def count(number: int, thing: str) -> str:
    """A number of things: "1 seed", "2 seeds"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
