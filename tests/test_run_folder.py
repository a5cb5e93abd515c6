"""The folder of a meta-training run: damage, a full disk, Ctrl-C, what killed runs leave, and two runs at a time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_train_helpers import tiny_config, tiny_task

from learned_optim import load_network
from learned_optim.config import to_json
from learned_optim.meta_train import MetaTrainConfig, checkpoint, meta_train
from learned_optim.meta_train import __main__ as command
from learned_optim.meta_train.folder import claimed

TINY = {"tiny": tiny_task}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that was killed after its second meta-step."""

    def kill(meta_step: int, _: dict[str, float]) -> None:
        if meta_step == 2:
            raise TimeoutError

    with contextlib.suppress(TimeoutError):
        meta_train(TINY, tiny_config(), folder=tmp_path / "run", progress=kill)
    assert checkpoint.saved_steps(tmp_path / "run") == 2
    return tmp_path / "run"


# Damage


def test_a_checkpoint_with_any_bit_flipped_is_refused(folder: Path) -> None:
    whole = (folder / "checkpoint.pt").read_bytes()
    bits = random.Random(0)
    for _ in range(200):
        place = bits.randrange(len(whole))
        content = bytearray(whole)
        content[place] ^= 1 << bits.randrange(8)
        (folder / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"run/checkpoint\.pt is damaged: its checksum does not fit\. Put a copy back, or delete it"):
            checkpoint.load(folder, tiny_config(), "cpu")


@pytest.mark.parametrize("keep", [0, 1, 63, 64, 65, 0.5, -1])
def test_a_cut_checkpoint_is_refused(folder: Path, keep: float) -> None:
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
    with pytest.raises(ValueError, match=r"run/checkpoint\.pt is damaged"):
        meta_train(TINY, tiny_config(), folder=folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no checkpoint of meta-training"),
        ({"config": "{}"}, "is no checkpoint of meta-training"),
        (tiny_config(), "is no checkpoint of meta-training"),  # a class, which is not unpickled
        ({"progress": {}}, "is the checkpoint of another version"),
    ],
)
def test_another_file_with_a_checksum_is_refused_by_name(folder: Path, content: Any, message: str) -> None:
    path = folder / "checkpoint.pt"
    torch.save(content, path)
    checkpoint._seal(path)
    for read in (checkpoint.config_of, lambda folder: checkpoint.load(folder, tiny_config(), "cpu")):
        with pytest.raises(ValueError, match=rf"run/checkpoint\.pt {message}"):
            read(folder)
    assert checkpoint.saved_steps(folder) == 0


def test_a_damaged_checkpoint_counts_as_nothing_saved(folder: Path) -> None:
    (folder / "checkpoint.pt").write_bytes(b"PK" * 100)
    assert checkpoint.saved_steps(folder) == checkpoint.saved_steps(folder / "nope") == 0


def test_torch_still_reads_a_checkpoint(folder: Path) -> None:
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["history"]) == 2


@pytest.mark.parametrize("rest", [b'{"meta_step": 1, "meta_l', b"\x00" * 50, b"\xff\n", b"[]\n", b'{"meta_step": "1"}\n', b"{}"])
def test_a_cut_last_line_of_the_log_does_not_keep_a_run_from_going_on(folder: Path, rest: bytes) -> None:
    with (folder / "log.jsonl").open("ab") as log:
        log.write(rest)
    meta_train(TINY, tiny_config(), folder=folder)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["meta_step"] for line in lines] == list(range(6))


# What killed runs leave


def test_unfinished_files_of_killed_runs_go_at_the_next_start(folder: Path) -> None:
    (folder / "checkpoint.pt.123.tmp").write_bytes(b"half")
    (folder / "log.jsonl.tmp").write_bytes(b"half")
    (folder / ".saving-abc").mkdir()
    (folder / ".saving-abc" / "config.json").write_text("{")
    (folder / "mine.tmp").write_text("not ours")
    meta_train(TINY, tiny_config(), folder=folder)
    assert {path.name for path in folder.iterdir() if "tmp" in path.name or path.name.startswith(".")} == {"mine.tmp"}


# One process

HOLD = """
import sys, time
from learned_optim.meta_train.folder import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_folder_belongs_to_one_process_until_that_ends(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with holding(folder) as process:
        with pytest.raises(BlockingIOError, match=r"another process is meta-training in .*run; wait until it ends"):
            meta_train(TINY, tiny_config(), folder=folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        process.kill()
        process.wait()
        meta_train(TINY, tiny_config(), folder=folder)
    with claimed(folder):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_the_command_says_that_the_folder_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holding(tmp_path / "out"):
        assert command.main(arguments(tmp_path, tiny_config())) == 2
    assert capsys.readouterr().err.startswith(f"error: another process is meta-training in {tmp_path / 'out'}; ")


def test_a_bad_configuration_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = arguments(tmp_path, tiny_config())
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert command.main(call) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.json is not valid JSON")
    assert not (tmp_path / "out").exists()


# The command, stopped


def arguments(folder: Path, config: MetaTrainConfig) -> list[str]:
    (folder / "config.json").write_text(to_json(config))
    return ["--config", str(folder / "config.json"), "--out", str(folder / "out")]


# The process may write files of so many bytes, as if the disk were full, from the meta-step on that is named.
FULL = """
import resource, sys
from learned_optim.meta_train import __main__ as command, loop
meta_train = loop.meta_train
def filling(*args, progress, **options):
    def full(meta_step, figures):
        progress(meta_step, figures)
        if meta_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    return meta_train(*args, progress=full, **options)
command.meta_train = filling
sys.exit(command.main(sys.argv[2:]))
"""


def run(program: str, *call: str) -> subprocess.CompletedProcess[str]:
    """Without a count of the lines that it runs, which could not be written to a full disk."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program, *call], capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of Unix")
@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_ends_a_run_with_one_sentence_and_it_goes_on_later(tmp_path: Path, room: int) -> None:
    config = tiny_config(families=("mlp",))
    call = arguments(tmp_path, config)
    done = run(FULL, str(room), *call)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stopped: ")
    if room:  # for the log, but not for the checkpoint
        assert f"{tmp_path}/out/stage1/checkpoint.pt could not be written" in last
    assert f"Saved in {tmp_path}/out: 2 of 6 meta-steps of stage 1. Go on with: python -m learned_optim.meta_train --config " in last
    assert not list((tmp_path / "out/stage1").glob("*.tmp"))
    assert command.main(call) == 0
    whole = meta_train({"mlp": command.FAMILIES["mlp"]}, config)
    assert torch.equal(load_network(tmp_path / "out").coordinate.out, whole.network.coordinate.out)


STOP = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job starts without
from learned_optim.meta_train import __main__ as command, loop
meta_train = loop.meta_train
def stopping(*args, progress, **options):
    def stop(meta_step, figures):
        if meta_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGINT)
    return meta_train(*args, progress=stop, **options)
command.meta_train = stopping
sys.exit(command.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("step", "saved"), [(0, "1 of 6 meta-steps of stage 1"), (3, "4 of 6 meta-steps of stage 1")])
def test_ctrl_c_ends_a_run_after_its_meta_step_with_one_sentence(tmp_path: Path, step: int, saved: str) -> None:
    done = run(STOP, str(step), *arguments(tmp_path, tiny_config(families=("mlp",))))
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C. ")
    assert saved in last
    assert last.endswith(f"Go on with: python -m learned_optim.meta_train --config {tmp_path}/config.json --out {tmp_path}/out")


def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = arguments(tmp_path, tiny_config(families=("mlp",), meta_steps=2))
    assert command.main(call) == 0
    (tmp_path / "out/stage1/checkpoint.pt").write_bytes(b"PK")
    capsys.readouterr()
    assert command.main(call) == 2
    assert f"error: {tmp_path}/out/stage1/checkpoint.pt is damaged" in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_bundled_set_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = arguments(tmp_path, tiny_config(families=("mlp",), meta_steps=1))
    assert command.main([*call[:-1], "default"]) == 0
    assert "LearnedOptimizer(model.parameters(), './default')" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["os.system", "torch.optim", "builtins.print", "no.such", "", "torch.optim.SGD"])
def test_only_an_optimizer_with_its_options_serves_as_meta_optimizer(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot make the meta-optimizer '{name}'"):
        meta_train(TINY, tiny_config(optimizer=name, optimizer_options={"momentum": -1.0}))
