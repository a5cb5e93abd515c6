"""Writes the tables of the README, SECURITY.md, the guide, benchmarks/README.md, GPU_NOTES.md and the model cards, from the result files.

    python benchmarks/tables.py            # fills in every table
    python benchmarks/tables.py --check    # changes nothing, and fails with a diff where a table and its file differ

What stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own, is what the function of that name in `BLOCKS`
makes of a committed result file: a table or a paragraph. A new one is such a function with its line in `BLOCKS` of its file in `blocks`,
and the two markers where it is to stand.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from blocks import attacks, cost, engine, examples, gpu, quality, summary
from blocks.files import Files, TableError

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "SECURITY.md", "docs/*.md", "benchmarks/README.md", "benchmarks/GPU_NOTES.md", "pretrained/*/README.md")
START, END = re.compile(r"( *)<!-- table: (.*?) -->"), re.compile(r" *<!-- end -->")

BLOCKS: dict[str, Callable[[Files], str]] = {
    name: block for part in (summary, quality, examples, cost, engine, attacks, gpu) for name, block in part.BLOCKS.items()
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
