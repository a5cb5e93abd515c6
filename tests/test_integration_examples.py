"""The examples of other libraries, each run at a small size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_examples import EXAMPLES, PROGRAMS, run
from test_research_examples import TABLE as RESEARCH

# What each prints, which modules it needs, and how many steps it is run for.
TABLE = [
    ("trainer_gpt.py", ["transformers", "accelerate"], 10, r"^(AdamW|Learned)\S*.*  (\d\.\d{3})   "),
    ("trainer_classifier.py", ["transformers", "accelerate"], 2, r"^(AdamW|Learned)\S*.* loss (\d\.\d{3}) "),
    ("sft_lora.py", ["trl", "peft", "datasets"], 5, r": (\d\.\d{3}) before, (\d\.\d{3}) after 5 steps"),
    ("with_accelerate.py", ["accelerate"], 20, r"^loss (\d\.\d{3}) at the first step, (\d\.\d{3})"),
    ("with_lightning.py", ["lightning"], 20, r"^loss (\d\.\d{3}) before, (\d\.\d{3}) after"),
    ("with_sentence_transformers.py", ["sentence_transformers", "datasets"], 20, r": (\d+)% before, (\d+)% after"),
    ("with_timm.py", ["timm"], 3, r"^loss (\d\.\d{3}) at the first step, (\d\.\d{3})"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modules", "steps", "pattern"), TABLE, ids=[row[0] for row in TABLE])
def test_example(name: str, modules: list[str], steps: int, pattern: str, tmp_path: Path) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"needs {module}: make test-integrations", exc_type=Exception)
    assert len((EXAMPLES / name).read_text().splitlines()) < 82
    found = re.findall(pattern, run(name, str(steps), folder=tmp_path), re.MULTILINE)
    if name.startswith("trainer_"):
        written = json.loads((tmp_path / "runs" / Path(name).stem / "results.json").read_text())["evaluation loss"]
        losses = [float(loss) for _, loss in found]
        assert len(losses) == 3
        assert losses == [round(one["mean"], 3) for one in written.values()]
        if name == "trainer_gpt.py":
            assert max(losses[1:]) < losses[0], "even ten steps are enough to lead AdamW's default"
    else:
        before, after = map(float, found[0])
        assert after > before if "sentence" in name else after < before


def test_every_example_is_run() -> None:
    assert {path.name for path in PROGRAMS} == {*(f"{name}.py" for name in RESEARCH), *(row[0] for row in TABLE)}
