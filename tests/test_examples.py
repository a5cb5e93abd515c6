"""The examples, each run at a small size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    call = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_meta_train_your_own(tmp_path: Path) -> None:
    assert len((EXAMPLES / "meta_train_your_own.py").read_text().splitlines()) < 40
    out = run("meta_train_your_own.py", "1", folder=tmp_path)
    losses = dict(re.findall(r"^(\S+(?: [\d.]+)?) +final loss ([\d.]+)", out, re.MULTILINE))
    assert list(losses)[:2] == ["default", "mine"]
    assert len(losses) == 6
    assert float(losses["mine"]) < 1.0


@pytest.mark.parametrize("name", ["trainer_gpt.py", "trainer_classifier.py"])
def test_trainer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'learned-optim[transformers]'")
    out = run(name, "--steps", "4", "--seeds", "1", folder=tmp_path)
    losses = dict(re.findall(r"^(\S.*?) +([\d.]+)  \(", out, re.MULTILINE))
    assert list(losses) == ["Trainer, as it comes", "LearnedOptimizerTrainer"]
