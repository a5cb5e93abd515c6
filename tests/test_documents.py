"""README and the guide: every block of Python runs as pasted, outside the clone, and what they name exists."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hub_server import HubServer

import learned_optim
from learned_optim.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
# A comment may stand before a block, on a line of its own: the packages that it needs beside those of the tests.
BLOCK = re.compile(r"(?:<!-- needs: ([\w, ]+) -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What takes minutes is made to take seconds.
SHORTER = {
    "README.md": [('steps=100, budget="3 min"', "steps=5, budget=3"), ("max_steps=50", "max_steps=3")],
    "compare.md": [("steps=300", "steps=20, seeds=1, learning_rates=[0.01]")],
    "meta-training.md": [
        ('steps=100, budget="30 min"', "steps=5, budget=3"),
        ("steps=100, pretrained", "steps=20, seeds=1, learning_rates=[0.01], pretrained"),
        ("meta_steps=100, horizon_max=100, evaluate_every=50", "meta_steps=1, horizon_min=5, horizon_max=5, evaluate_every=1"),
    ],
}
PROCESSES = {"several-gpus.md": 2}  # that torchrun starts
# Runs programs one after the other, each in its folder: starting Python, torch and transformers for each would take longer than most do.
ONE_AFTER_THE_OTHER = """
import os, runpy, sys
for folder in [os.path.abspath(each) for each in sys.argv[1:]]:
    os.chdir(folder)
    runpy.run_path("pasted.py", run_name="__main__")
"""


def blocks(page: Path) -> list[str]:
    """The Python of a page, as far as what it needs is there, and shorter where it would take long."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    runnable = [code for needs, code in found if all(map(importlib.util.find_spec, filter(None, needs.split(", "))))]
    for before, after in SHORTER.get(page.name, []):
        assert any(before in code for code in runnable), f"{page.name} has no {before} any more"
        runnable = [code.replace(before, after) for code in runnable]
    return runnable


def environment(folder: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    return env | {"HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_token", "OMP_NUM_THREADS": "1"}


def with_libraries(code: str) -> bool:
    """Whether it needs libraries that warn of themselves, or read their settings when they are imported."""
    return any(name in code for name in ("transformers", "push_to_hub"))


def run(arguments: list[str], programs: dict[str, str], folder: Path, **variables: str) -> None:
    """Runs Python in a folder where each program has a folder of its own."""
    for name, code in programs.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "pasted.py").write_text(code, encoding="utf-8")
    call, env = [sys.executable, *arguments], environment(folder) | variables
    done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


# What a reader pastes into a session: a block of README, or those of a page of the guide one after the other.
PASTED = dict(zip(("train", "Trainer", "meta-train and push"), blocks(README), strict=True))
PASTED |= {page.name: "\n".join(blocks(page)) for page in GUIDE if blocks(page)}
# What is left of integrations.md depends on what is installed.
ALONE = [name for name in (*PROCESSES, "integrations.md") if name in PASTED]
WITH_LIBRARIES = [name for name, code in PASTED.items() if with_libraries(code) and name not in ALONE]


def assert_pushed(hub: HubServer, repository: str) -> None:
    pushed = hub.repositories[repository]
    assert {"config.json", "model.safetensors", "README.md"} <= pushed.commits[pushed.refs["main"]].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_runs_as_pasted(name: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES[name]}"] if name in PROCESSES else []
    with HubServer() as hub:
        run([*launcher, "pasted.py"], {".": PASTED[name]}, tmp_path, HF_ENDPOINT=hub.url)
        if "push_to_hub" in PASTED[name]:
            assert_pushed(hub, "user/my-optimizer")


@pytest.mark.slow
def test_what_needs_libraries_runs_as_pasted(tmp_path: Path) -> None:
    """Each program pushes to a repository of its own."""
    assert set(WITH_LIBRARIES) == {"Trainer", "meta-train and push", "meta-training.md"}
    programs = {str(i): PASTED[name].replace("user/my-optimizer", f"user/{i}") for i, name in enumerate(WITH_LIBRARIES)}
    with HubServer() as hub:
        run(["-c", ONE_AFTER_THE_OTHER, *programs], programs, tmp_path, HF_ENDPOINT=hub.url)
        pushes = [name for name, code in programs.items() if "push_to_hub" in code]
        assert len(pushes) == 2
        for name in pushes:
            assert_pushed(hub, f"user/{name}")


@pytest.mark.slow
def test_all_others_run_as_pasted_without_a_warning(tmp_path: Path) -> None:
    others = {name: code for name, code in PASTED.items() if name not in (*ALONE, *WITH_LIBRARIES)}
    assert {"train", "use.md", "compare.md", "fine-tuning.md"} <= others.keys()
    run(["-W", "error", "-c", ONE_AFTER_THE_OTHER, *others], others, tmp_path)


def test_every_block_that_looks_like_python_is_run() -> None:
    for page in (README, *GUIDE):
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == len(BLOCK.findall(text)), page.name


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_commands_of_the_documents_exist() -> None:
    for page in (README, *GUIDE):
        for line in re.findall(r"learned-optim ([^`\n]+)", page.read_text(encoding="utf-8")):
            assert shlex.split(line)[0] in {*COMMANDS, "COMMAND", "--version"}, (page.name, line)


def test_versions_of_the_guide_are_those_tested_with() -> None:
    constraints = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-timm.txt"))
    page = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, -]+) \| ([\d.]+(?:, [\d.]+)*)", page, re.MULTILINE)
    pins = [f"{name}=={version}" for names, versions in rows for name, version in zip(names.split(", "), versions.split(", "), strict=True)]
    assert len(pins) == 9
    assert not [pin for pin in pins if f"\n{pin}\n" not in constraints]


def test_citation_has_the_version() -> None:
    assert f"\nversion: {learned_optim.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{learned_optim.__version__}}}" in (ROOT / "docs/citation.md").read_text(encoding="utf-8")


def test_messages_of_the_troubleshooting_are_printed_somewhere() -> None:
    paths = [path for folder in ("learned_optim", "integrations") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert len(messages) > 25
    assert not [message for message in messages if not any(message in text for text in texts)]


@pytest.fixture
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_that_leads_nowhere_is_refused(hooks: ModuleType) -> None:
    assert hooks.target("docs/use.md", "../README.md") == "README.md"
    assert hooks.target("docs/use.md", "../examples") == "examples/README.md"
    assert hooks.target("docs/use.md", "../examples/results") is None
    for link in ("nowhere.md", "../nowhere.py", "../../README.md"):
        with pytest.raises(hooks.PluginError, match=f"docs/use.md links to {link}"):
            hooks.target("docs/use.md", link)
    for path in ("docs/use.md", "README.md", "examples/few_shot.py"):
        assert hooks.in_repository(hooks.in_site(path)) == path


def test_links_of_every_markdown_file_are_looked_at(hooks: ModuleType) -> None:
    """The site's build looks at those of its pages, so each file must be one."""
    folders = ("benchmarks", "docs", "examples", "integrations", "learned_optim", "pretrained")
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    reached = hooks.reached(f"docs/{page.name}" for page in GUIDE)
    assert not {path.relative_to(ROOT).as_posix() for path in files}.difference(reached)
