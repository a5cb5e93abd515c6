"""The examples, each run at a small size."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROGRAMS = [path for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
INSTALL = re.compile(r'^ *pip install (?:"?\.(?:\[([\w-]+)\])?"?)([\w -]*?) -c (constraints\S*\.txt)$', re.MULTILINE)


def run(name: str, *arguments: str, folder: Path) -> str:
    call = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_meta_train_your_own_and_push(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((EXAMPLES / "meta_train_your_own.py").read_text().splitlines()) < 43
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_token"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    out = run("meta_train_your_own.py", "0.2", "user/example", folder=tmp_path)
    losses = dict(re.findall(r"^(\S+(?: [\d.]+)?) +final loss ([\d.]+)", out, re.MULTILINE))
    assert list(losses)[:2] == ["default", "mine"]
    assert len(losses) == 6
    assert float(losses["mine"]) < 1.0
    (commit,) = re.findall(r"^pushed as revision (\w+)$", out, re.MULTILINE)
    files = hub.repositories["user/example"].commits[commit]
    assert {"config.json", "model.safetensors", "meta_train.json"} <= files.keys()
    assert "| families | problem |" in files["README.md"].decode(), "the model card of the run"


@pytest.mark.parametrize("path", [*PROGRAMS, EXAMPLES / "meta_train_your_own.py"], ids=lambda path: path.stem)
def test_says_what_to_install(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    ((extra, packages, constraints),) = INSTALL.findall(text)
    assert not extra or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (ROOT / constraints).read_text(encoding="utf-8")
    assert all(f"\n{package}==" in pinned for package in packages.split())
