"""The examples, each run at a small size."""

from __future__ import annotations

import ast
import json
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
NOTEBOOK = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
SHORTER = {
    "STEPS = 200": "STEPS = 20",
    "steps=50, seeds=2, learning_rates=[1e-3, 3e-3, 1e-2]": "steps=20, seeds=1, learning_rates=[1e-2]",
}
INSTALL = re.compile(r'^ *pip install (?:"?\.(?:\[([\w-]+)\])?"?)([\w -]*?) -c (constraints\S*\.txt)(.*)$', re.MULTILINE)


def run(name: str, *arguments: str, folder: Path) -> str:
    call = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
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
    check_install_line(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or "")


def check_install_line(text: str) -> None:
    ((extra, packages, constraints, _),) = INSTALL.findall(text)
    assert not extra or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (ROOT / constraints).read_text(encoding="utf-8")
    assert all(f"\n{package}==" in pinned for package in packages.split())


def test_notebook(tmp_path: Path) -> None:
    """Its cells run one after the other as they are, but for fewer steps; and what they printed last is committed."""
    check_install_line("".join(NOTEBOOK["cells"][0]["source"]))
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output["output_type"] for output in outputs] == ["stream", "display_data", "stream"]
    program = "\n".join("".join(cell["source"]) for cell in cells)
    for before, after in SHORTER.items():
        assert before in program
        program = program.replace(before, after)
    (tmp_path / "notebook.py").write_text(program, encoding="utf-8")
    printed = run(str(tmp_path / "notebook.py"), folder=tmp_path)
    rows = re.compile(r"^(?:LearnedOptimizer|AdamW)[^\d\n]*?(?=  )", re.MULTILINE)
    assert rows.findall(printed)
    for output in (outputs[0], outputs[2]):
        assert set(rows.findall("".join(output["text"]))) <= set(rows.findall(printed))
