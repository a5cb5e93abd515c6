"""Meta-training on several processes: real gloo groups, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_train_helpers import tiny_config

from learned_optim import load_network
from learned_optim.config import to_json
from learned_optim.meta_train.__main__ import main

# The meta-optimizer is linear in the gradient, unlike Adam, whose first steps would turn rounding errors into signs.
CONFIG = tiny_config(
    families=("mlp", "regression", "cnn"),
    meta_steps=5,
    unrolls_per_step=4,
    estimators={"coordinate": "exact", "controller": "pes"},
    optimizer="torch.optim.SGD",
    optimizer_options={"momentum": 0.9},
    learning_rate=0.02,
    sigma=0.5,  # PES divides rounding errors by it, and in runs as short as these the controller changes little more than they do
)


def torchrun(
    processes: int, out: Path, *script: str, restarts: int = 0, imports: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """With `imports`, the processes are forks of a launcher that has imported these modules, which takes longer than most scripts."""
    launcher = ["-m", "torch.distributed.run"] if imports is None else [str(Path(__file__).with_name("forked.py")), imports]
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    call = [sys.executable, *launcher, *options, *script]
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(call, capture_output=True, text=True, cwd=out, env=inherited, check=False, timeout=240)


def arguments(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    return ["--config", str(folder / "config.json"), "--out", str(folder / "out")]


# Where a thread outlived the process group, it would abort the process, now and then, after all its work is done.
LEAVING = """
import sys
from pathlib import Path
from learned_optim.meta_train.__main__ import main

main(sys.argv[1:])
if sys.platform == "linux":
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not [name for name in names if "gloo" in name], names
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two processes, which left no thread of their group behind."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "leave.py").write_text(LEAVING)
    done = torchrun(2, folder, str(folder / "leave.py"), *arguments(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run/out"


def test_the_result_does_not_depend_on_the_number_of_processes(shared: Path, tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "run")) == 0
    runs = (tmp_path / "run/out", shared)
    alone, together = (load_network(out).state_dict() for out in runs)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-2, atol=1e-4)  # PES divides rounding errors by its sigma
    losses = [[json.loads(line)["meta_loss"] for line in (out / "stage1/log.jsonl").read_text().splitlines()] for out in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-3)


DYING = """
import os, pathlib, signal, sys
from learned_optim.config import from_json
from learned_optim.meta_train import FAMILIES, MetaTrainConfig, distributed, meta_train

folder = pathlib.Path(sys.argv[1])
config = from_json(MetaTrainConfig, (folder / "config.json").read_text(), "config.json")
died = folder / "died"


def progress(meta_step, figures):
    if distributed.rank() == 1 and meta_step == 3 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)


with distributed.joined("cpu"):
    meta_train(FAMILIES, config, folder=folder / "out/stage1", progress=progress)
"""


def test_a_run_outlives_a_killed_process(shared: Path, tmp_path: Path) -> None:
    arguments(tmp_path / "killed")
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun(2, tmp_path, str(tmp_path / "dying.py"), str(tmp_path / "killed"), restarts=1, imports="learned_optim.meta_train")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed/died").exists()
    whole, killed = (load_network(out / "stage1").state_dict() for out in (shared, tmp_path / "killed/out"))
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())
    steps = [json.loads(line)["meta_step"] for line in (tmp_path / "killed/out/stage1/log.jsonl").read_text().splitlines()]
    assert steps == list(range(5))
