"""The tables of the documents are those of the result files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load("tables")
files, writing = (importlib.import_module(f"blocks.{name}") for name in ("files", "writing"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The documents and the result files, to be changed."""
    results = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.json") if "results" in path.parts]
    for path in (path.relative_to(ROOT) for path in (*results, *tables.documents(ROOT))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def change(path: Path, value: float, *keys: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    one = found
    for key in keys[:-1]:
        one = one[key]
    one[keys[-1]] = value
    path.write_text(json.dumps(found), encoding="utf-8")


def test_tables_are_those_of_the_result_files() -> None:
    assert tables.check() == "", "run python benchmarks/tables.py"


def test_every_block_stands_in_a_document() -> None:
    files = tables.Files(ROOT)
    assert set().union(*(tables.render(path, files)[1] for path in tables.documents(ROOT))) == set(tables.BLOCKS)


@pytest.mark.parametrize(
    ("file", "keys", "documents"),
    [
        (files.LEARNED, ("optimizers", "learned", "speed"), ["README.md", "docs/results.md", "benchmarks/README.md"]),
        (
            files.QUALITY,
            ("optimizers", "learned", "speed"),
            ["docs/learning-rate.md", "benchmarks/README.md", "pretrained/small/README.md"],
        ),
        (
            files.DEMO,
            ("tasks", "text transformer", "optimizers", "LearnedOptimizer", "train", "mean"),
            ["docs/results.md", "pretrained/default/README.md"],
        ),
        (files.ABLATIONS, ("parts", "LSTM", "no settings", "geometric mean"), ["docs/results.md"]),
        (files.SPEED, ("by weights", 3, 5), ["docs/cost.md", "benchmarks/README.md"]),
        (files.MACHINE_CODE, ("targets", "sm_80", "apply float32", "bytes"), ["benchmarks/GPU_NOTES.md"]),
        (files.ATTACKS, ("file `config.json`", "slowest, s"), ["SECURITY.md"]),
        ("examples/results/trainer_gpt/results.json", ("evaluation loss", "LearnedOptimizerTrainer", "mean"), ["docs/integrations.md"]),
        ("benchmarks/meta_training/results/large_exact.json", ("exact", "seconds"), ["benchmarks/README.md"]),
    ],
)
def test_a_changed_figure_is_noticed_and_filled_in(copy: Path, file: str, keys: tuple[Any, ...], documents: list[str]) -> None:
    assert tables.check(copy) == ""
    change(copy / file, 7.77, *keys)
    difference = tables.check(copy)
    assert re.findall(r"^--- (\S+)$", difference, re.MULTILINE) == documents
    assert re.search(r"^\+.*7\.(77|8)", difference, re.MULTILINE)
    assert tables.fill(copy) == documents
    assert tables.check(copy) == ""


def test_a_figure_changed_by_hand_is_noticed_and_put_right(copy: Path) -> None:
    page = copy / "docs/results.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(before.replace("| Muon, tuned | ", "| Muon, tuned | 9"), encoding="utf-8")
    assert re.search(r"^-\| Muon, tuned \| 9", tables.check(copy), re.MULTILINE)
    assert tables.fill(copy) == ["docs/results.md"]
    assert page.read_text(encoding="utf-8") == before


def test_what_stands_outside_the_markers_is_left_alone(copy: Path) -> None:
    page = copy / "benchmarks/README.md"
    page.write_text("# New  \n\n  <!-- table: speed.kernel -->\n  old\n  <!-- end -->\n\ttext\n", encoding="utf-8")
    tables.fill(copy)
    first, *block, last = page.read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("# New  ", "\ttext")
    assert all(line.startswith("  ") for line in block[1:])
    assert "old" not in "".join(block)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n<!-- table: quality.sumary -->\n<!-- end -->\n", r"pretrained/small/README.md:2: no table is called 'quality.sumary'"),
        ("one\ntwo\n<!-- table: demo.full -->\n| a |\n", r"pretrained/small/README.md:3: 'demo.full' has no <!-- end -->"),
        (
            "<!-- table: demo.full -->\n<!-- table: demo.short -->\n<!-- end -->\n",
            r"README.md:2: .*'demo.full' of line 1 has no <!-- end -->",
        ),
        ("one\n<!-- end -->\n", r"README.md:2: an <!-- end --> of no table"),
        ("see <!-- table: demo.full --> here\n", r"README.md:1: a marker is a line of its own"),
    ],
)
def test_a_mistake_in_the_markers_is_told_with_file_and_line(copy: Path, text: str, message: str) -> None:
    (copy / "pretrained/small/README.md").write_text(text, encoding="utf-8")
    for call in (tables.check, tables.fill):
        with pytest.raises(tables.TableError, match=message):
            call(copy)


def test_a_result_file_that_is_missing_or_lacks_a_figure_is_told(copy: Path) -> None:
    found = json.loads((copy / files.DEMO).read_text(encoding="utf-8"))
    del found["tasks"]["digits CNN"]["best"]
    (copy / files.DEMO).write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(tables.TableError, match=r"docs/results.md:\d+: .*'demo.short'.*'best'"):
        tables.check(copy)
    (copy / files.DEMO).unlink()
    with pytest.raises(tables.TableError, match=r"docs/results.md:\d+: .*'demo.short'.*demo.json"):
        tables.check(copy)


def test_the_program_fails_with_a_diff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "check", lambda: "")
    assert tables.main(["--check"]) == 0
    monkeypatch.setattr(tables, "check", lambda: "-1\n+2")
    assert tables.main(["--check"]) == 1
    assert "-1\n+2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (2.1134, 0.0243, "2.11 ± .024"),
        (0.0001, 0.00012, ".0001 ± .0001"),
        (0.0803, 0.0139, ".080 ± .014"),
        (12.34, 1.2, "12.3 ± 1.2"),
        (0.0, 0.0, ".0000 ± .0000"),
        (0.5, None, ".500"),
        (None, None, "diverged"),
    ],
)
def test_a_mean_is_no_finer_than_its_deviation(mean: float | None, deviation: float | None, text: str) -> None:
    assert writing.spread({"mean": mean, "deviation": deviation}) == text
