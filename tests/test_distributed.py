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


def torchrun(processes: int, out: Path, *script: str, restarts: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    call = [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.2", *script]
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(call, capture_output=True, text=True, cwd=out, env=inherited, check=False, timeout=240)


def command(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    return ["-m", "learned_optim.meta_train", "--config", str(folder / "config.json"), "--out", str(folder / "out")]


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = torchrun(processes, tmp_path, *command(tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr
    alone, shared = (load_network(tmp_path / str(processes) / "out").state_dict() for processes in (1, 2))
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-2, atol=1e-4)  # PES divides rounding errors by its sigma
    logs = [(tmp_path / str(processes) / "out/stage1/log.jsonl").read_text().splitlines() for processes in (1, 2)]
    losses = [[json.loads(line)["meta_loss"] for line in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-3)


LEAVING = """
import sys
from pathlib import Path
from learned_optim.meta_train.__main__ import main

main(sys.argv[1:])
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_outlives_the_process_group(tmp_path: Path) -> None:
    """One that ran while the interpreter goes would abort the process, now and then, after all its work is done."""
    (tmp_path / "leave.py").write_text(LEAVING)
    done = torchrun(2, tmp_path, str(tmp_path / "leave.py"), *command(tmp_path / "run")[2:])
    assert done.returncode == 0, done.stderr


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


def test_a_run_outlives_a_killed_process(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path, *command(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    command(tmp_path / "killed")
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun(2, tmp_path, str(tmp_path / "dying.py"), str(tmp_path / "killed"), restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed/died").exists()
    whole, killed = (load_network(tmp_path / name / "out/stage1").state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())
    steps = [json.loads(line)["meta_step"] for line in (tmp_path / "killed/out/stage1/log.jsonl").read_text().splitlines()]
    assert steps == list(range(5))
