"""What is installed: the wheel and the editable install, each run from outside the repository, and what importing the package costs."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import learned_optim
from learned_optim.kernels import cpu

ROOT = Path(__file__).parents[1]
SOURCES = {"learned_optim": "learned_optim", "integrations": "learned_optim.integrations", "pretrained": "learned_optim.pretrained"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("something asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""

TRAIN = """
import torch
from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(64, 4)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = LearnedOptimizer(model.parameters())
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
"""

PRINT_WARNINGS = """
import warnings
warnings.showwarning = lambda message, *_: print(message)
"""

HYGIENE = """
import sys
import learned_optim
learned_optim.load_network("default")
third_party = {"huggingface_hub", "transformers", "sklearn", "matplotlib", "scipy"}
ours = {"learned_optim.meta_train", "learned_optim.integrations"}
assert not (third_party | ours | {"learned_optim.cli"}) & sys.modules.keys(), (third_party | ours) & sys.modules.keys()

import contextlib
from learned_optim.cli import main
with contextlib.redirect_stdout(None):
    for command in ("list", "info", "inspect"):
        assert main([command, *["default"] * (command != "list")]) == 0
assert not (third_party | ours) & sys.modules.keys(), (third_party | ours) & sys.modules.keys()
"""

# Prints where each package comes from, one a line.
WHERE = f"""
import importlib, importlib.metadata
for name in {PYPROJECT["tool"]["setuptools"]["packages"]!r}:
    print(importlib.import_module(name).__path__[0])
(script,) = importlib.metadata.distribution("learned-optim").entry_points
assert script.name == "learned-optim" and callable(script.load())
"""


def python(*args: str | Path, executable: str | Path = sys.executable, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the build reads, so that it neither writes to the repository nor packs leftovers of earlier builds."""
    target = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", PYPROJECT["project"]["readme"], "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A C compiler that leaves out the optimisation, which takes most of a build."""
    with pytest.MonkeyPatch.context() as patch:
        script = tmp_path_factory.mktemp("compiler") / "cc"
        script.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
        script.chmod(0o755)
        patch.setenv("CC", str(script))
        yield


@pytest.fixture(scope="module")
def wheel(checkout, compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # By way of the sdist, which must be complete for that.
    python("-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def new_python(tmp_path):
    """Python of a new environment without learned_optim, which finds the packages that it depends on in this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    executable = tmp_path / "venv" / "bin" / "python"
    packages = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable, cwd=tmp_path).strip())
    # A path in a .pth file is searched last, and the .pth files in it, so also this environment's editable install, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def install(executable, *args):
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    python("-m", "pip", "--python", executable, "install", *options, *args, cwd=executable.parent)


def test_listed_packages_are_those_on_disk():
    packages = set()
    for folder, package in SOURCES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            packages.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


def test_wheel_contents(wheel):
    code = {(package, path.relative_to(ROOT / folder)) for folder, package in SOURCES.items() for path in (ROOT / folder).rglob("*.py")}
    data = {("learned_optim", Path("py.typed"))}
    for pattern in ("*/*.json", "*/model.safetensors", "*/README.md"):
        data |= {("learned_optim.pretrained", path.relative_to(ROOT / "pretrained")) for path in (ROOT / "pretrained").glob(pattern)}
    expected = {f"{package.replace('.', '/')}/{path.as_posix()}" for package, path in code | data}
    for name in ("coordinate", "arithmetic", "orthogonal"):
        expected.add(f"learned_optim/kernels/{name}.c")
        if cpu.library() is not None:  # there is a C compiler
            compiled = f"learned_optim/kernels/{name}{importlib.machinery.EXTENSION_SUFFIXES[-2]}"
            expected.add(compiled)
            assert zipfile.ZipFile(wheel).getinfo(compiled).file_size < 1e6, "there is debug information in it"
    assert {f"learned_optim/pretrained/default/{name}" for name in ("config.json", "model.safetensors")} <= expected

    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"learned_optim-{learned_optim.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_trains_a_model_outside_the_repository_without_the_network(wheel, new_python, tmp_path):
    install(new_python, wheel)
    assert (new_python.parent / "learned-optim").exists()
    for place in python("-W", "error", "-c", NO_NETWORK + WHERE + TRAIN, executable=new_python, cwd=tmp_path).split():
        assert Path(place).is_relative_to(tmp_path / "venv")


def test_wheel_from_a_machine_without_a_compiler_is_for_any_platform_and_says_what_is_missing(checkout, new_python, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, checkout, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    install(new_python, wheel)
    said = python("-c", PRINT_WARNINGS + TRAIN, executable=new_python, cwd=tmp_path)
    assert said.count("Install gcc or clang") == 1


def test_editable_install_has_every_package_and_the_weights(checkout, compiler, new_python, tmp_path):
    install(new_python, "--editable", checkout)
    for place in python("-c", WHERE + TRAIN, executable=new_python, cwd=tmp_path).split():
        assert Path(place).is_relative_to(checkout)


def test_import_is_quiet_light_and_offline(tmp_path):
    assert python("-W", "error", "-c", NO_NETWORK + HYGIENE, cwd=tmp_path) == ""


def test_public_names():
    assert set(learned_optim.__all__) == {"LearnedOptimizer", "NetworkConfig", "OptimizerNetwork", "__version__", "compare", "load_network"}
    for name in learned_optim.__all__:
        getattr(learned_optim, name)
