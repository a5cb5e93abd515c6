"""`compare`: everyone starts alike and sees the same batches, the figures are those of the quality benchmark, and mistakes are told."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim import LearnedOptimizer, compare, speed
from learned_optim.cli import main
from learned_optim.comparison import HORIZON, LEARNED, OURS, Comparison, Run, _summary
from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.unroll import derive_seed

STEPS = 20


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def batch(generator: Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs.sum(1, keepdim=True)


def problem(_: Generator) -> ModuleTask:
    return ModuleTask(net, batch, F.mse_loss, [batch(Generator().manual_seed(seed)) for seed in range(4)])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = compare(problem, steps=STEPS, seeds=2, show=False, out=tmp_path_factory.mktemp("compare"))
    assert torch.equal(torch.get_rng_state(), before)
    return result


def test_all_start_alike(found: Comparison) -> None:
    for seed in (0, 1):
        starts = {run.curve[0] for run in found.runs if run.seed == seed}
        assert len(starts) == 1
    assert {run.curve[0] for run in found.runs if run.seed == 0} != starts


def test_runs_are_those_of_a_loop_of_ones_own(found: Comparison) -> None:
    """Seed 1, step by step, with the losses that the batches have in evaluation mode."""
    task = problem(Generator())
    for name in (HORIZON, "AdamW 0.003 cosine"):
        generator = Generator().manual_seed(derive_seed(1, "compare"))
        params, _ = task.init(generator)
        model = net()
        model.load_state_dict(params)
        optimizer: torch.optim.Optimizer = LearnedOptimizer(model.parameters(), total_steps=STEPS)
        schedule = None
        if name != HORIZON:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
            schedule = speed.schedule("cosine", optimizer, STEPS)
        for t in range(STEPS):
            inputs, targets = batch(generator.manual_seed(derive_seed(1, "batch", t)))
            torch.manual_seed(derive_seed(1, "step", t))
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        sample = [task.validation_batch(generator.manual_seed(derive_seed(1, "measure", k))) for k in range(8)]
        model.eval()
        end = sum(F.mse_loss(model(inputs), targets).item() for inputs, targets in sample) / 8
        (run,) = (run for run in found.runs if (run.optimizer, run.seed, run.length) == (name, 1, 1.0))
        assert run.curve[-1] == (STEPS, pytest.approx(end, rel=1e-4))


def test_the_best_setting_is_looked_for_beyond_the_grid(found: Comparison) -> None:
    """In so few steps the largest learning rates of the grid are too small."""
    rates = sorted({float(name.split()[1]) for name in found.grid})
    assert rates[0] == 3e-4
    assert rates[-1] > 3e-2
    assert float(found.best.split()[1]) < rates[-1]
    assert found.grid[found.best] == min(found.grid.values())


def test_speed_is_the_quality_benchmarks(found: Comparison) -> None:
    for name in OURS:
        for seed, mine in enumerate(found.row(name).speeds):
            curves = [run.curve for run in found.runs if (run.optimizer, run.seed) == (found.best, seed)]
            (own,) = (run.curve for run in found.runs if (run.optimizer, run.seed) == (name, seed))
            assert mine == speed.speed(own, speed.envelope(curves), 1e-3 * own[0][1])
    ratio = found.row(found.best).milliseconds / found.row(LEARNED).milliseconds
    assert found.by_clock(LEARNED) == pytest.approx(found.row(LEARNED).speed * ratio)


def test_it_is_told_in_a_table_a_file_and_a_plot(found: Comparison, tmp_path: Path) -> None:
    for text in (LEARNED, HORIZON, f"{found.best} (best of {len(found.grid)})", "held-out loss", "training loss", "2 seeds", "ms/step"):
        assert text in found.table
    assert str(found) == f"{found.table}\n\n{found.verdict}"
    figures = json.loads(found.to_json())
    assert figures["rows"][0]["speed"] == pytest.approx(found.row(LEARNED).speed, rel=1e-4)
    assert figures["verdict"] == found.verdict
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_names_its_extra(found: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        found.plot(tmp_path / "plot.png")


# What is said


def test_seeds_that_disagree_are_told() -> None:
    good, bad = ([(t, end ** (t / 200)) for t in range(0, 201, 5)] for end in (0.01, 0.5))
    runs = [Run(name, seed, 1.0, curve, 1.0, 0.5) for name in OURS for seed, curve in enumerate((good, bad))]
    for seed in (0, 1):
        runs += [Run("AdamW 0.001 constant", seed, 1.0, [(0, 1.0), (200, 1.0)], 1.0, 1.0)]
        for length in (1.0, *speed.LENGTHS):
            curve = [(t, 0.5 ** (t / 50)) for t in range(0, round(200 * length) + 1, max(1, round(5 * length)))]
            runs += [Run("AdamW 0.003 cosine", seed, length, curve, 1.0, 0.5)]
    found = _summary(runs, ["AdamW 0.001 constant", "AdamW 0.003 cosine"], 200, "held-out loss", "sha256:0", stopped=False)
    assert "ahead with some seeds and behind with others" in found.verdict


def told(ours: Callable[[float], float], measure: str = "held-out loss", training: float = 0.5, milliseconds: float = 2.0) -> Comparison:
    """Where AdamW halves the loss every 50 of 200 steps, at 1 ms each."""

    def run(name: str, length: float, loss: Callable[[float], float], took: float | None, train: float) -> Run:
        steps = round(200 * length)
        return Run(name, 0, length, [(t, loss(t)) for t in range(0, steps + 1, max(1, steps // 40))], train, took)

    runs = [run(name, 1.0, ours, milliseconds, training) for name in OURS]
    runs += [run("AdamW 0.001 constant", 1.0, lambda _: 1.0, 1.0, 1.0)]
    runs += [run("AdamW 0.003 cosine", length, lambda t: 0.5 ** (t / 50), None, 0.5) for length in (1.0, *speed.LENGTHS)]
    return _summary(runs, ["AdamW 0.001 constant", "AdamW 0.003 cosine"], 200, measure, "sha256:0", stopped=False)


def test_verdicts() -> None:
    assert re.match(
        r"LearnedOptimizer with total_steps: ahead by 1\.9 x in steps, level by the clock; without:",
        told(lambda t: 0.5 ** (t / 26)).verdict,
    )
    assert "ahead by at least 4.0 x in steps, ahead by 2.0 x by the clock" in told(lambda t: 0.5 ** (t / 5)).verdict
    assert "behind by 1.9 x in steps, behind by 3.8 x by the clock" in told(lambda t: 0.25).verdict
    assert "total_steps: diverged; without: diverged" in told(lambda t: math.nan if t else 1.0).verdict
    assert told(lambda t: 0.25).verdict.endswith("AdamW's best is 0.003, cosine.")
    assert "it overfits" in told(lambda t: 0.25, training=0.1).verdict
    assert "it overfits" not in told(lambda t: 0.25, measure="training loss", training=0.1).verdict


def test_losses_below_zero_are_compared() -> None:
    """A log-likelihood, say: there is no loss below which all is solved."""
    result = told(lambda t: 1 - t / 10)
    assert result.row(LEARNED).speed == 4
    json.loads(result.to_json())


# Problems of every kind


class Recurrent(nn.Module):
    """With running statistics, a frozen part, and batches that are mappings of sequences of changing length."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.layer, self.norm = nn.Linear(1, 3).requires_grad_(False), nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)

    def forward(self, values: Tensor) -> Tensor:
        return self.norm(self.layer(self.frozen(values[..., None]))[0][:, -1]).mean(1)


def mappings(generator: Generator) -> dict[str, Any]:
    values = torch.randn(4, 2 + int(torch.randint(3, (), generator=generator)), generator=generator)
    return {"values": values, "target": values[:, -1], "names": ["a"] * 4}


def test_a_problem_that_meta_train_takes_is_compared_too(capsys: pytest.CaptureFixture[str]) -> None:
    task = ModuleTask(Recurrent, mappings, lambda model, batch: F.mse_loss(model(batch["values"]), batch["target"]))
    result = compare(task, steps=20, seeds=1, learning_rates=[0.01])
    out = capsys.readouterr().out
    assert out == f"{result}\n"
    assert set(result.grid) == {"AdamW 0.01 constant", "AdamW 0.01 cosine"}
    assert result.measure == "training loss"
    assert all(math.isfinite(row.loss) for row in result.rows)


def test_what_diverges_is_no_end_of_it() -> None:
    result = compare(problem, steps=20, seeds=1, learning_rates=[0.01, 1e30], show=False)
    assert result.grid["AdamW 1e+30 constant"] == math.inf
    assert result.best.startswith("AdamW 0.01")
    assert json.loads(result.to_json())["grid"]["AdamW 1e+30 constant"] is None
    assert "inf" in result.table
    assert "the lowest that was tried" in result.verdict


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problem": net()}, r"must be a .*ModuleTask, or a function .*, got Sequential"),
        ({"problem": nn.Linear}, r"got the class Linear"),
        ({"problem": "mine"}, r"got str"),
        ({"problem": lambda: None}, r"cannot be called with a generator"),
        ({"problem": lambda generator: net()}, r"must make a .*ModuleTask, but returned Sequential"),
        ({"problem": lambda _: ModuleTask(net, batch, lambda output, target: output.sum() * math.nan)}, r"loss at the start is nan"),
        ({"steps": 19}, r"steps must be an integer of at least 20, got 19"),
        ({"seeds": 0}, r"seeds must be an integer of at least 1, got 0"),
        ({"learning_rates": []}, r"learning_rates must be positive"),
        ({"learning_rates": [1e-3, -1]}, r"learning_rates must be positive"),
        ({"pretrained": "no-such"}, r"no-such"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        compare(**({"problem": problem, "steps": 20, "seeds": 1, "show": False} | arguments))


class Interrupted:
    """Data that Ctrl-C meets at a batch."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, generator: Generator) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return batch(generator)


def test_ctrl_c_gives_what_is_known_so_far() -> None:
    a_run = 20 + 8  # batches: those that it is trained on, and those of its measure
    partly = compare(ModuleTask(net, Interrupted(3 * a_run), F.mse_loss), steps=20, seeds=3, show=False)
    assert partly.stopped
    assert partly.seeds == 1
    assert len(partly.grid) == 2  # one that is timed beside ours, and one more
    assert "stopped by Ctrl-C: 1 seed and 2 settings of AdamW so far" in partly.verdict
    later = compare(ModuleTask(net, Interrupted(25 * a_run), F.mse_loss), steps=20, seeds=3, show=False)
    assert later.seeds == 2
    assert len(later.grid) == 10
    with pytest.raises(KeyboardInterrupt):
        compare(ModuleTask(net, Interrupted(5), F.mse_loss), steps=20, seeds=3, show=False)


# The command

FILE = """
import torch
from torch import nn
from learned_optim.meta_train import ModuleTask

def batch(generator):
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs.sum(1, keepdim=True)

def mine(generator):
    return ModuleTask(lambda: nn.Linear(6, 1), batch, nn.functional.mse_loss)

class Wrong(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs[:, :3])

wrong = ModuleTask(lambda: Wrong(6, 1), batch, nn.functional.mse_loss)
number = 3

def stopped(generator):
    raise KeyboardInterrupt

seeds = []

def later(generator):
    seeds.append(generator)
    return mine(generator) if len(seeds) < 4 else stopped(generator)
"""


@pytest.fixture
def file(own_file: Callable[[str], Path]) -> Path:
    return own_file(FILE)


def test_the_command_compares(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{file}:mine", "--steps", "20", "--seeds", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "out/compare.json").read_text())
    assert printed.err == ""
    assert (tmp_path / "out/compare.png").exists()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("{file}", "must be given as FILE.py:NAME"),
        ("{file}:", "must be given as FILE.py:NAME"),
        ("no_file.py:mine", "there is no file no_file.py"),
        ("{file}:yours", "has no 'yours'; it defines batch, mine, Wrong, wrong, stopped, later"),
        ("{file}:number", "must be a learned_optim.meta_train.ModuleTask, or a function of a torch.Generator that returns one, got int"),
        ("{file}:wrong", "my_file.py, line 15: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("{broken}:mine", "broken.py, line 2: ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_mistakes_are_one_line(problem: str, message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\nimport no_such\n")
    assert main(["compare", problem.format(file=file, broken=broken), "--steps", "20", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("learned-optim: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_ctrl_c_keeps_what_is_known_and_says_how_to_start_anew(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", f"{file}:later", "--steps", "20", "--json", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["stopped"]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == json.loads(captured.out)
    assert captured.err == (
        f"learned-optim: stopped by Ctrl-C. What was known by then is above and in {tmp_path}/out. A comparison starts anew: "
        f"learned-optim {' '.join(arguments)}\n"
    )


def test_ctrl_c_at_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{file}:stopped", "--json"]) == 130
    assert capsys.readouterr().err == "learned-optim: stopped by Ctrl-C\n"
