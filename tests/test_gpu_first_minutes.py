"""What of `benchmarks/gpu_first_minutes.py` runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tables import load

program, tables = load("gpu_first_minutes"), load("tables")
CPU = torch.device("cpu")
TRY = ["--device", "cpu", "--tiny"]


@pytest.mark.slow
def test_kernels_are_compared_with_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert "No time here was measured" in tables.BLOCKS["gpu.measured"](tables.Files(tmp_path))
    out = tmp_path / "benchmarks" / "results" / "gpu_first_minutes.json"
    program.main([*TRY, "--only", "correctness", "waiting", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = found["parts"]["correctness"]["rows"]
    assert "trouble" not in found["parts"]["correctness"]
    assert {(row["moments"], row["LSTM"]) for row in rows} == set(program.FORMATS)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {row["place"] for row in rows} == {"aligned", "odd address"}
    assert all(row["right"] for row in rows), rows
    assert found["parts"]["waiting"]["trouble"] == "needs a CUDA device"
    assert found["machine"]["torch"] == torch.__version__
    assert "| float32 | int8 | float32 | odd address |" in capsys.readouterr().out
    notes = tables.BLOCKS["gpu.measured"](tables.Files(tmp_path))
    assert f"torch {torch.__version__}" in notes
    assert "| float32 | int8 | float32 | odd address |" in notes


@pytest.mark.slow
def test_models_train(tmp_path: Path) -> None:
    parts = program.main([*TRY, "--only", "models", "large", "meta-training", "race", "--out", str(tmp_path / "found.json")])["parts"]
    assert not [part["trouble"] for part in parts.values() if "trouble" in part]
    assert len(parts["models"]["rows"]) == 2 * 2 * len(program.MAKERS)
    assert parts["large"]["rows"][0]["ends are equal"]
    assert parts["large"]["rows"][0]["moved"]
    assert [row["optimizer"] for row in parts["race"]["rows"]].count(program.ADAMW) == 3


def test_weights_of_the_models() -> None:
    """As many as those that they are named after."""
    width, layers, pixels, _ = program.FULL.vision
    with torch.device("meta"):
        vision, text = program.Vision(width, layers, pixels), program.Text(*program.FULL.text[:4])
        short = program.Text(*program.FULL.race[:4])
    counts = [sum(param.numel() for param in model.parameters()) / 1e6 for model in (vision, text, short)]
    assert counts == pytest.approx([86.6, 355, 124], rel=0.005)


def test_trouble_holds_up_no_other_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device, size: Any) -> Any:
        yield {"found": float("nan")}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(program, "PARTS", {"first": (fails, 0), "long": (fails, 1e9), "last": (lambda *_: [{"found": 1}], 0)})
    parts = program.main([*TRY, "--out", str(tmp_path / "found.json")])["parts"]
    assert parts["first"]["rows"] == [{"found": None}]
    assert parts["first"]["trouble"] == "RuntimeError: out of memory"
    assert "fails" in parts["first"]["traceback"]
    assert parts["long"]["trouble"] == "no time was left"
    assert parts["last"]["rows"] == [{"found": 1}]


def test_time_ends_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PARTS", {"long": (lambda *_: iter([{"found": 1}] * 9), -1e9)})
    assert program.run("long", CPU, program.TINY, until=0.0)["rows"] == [{"found": 1}]


def test_tables_have_all_columns() -> None:
    assert program.table([{"a": 1, "b": 2.5}, {"a": 3, "c": "x"}]) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 2.5 |  |\n| 3 |  | x |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main([])
    assert "no CUDA device" in capsys.readouterr().err
