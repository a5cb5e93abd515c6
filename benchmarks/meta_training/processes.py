"""How much faster do two processes meta-train than one, and does a run outlive a process that is killed?

    python benchmarks/meta_training/processes.py

Runs `meta_train` under torchrun with one process and with two, each of one thread, in turns, and counts unrolls (stretches of training of
one task) a second: by the clock, and by CPU time, in which other programs do not count; of each meta-step that of the process that took
longest, since the others wait for it. Then kills one of two processes in mid-run: torchrun starts both again, they resume from the
checkpoint, and the weights must be those of an undisturbed run to the last bit.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path

import torch
from common import COLOURS, new_figure, parser, prepare, save, table

from learned_optim import load_network
from learned_optim.meta_train import FAMILIES, MetaTrainConfig, distributed, meta_train

# An odd number of families, since slots take turns with the processes: with an even number a process would keep to half of the families.
NAMES = ("mlp", "cnn", "recurrent")
UNROLLS = 24  # of a meta-step, half of them for each of two processes
WARM_UP = 2  # meta-steps that are not counted
CHECKPOINT_EVERY = 4


def work(folder: Path, meta_steps: int, kill_at: int) -> None:
    """What each process does: it notes down its CPU time, and the first one which meta-steps are done. The last one kills itself after a
    certain meta-step, once."""
    config = MetaTrainConfig(
        families=NAMES,
        meta_steps=meta_steps,
        unrolls_per_step=UNROLLS,
        unrolls_per_family=UNROLLS // len(NAMES),
        truncation=20,
        horizon_min=40,
        horizon_max=80,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    killed = folder / "killed"

    def progress(meta_step: int, figures: dict[str, float]) -> None:
        with (folder / f"cpu{distributed.rank()}.txt").open("a") as cpu:
            cpu.write(f"{time.process_time()}\n")
        if distributed.rank() == 0:
            with (folder / "done.txt").open("a") as done:
                done.write(f"{meta_step}\n")
        if meta_step == kill_at and distributed.rank() == distributed.world_size() - 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with distributed.joined("cpu"):
        meta_train(FAMILIES, config, folder=folder / "run", network=load_network("default"), progress=progress)


def launch(processes: int, folder: Path, meta_steps: int, *, restarts: int = 0, kill_at: int = -1) -> tuple[list[float], list[float]]:
    """Runs `work` on so many processes. Returns each meta-step's seconds after the first, by the clock and of CPU time."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [__file__, "--worker", str(folder), "--meta-steps", str(meta_steps), "--kill-at", str(kill_at)]
    call = [*torchrun, f"--max-restarts={restarts}", "--monitor-interval=0.2", *script]
    folder.mkdir()
    done = subprocess.run(call, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"torchrun failed:\n{done.stderr}")
    clock = [json.loads(line)["seconds"] for line in (folder / "run/log.jsonl").read_text().splitlines()]
    times = [[float(line) for line in (folder / f"cpu{rank}.txt").read_text().split()] for rank in range(processes)]
    used = [[after - before for before, after in itertools.pairwise(each)] for each in times]
    return clock[1:], [max(each) for each in zip(*used, strict=False)]  # a killed process has notes of both of its lives


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "processes")
    options.add_argument("--meta-steps", type=int, default=16, help="of each run")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--worker", type=Path, help=SUPPRESS)
    options.add_argument("--kill-at", type=int, default=-1, help=SUPPRESS)
    arguments = options.parse_args(argv)
    prepare(arguments.threads)
    if arguments.worker:
        work(arguments.worker, arguments.meta_steps, arguments.kill_at)
        return

    speeds: dict[str, dict[int, list[float]]] = {measure: {1: [], 2: []} for measure in ("clock", "CPU time")}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for repeat in range(arguments.repeats):
            for processes in (1, 2):
                each = launch(processes, root / f"{processes}-{repeat}", arguments.meta_steps)
                for measure, seconds in zip(speeds, each, strict=True):
                    speeds[measure][processes].append(UNROLLS * len(seconds[WARM_UP:]) / sum(seconds[WARM_UP:]))
        kill_at = arguments.meta_steps // 2 + 1
        launch(2, root / "killed", arguments.meta_steps, restarts=1, kill_at=kill_at)
        done = [int(step) for step in (root / "killed/done.txt").read_text().split()]
        whole, survived = (load_network(root / name / "run").state_dict() for name in ("2-0", "killed"))
    same = all(torch.equal(survived[name], weight) for name, weight in whole.items())
    gains = {
        measure: statistics.median(two / one for one, two in zip(found[1], found[2], strict=True)) for measure, found in speeds.items()
    }

    print(f"meta_train, {UNROLLS} unrolls a meta-step of {', '.join(NAMES)}; {arguments.meta_steps} meta-steps, {WARM_UP} to warm up\n")
    rows: list[list[object]] = [["by", "processes", "unrolls/s, median", "least", "most"]]
    rows += [
        [measure, processes, statistics.median(each), min(each), max(each)]
        for measure, found in speeds.items()
        for processes, each in found.items()
    ]
    print(table(rows))
    for measure, gain in gains.items():
        print(f"two processes are {gain:.2f} times as fast as one by {measure}: median of {arguments.repeats} (goal: at least 1.8)")
    back = next((index for index in range(1, len(done)) if done[index] <= done[index - 1]), None)
    resumed = "it did not have to resume" if back is None else f"the run went on from meta-step {done[back]}, by its checkpoint"
    print(f"\nA process was killed after meta-step {kill_at}; {resumed}.")
    print(f"meta-steps as they were done: {' '.join(map(str, done))}")
    print(f"final weights, against those of an undisturbed run: {'the same bits' if same else 'DIFFERENT'}")

    figure = new_figure(7, 3.5)
    for axes, (measure, found) in zip(figure.subplots(1, 2), speeds.items(), strict=True):
        for colour, (processes, each) in zip(COLOURS, found.items(), strict=False):
            axes.bar(str(processes), statistics.median(each), color=colour)
            axes.plot([str(processes)] * len(each), each, "k.")
        axes.set(xlabel="processes of one thread each", ylabel="unrolls a second", title=f"{measure}: {gains[measure]:.2f} times as fast")
    results = {"unrolls_per_second": speeds, "gains": gains, "killed_after": kill_at, "meta_steps_done": done, "same_bits": same}
    save(arguments.out, arguments.threads, results, figure)


if __name__ == "__main__":
    main()
