"""Meta-training that ends early, by its budget or by Ctrl-C, and what a terminal shows of it."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from meta_train_helpers import SMALL, acting_network, tiny_config, tiny_task
from torch import Generator

from learned_optim import LearnedOptimizer, load_network
from learned_optim.meta_train import loop, meta_train, stopping
from learned_optim.meta_train.checkpoint import saved_steps

TINY = {"tiny": tiny_task}


@pytest.mark.parametrize(("budget", "expected"), [("30 min", 1800), ("2h", 7200), ("1.5 hours", 5400), ("90 s", 90), (90, 90), (0.5, 0.5)])
def test_budgets(budget: str | float, expected: float) -> None:
    assert stopping.seconds(budget) == expected


@pytest.mark.parametrize("budget", ["soon", "30 parsecs", "", 0, -1, "0 min", "inf", float("nan")])
def test_what_is_no_budget_is_refused(budget: str | float) -> None:
    with pytest.raises(ValueError, match="budget must be a time such as"):
        meta_train(TINY, tiny_config(), budget=budget)


def test_a_budget_ends_a_run_with_all_that_belongs_to_its_end(tmp_path: Path) -> None:
    config = tiny_config(meta_steps=10**6, evaluate_every=10**6, checkpoint_every=10**6, curriculum=1.0, reparametrize=0.0)
    began = time.monotonic()
    result = meta_train(TINY, config, budget="3 s", network=acting_network(), folder=tmp_path)
    assert time.monotonic() - began < 60
    count = len(result.meta_losses)
    assert 1 <= count < 10**6
    assert [evaluation["meta_step"] for evaluation in result.evaluations] == [-1, count - 1]
    assert saved_steps(tmp_path) == count
    assert load_network(tmp_path).config == SMALL
    again = meta_train(TINY, config, budget="3 s", network=acting_network(), folder=tmp_path)
    assert again.meta_losses == result.meta_losses, "the time before a resume counts"


def test_the_learning_rate_falls_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    rates: list[float] = []
    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    config = tiny_config(meta_steps=10**6, optimizer="torch.optim.SGD", optimizer_options={}, learning_rate=1.0, evaluate_every=0)
    meta_train(TINY, config, budget=2.0, network=acting_network())
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert len(rates) < 3 or rates[-1] < 0.5


def test_one_problem_goes_on_from_the_bundled_weights() -> None:
    config = tiny_config(network=load_network("default").config, meta_steps=1, learning_rate=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "recipe", lambda *_: config)
        result = meta_train(tiny_task(Generator()))
    assert len(result.meta_losses) == 1
    moved = [
        (mine - theirs).abs().max() for mine, theirs in zip(result.network.parameters(), load_network("default").parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.01


def test_ctrl_c_finishes_the_meta_step_and_keeps_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(meta_steps=4, checkpoint_every=100)
    whole = meta_train(TINY, config, network=acting_network())

    def interrupt(meta_step: int, _: dict[str, float]) -> None:
        if meta_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"stopped after 1 of 4 meta-steps; the best weights are in .*, and the same call goes on"):
        meta_train(TINY, config, network=acting_network(), folder=tmp_path, progress=interrupt)
    assert "stopping after this meta-step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    LearnedOptimizer(torch.nn.Linear(2, 2).parameters(), tmp_path)
    assert meta_train(TINY, config, network=acting_network(), folder=tmp_path).meta_losses == whole.meta_losses


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        meta_train(TINY, tiny_config(), network=acting_network(), folder=tmp_path, progress=interrupt)
    assert saved_steps(tmp_path) == 0


def test_a_terminal_shows_a_bar_and_a_file_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    meta_train(TINY, tiny_config(meta_steps=2), network=acting_network())
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    result = meta_train(TINY, tiny_config(meta_steps=2), network=acting_network())
    last = terminal.getvalue().split("\r")[-1]
    assert "2/2" in last
    assert f"meta_loss={result.meta_losses[-1]:.3f}" in last
