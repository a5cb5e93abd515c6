"""`learned-optim evaluate`: the figures are those of meta-training's own evaluation, and mistakes are told before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from meta_train_helpers import acting_network, tiny_config, tiny_task
from torch import Generator

from learned_optim import NetworkConfig, load_network
from learned_optim.cli import main
from learned_optim.config import to_json
from learned_optim.evaluation import Evaluated
from learned_optim.meta_train import FAMILIES, Evaluation, MetaTrainConfig, Task
from learned_optim.weights import fingerprint

CONFIG = tiny_config(families=("first", "second"), horizon_max=6, seed=3, validation=True)


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, under names of their own; and the process stays as it is."""
    monkeypatch.setattr("learned_optim.meta_train.process.settle", lambda: None)
    for name in ("first", "second"):
        monkeypatch.setitem(FAMILIES, name, tiny_task)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Weights of another shape than the configuration's, with the configurations of two stages."""
    acting_network(NetworkConfig(hidden_units=3)).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/meta_train1.json").write_text(to_json(tiny_config(families=("mlp",))))
    (tmp_path / "mine/meta_train2.json").write_text(to_json(CONFIG))
    return tmp_path / "mine"


def test_figures_are_those_of_meta_training_with_the_configuration_beside_the_weights(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(mine), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    networks = {str(mine): load_network(mine), "default": load_network("default")}
    evaluation = Evaluation({name: FAMILIES[name] for name in CONFIG.families}, CONFIG, "cpu")
    assert found["steps"] == 6
    assert found["weights"] == {name: fingerprint(network) for name, network in networks.items()}
    for name, network in networks.items():
        expected = evaluation(network)
        assert found["scores"][name] == pytest.approx(expected["score"], rel=1e-4)
        for problem, modes in expected["ratios"].items():
            assert found["ratios"][name][problem] == pytest.approx(modes, rel=1e-4)
    assert not found["stopped"]


def test_a_configuration_by_hand_steps_and_families_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.json").write_text('{"families": ["first", "second"]}')
    arguments = ["evaluate", "default", "--config", str(tmp_path / "my.json"), "--steps", "4", "--families", "second"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["4", "steps"]
    assert printed[2].startswith("second ")
    assert printed[3].startswith("geometric mean ")
    config = MetaTrainConfig(horizon_max=4, horizon_min=1)
    score = Evaluation({"second": tiny_task}, config, "cpu")(load_network("default"))["score"]
    assert f"default: {score:.3f} of tuned AdamW's loss." in printed


def evaluated(**changes: Any) -> Evaluated:
    ratios = {
        "mine": {"a": {"no horizon": 0.5, "horizon": 2.0}, "b": {"no horizon": 0.25, "horizon": 1.0}},
        "default": {"a": {"no horizon": 0.5, "horizon": 1.0}, "b": {"no horizon": 1.0, "horizon": 1.0}},
    }
    return dataclasses.replace(Evaluated(10, {"mine": "x", "default": "y"}, {"a": 0.1, "b": 0.2}, ratios), **changes)


def test_the_table_has_means_and_the_verdict_counts_problems() -> None:
    found = evaluated()
    rows = [line.split() for line in found.table.splitlines()]
    assert rows[2] == ["a", "0.1000", "0.500", "2.000", "0.500", "1.000"]
    assert rows[4] == ["geometric", "mean", "0.354", "1.414", "0.707", "1.000"]
    assert found.mean("mine") == pytest.approx(0.25**0.25)
    assert "mine: 0.707 of tuned AdamW's loss; lower than with default on 1 of 2 problems." in str(found)


def test_json_of_what_diverged_is_valid() -> None:
    found = evaluated()
    found.ratios["mine"]["a"]["horizon"] = math.inf
    figures = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert figures["ratios"]["mine"]["a"] == {"no horizon": 0.5, "horizon": None}
    assert figures["scores"]["mine"] is None
    assert "inf" in found.table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "firrst"], "there are no families ['firrst']; those that come along are ['mlp', "),
        (["--config", "no.json"], "--config: there is no file no.json"),
        (["--config", "{folder}/damaged.json"], "damaged.json is not valid JSON"),
        (["--config", "{folder}/unknown.json"], "unknown.json has unknown keys ['famlies']"),
        (["no/such/weights"], "is no bundled set"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("learned_optim.evaluation.evaluate", pytest.fail)
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"famlies": ["mlp"]}')
    assert main(["evaluate", "default", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("learned-optim: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_without_scikit_learn_the_problems_that_need_it_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)  # as if it were not installed
    assert main(["evaluate", "default", "--families", "first", "digits"]) == 2
    assert "the families `tabular` and `digits` need scikit-learn: pip install scikit-learn" in capsys.readouterr().err


def interrupted(_: Generator) -> Task:
    raise KeyboardInterrupt


def test_ctrl_c_prints_what_is_done_and_how_to_do_the_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(FAMILIES, "second", interrupted)
    arguments = ["evaluate", "default", "--steps", "4", "--json", "--families"]
    assert main([*arguments, "first", "second", "mlp"]) == 130
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)["ratios"]["default"]) == ["first"]
    again = f"learned-optim {' '.join(arguments)} first second mlp"
    assert captured.err == (f"learned-optim: stopped by Ctrl-C. 1 of 3 problems are done; the others: {again} --families second mlp\n")
    assert main([*arguments, "second"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("learned-optim: stopped by Ctrl-C. No problem was done yet. Start again with: learned-optim evaluate ")
