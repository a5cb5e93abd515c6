"""`make measure`: what is done is not done again, and what is measured replaces the committed files."""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_tables import ROOT, files, load

WEIGHTS = "sha256:0"


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, in another folder."""
    before = [*sys.path]
    module = load("measure")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    yield module
    sys.path[:] = before


def test_parts_are_run_in_turn_and_a_run_that_was_stopped_goes_on(measure: ModuleType, tmp_path: Path) -> None:
    done: list[str] = []

    def stopped(folder: Path) -> None:
        raise RuntimeError

    first = {"a": lambda folder: done.append(folder.name), "b": stopped, "c": lambda folder: done.append(folder.name)}
    with pytest.raises(RuntimeError):
        measure.measure(first, WEIGHTS, tmp_path)
    assert done == ["a"]
    whole = first | {"b": lambda folder: done.append(folder.name)}
    for _ in range(2):
        measure.measure(whole, WEIGHTS, tmp_path)
        assert done == ["a", "b", "c"]
    measure.measure(whole, WEIGHTS, tmp_path, again=True)
    measure.measure(whole, "sha256:1", tmp_path)
    assert done == ["a", "b", "c"] * 3


def test_runs_of_other_weights_or_of_another_rule_are_not_packed(measure: ModuleType, tmp_path: Path) -> None:
    runs, packed = tmp_path / "runs.jsonl", tmp_path / "runs.jsonl.xz"
    of = {"weights": WEIGHTS, "behaviour": [1.0, 2.0]}
    kept = [{"task": "a"}, {"task": "b", **of}]
    others = [{"task": "c", **of, "weights": "sha256:1"}, {"task": "d", **of, "behaviour": [1.0, 2.1]}, {"task": "e", "weights": WEIGHTS}]
    lines = [json.dumps(one) for one in kept + others]
    runs.write_text("\n".join(lines) + "\n")
    measure.pack(runs, packed, lambda run: measure.is_of(run, WEIGHTS, [1.0, 2.0001]))
    assert lzma.decompress(packed.read_bytes()).decode().splitlines() == lines[:2]
    measure.unpack(packed, runs)
    assert len(runs.read_text().splitlines()) == 5, "what is there already stays"
    runs.unlink()
    measure.unpack(packed, runs)
    assert runs.read_text().splitlines() == lines[:2]


def test_every_part_replaces_a_committed_file(measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in whose place nothing but their files are written."""
    calls: list[list[str]] = []

    def pretend(*command: Any) -> str:
        words = [str(word) for word in command]
        calls.append(words)
        out = tmp_path / words[words.index("--out") + 1] if "--out" in words else tmp_path / "runs" / Path(words[1]).stem
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "tables.md", "speed.png", "curves.png", "plot.png", "summary.json", "demo.png", "runs.jsonl"):
            (out / name).write_text("{}\n")
        return "".join(f"{name}  final loss 0.5 ± 0.1 over 5 fresh problems\n" for name in ("default", "mine", "AdamW 0.001"))

    monkeypatch.setattr(measure, "call", pretend)
    for packed in ("RUNS", "DRAWN_RUNS", "ABLATION_RUNS", "MULTIPLIER_RUNS", "PRETRAINED_RUNS"):
        monkeypatch.setattr(measure, packed, tmp_path / f"{packed}.xz")
    parts = measure.parts(lambda _: True, tmp_path / "data")
    measure.measure({"learned": parts["learned"]}, WEIGHTS, tmp_path / "runs/measure")
    assert (tmp_path / "RUNS.xz").exists(), "what takes minutes keeps its runs without what takes hours"
    measure.measure(parts, WEIGHTS, tmp_path / "runs/measure")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    committed = {path for path in written if path.startswith(("benchmarks/", "examples/", "pretrained/"))}
    assert all((ROOT / path).is_file() for path in committed if "look_inside" not in path)
    assert {
        files.LEARNED,
        files.QUALITY,
        files.PRETRAINED,
        files.PRETRAINED_HELD_OUT,
        files.DISTRIBUTION,
        files.MNIST,
        files.SPEED,
        files.DEMO,
    } <= committed
    programs = [word for words in calls for word in words if word.startswith(("benchmarks/", "examples/")) and "results" not in word]
    assert all((ROOT / program).exists() for program in programs)
    assert set(parts) - {"learned", "quality", "mnist", "demo"} <= {Path(program).stem for program in programs}
    own = json.loads((tmp_path / "examples/results/meta_train_your_own/results.json").read_text())["final loss"]
    assert own["AdamW 0.001"] == {"mean": 0.5, "deviation": 0.1}


def test_a_part_whose_program_fails_is_not_done(measure: ModuleType, tmp_path: Path) -> None:
    part = {"broken": lambda _: measure.python("-c", "import sys; print('said'); sys.exit(3)")}
    with pytest.raises(measure.subprocess.CalledProcessError):
        measure.measure(part, WEIGHTS, tmp_path)
    assert not (tmp_path / "broken/weights").exists()


def test_a_part_that_wrote_nothing_replaces_nothing(measure: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("new")
    with pytest.raises(FileNotFoundError, match="two"):
        measure.publish(tmp_path, "committed", {"one": "one", "two": "two"})
    assert not (tmp_path / "committed").exists()


def test_the_example_that_only_prints_is_understood(measure: ModuleType) -> None:
    rows = [
        "meta-step 1",
        "default      final loss 0.2622 ± 0.1528 over 5 fresh problems",
        "mine         final loss 0.2 ± 0.1 over 5 fresh problems",
    ]
    rows.append("AdamW 0.03   final loss 0.1689 ± 0.1850 over 5 fresh problems")
    found = measure.losses("\n".join(rows))
    assert list(found) == ["default", "mine", "AdamW 0.03"]
    with pytest.raises(ValueError, match="no losses"):
        measure.losses("nothing")
