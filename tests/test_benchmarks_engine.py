"""The benchmarks of meta-training and of speed, each at a tiny size: they run, and what they check of the engine holds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (FOLDER, FOLDER / "meta_training"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module(request.param)


def results(program: ModuleType, out: Path, *arguments: object) -> dict[str, Any]:
    program.main([*map(str, arguments), "--out", str(out)])
    assert (out / "plot.png").stat().st_size > 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert found["machine"]["threads"] == 1
    return found


@pytest.mark.parametrize("program", ["memory"], indirect=True)
def test_memory(program: ModuleType, tmp_path: Path) -> None:
    found = results(program, tmp_path, "--lengths", 8, "--width", 4, "--repeats", 1)
    row = dict(zip(*found["table"], strict=True))
    assert row["gradients"] == "same bits"
    assert row["time ratio"] > 0


@pytest.mark.parametrize("program", ["throughput"], indirect=True)
def test_throughput(program: ModuleType, tmp_path: Path) -> None:
    found = results(program, tmp_path, "--families", "mlp", "cnn", "--replicas", 2, "--steps", 3, "--repeats", 1)
    header, *rows = found["table"]
    assert found["medians"]["autograd loops"] > 1
    assert all(float(row[header.index("gradients differ by")]) < program.TOLERANCE for row in rows)


@pytest.mark.parametrize("program", ["bias_variance"], indirect=True)
def test_bias_variance(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "KINDS", ("mlp",))
    found = results(program, tmp_path, "--horizon", 4, "--truncations", 2, 4, "--pairs", 2, "--runs", 1)
    whole = [row for row in found["rows"] if row["truncation"] == 4 and row["estimator"] == "exact"]
    assert len(whole) == len(program.KINDS) * len(program.GROUPS)
    assert all(row["bias"] == 0 for row in whole)


@pytest.mark.parametrize("program", ["short_horizon"], indirect=True)
def test_short_horizon(program: ModuleType, tmp_path: Path) -> None:
    found = results(program, tmp_path, "--horizon", 4, "--pairs", 2, "--seeds", 1)
    assert all(len(row) == 1 + len(program.CURVES) for row in found["table"])


@pytest.mark.parametrize("program", ["large"], indirect=True)
def test_large(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "DEPTH": 1, "LENGTH": 8}.items():
        monkeypatch.setattr(program, name, value)
    for name in (*program.TRAINING, *program.GOALS):
        measured = program.measure(name, 2, 1)
        assert measured.parameters > 5000
        assert measured.seconds > 0


@pytest.mark.parametrize("program", ["processes"], indirect=True)
def test_processes(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The part that each process runs; tests/test_distributed.py has several of them, and kills one."""
    monkeypatch.setattr(program, "UNROLLS", len(program.NAMES))
    program.work(tmp_path, 2, kill_at=-1)
    assert (tmp_path / "done.txt").read_text().split() == ["0", "1"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("program", ["specialise"], indirect=True)
def test_specialise(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "BASELINES", program.BASELINES[:2])  # without what is not among the tests' packages
    monkeypatch.setattr(program, "RATES", (1e-2,))
    monkeypatch.setattr(program, "KINDS", {"curves": (program.KINDS["curves"][0], 16)})
    found = results(program, tmp_path, "curves", "--budgets", 0.05, "--problems", 2, "--tuning", 1)
    assert found["settings"]["Muon"].startswith("0.01")
    assert found["results"].keys() == {"default", "default, no horizon", "0.05 min", "0.05 min, no horizon", "AdamW", "Muon"}
    assert found["results"]["default"]["over default"] == [1, 1, 1]
    assert found["results"][found["best"]]["over the best baseline"] == [1, 1, 1]


@pytest.mark.parametrize("program", ["speed"], indirect=True)
def test_speed(program: ModuleType, tmp_path: Path) -> None:
    found = results(program, tmp_path, "--sizes", 200000, "--tensors", 1, "--rounds", 3, "--skip-iterations")
    row = dict(zip(*found["by weights"], strict=True))
    assert row["LearnedOptimizer, ms"] < row["LearnedOptimizer, reference, ms"], "the compiled kernel pays"
    state = {name: size for name, size, _ in found["state"][1:]}
    assert state["AdamW, fused"] == pytest.approx(8, abs=0.01)
    assert state["LearnedOptimizer"] == pytest.approx(16, abs=0.01)


@pytest.mark.parametrize("program", ["iterations"], indirect=True)
def test_iterations(program: ModuleType, tmp_path: Path) -> None:
    found = results(program, tmp_path, "--problems", "MLP of 20 tensors, 64 examples", "--rounds", 1)
    head, row = found["iterations"]
    one = dict(zip(head, row, strict=True))
    assert one["weights"] == 47458
    assert one["ours / AdamW"] == pytest.approx(one["LearnedOptimizer, ms"] / one["AdamW, fused, ms"], rel=1e-4)
    assert min(one[name] for name in head if name.endswith(", ms")) == one["forward and backward, ms"]


@pytest.mark.parametrize("program", ["clock"], indirect=True)
def test_clock(program: ModuleType, tmp_path: Path) -> None:
    """Tasks of the quality benchmark, one of bf16 weights among them; what is timed is all of an iteration."""
    found = results(program, tmp_path, "--tasks", "linear", "bf16 mlp", "--rounds", 2)["iterations"]
    assert found.keys() == {"linear", "bf16 mlp"}
    for times in found.values():
        assert times.keys() == {"forward and backward", "AdamW, fused", "LearnedOptimizer", "Muon", "Schedule-Free"}
        assert min(times.values()) == times["forward and backward"] > 0


@pytest.mark.parametrize("program", ["kinds"], indirect=True)
def test_a_pretrained_model_is_tuned_for_one_small_set_after_another(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs the extra pretrained-models")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    shape = transformers.BertConfig(vocab_size=60, hidden_size=384, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    monkeypatch.setattr(program, "minilm", lambda: transformers.BertModel(shape, add_pooling_layer=False))
    monkeypatch.setattr(program, "tokens", lambda texts, length: torch.randint(1, 60, (len(texts), length)))
    program.all_summaries.cache_clear()
    first, again, other = (program.sentences(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    model = first.build()
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name.split(".")[-3] for name in trained if "lora" in name} == {"lora_A", "lora_B"}
    assert "head.weight" in trained
    assert all("lora" in name or name.startswith("head") for name in trained), "the pretrained layer is frozen"
    hidden, real, targets = first.batch(torch.Generator().manual_seed(0))
    assert model(hidden, real).shape == (len(targets), program.CLASSES)
    assert torch.equal(hidden, again.batch(torch.Generator().manual_seed(0))[0])
    assert not torch.equal(hidden, other.batch(torch.Generator().manual_seed(0))[0])
    program.all_summaries.cache_clear()
