"""Damaged files and states, and runs that were killed."""

from __future__ import annotations

from collections.abc import Callable

from .files import ATTACKS, Files
from .writing import table


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
    "attacks.files": attacks_files,
    "attacks.others": attacks_others,
    "attacks.kills": attacks_kills,
}
