"""The examples of other libraries, each run at a small size."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from test_distributed import torchrun
from test_examples import EXAMPLES, PROGRAMS, run
from test_research_examples import TABLE as RESEARCH

# What each prints, which modules it needs, and how many steps it is run for.
TABLE = [
    ("sft_lora.py", ["trl", "peft", "datasets"], 5, r": (\d\.\d{3}) before, (\d\.\d{3}) after 5 steps"),
    ("with_accelerate.py", ["accelerate"], 20, r"^loss (\d\.\d{3}) at the first step, (\d\.\d{3})"),
    ("with_lightning.py", ["lightning"], 20, r"^loss (\d\.\d{3}) before, (\d\.\d{3}) after"),
    ("with_lightning_fsdp2.py", ["lightning"], 20, r"^loss (\d\.\d{3}) before, (\d\.\d{3}) after"),  # it starts its two processes
    ("with_sentence_transformers.py", ["sentence_transformers", "datasets"], 20, r": (\d+)% before, (\d+)% after"),
    ("with_timm.py", ["timm"], 3, r"^loss (\d\.\d{3}) at the first step, (\d\.\d{3})"),
]

# Of those that set Trainer's default beside this optimizer: steps, and what they print.
BESIDE = {
    "trainer_gpt.py": (10, r"^(?:AdamW|Learned)\S*.*  (\d\.\d{3})   "),
    "trainer_classifier.py": (2, r"^(?:AdamW|Learned)\S*.* loss (\d\.\d{3}) "),
}

SHARDED = "trainer_fsdp2.py"  # runs in two processes only


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modules", "steps", "pattern"), TABLE, ids=[row[0] for row in TABLE])
def test_example(name: str, modules: list[str], steps: int, pattern: str, tmp_path: Path) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"needs {module}: make test-integrations", exc_type=Exception)
    assert len((EXAMPLES / name).read_text().splitlines()) < 82
    before, after = map(float, re.findall(pattern, run(name, str(steps), folder=tmp_path), re.MULTILINE)[0])
    assert after > before if "sentence" in name else after < before


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.filterwarnings("default")
def test_beside_trainers_default(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With one seed, and in this process, which has imported transformers."""
    for module in ("transformers", "accelerate"):
        pytest.importorskip(module, reason=f"needs {module}: make test-integrations", exc_type=Exception)
    program = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(program.splitlines()) < 82
    assert program.count(" else 300, 3\n") == 1
    (tmp_path / name).write_text(program.replace(" else 300, 3\n", " else 300, 1\n"), encoding="utf-8")
    steps, pattern = BESIDE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(steps)])
    runpy.run_path(name, run_name="__main__")
    losses = [float(loss) for loss in re.findall(pattern, capsys.readouterr().out, re.MULTILINE)]
    written = json.loads((tmp_path / "runs" / Path(name).stem / "results.json").read_text())["evaluation loss"]
    assert len(losses) == 3
    assert losses == [round(one["mean"], 3) for one in written.values()]
    if name == "trainer_gpt.py":
        assert max(losses[1:]) < losses[0], "even ten steps are enough to lead AdamW's default"


def two_processes(name: str, steps: int, folder: Path, imports: str, shim: bool = True, **environment: str) -> tuple[float, float]:
    """The losses that an example prints, once."""
    pytest.importorskip("accelerate", reason="needs accelerate: make test-integrations", exc_type=Exception)
    script = [*([str(Path(__file__).parent / "sharded_accelerate.py")] if shim else []), str(EXAMPLES / name)]
    done = torchrun(2, folder, *script, str(steps), imports=imports, ACCELERATE_USE_CPU="true", **environment)
    assert done.returncode == 0, done.stderr
    ((before, after),) = re.findall(r"^loss (\d\.\d{3}) .*, (\d\.\d{3}) ", done.stdout, re.MULTILINE)
    return float(before), float(after)


@pytest.mark.slow
def test_accelerate_trains_with_fsdp2_as_without(tmp_path: Path) -> None:
    copies = two_processes("with_accelerate.py", 20, tmp_path, "accelerate", shim=False)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}  # as accelerate launch sets them
    sharded = two_processes("with_accelerate.py", 20, tmp_path, "accelerate", **fsdp)
    assert sharded == pytest.approx(copies, abs=0.002)
    assert sharded[1] < sharded[0]
    assert len(list((tmp_path / "runs/with_accelerate/optimizer_0").glob("*.distcp"))) == 2


@pytest.mark.slow
def test_trainer_with_fsdp2_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first, second = (two_processes(SHARDED, steps, tmp_path, "learned_optim.integrations.transformers") for steps in (10, 20))
    assert second[1] < first[1] < first[0]
    steps = [json.loads(path.read_text())["global_step"] for path in sorted((tmp_path / "runs").rglob("trainer_state.json"))]
    assert steps == [10, 20]


def test_every_example_is_run() -> None:
    assert {path.name for path in PROGRAMS} == {*(f"{name}.py" for name in RESEARCH), *(row[0] for row in TABLE), *BESIDE, SHARDED}
