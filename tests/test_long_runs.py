"""Long runs: evaluation beside AdamW, the best weights, logs, and what a finished run hands over."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import Client, HubError
from hub_server import HubServer
from meta_train_helpers import SMALL, acting_network, tiny_config, tiny_task
from torch import Generator, nn

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.config import to_json
from learned_optim.meta_train import Evaluation, MetaTrainingDivergedError, meta_train
from learned_optim.meta_train import __main__ as command
from learned_optim.meta_train.evaluate import LEARNING_RATES, adamw, best_adamw, final, train
from learned_optim.meta_train.unroll import named
from learned_optim.weights import fingerprint

TASKS = {"tiny": tiny_task}
EVALUATED: dict[str, Any] = {"meta_steps": 6, "evaluate_every": 3, "horizon_max": 12}


# Evaluation


def test_adamw_beside_is_torchs_own() -> None:
    evaluation = Evaluation(TASKS, tiny_config(), "cpu", {"tiny": [1.0]})
    unroll = evaluation.unrolls[0]
    curve = train(unroll, adamw(unroll, 1e-2, cosine=True), False)
    losses = []
    for replica in range(2):
        params = {name: nn.Parameter(part.clone()) for name, part in named(unroll.task, unroll.optimizees.params[replica]).items()}
        optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, unroll.horizon)
        for t in range(unroll.horizon):
            optimizer.zero_grad()
            unroll.task.loss({**params}, {}, unroll.batches(t)[replica])[0].backward()
            optimizer.step()
            schedule.step()
        end = unroll.task.loss({**params}, {}, unroll.batches(unroll.horizon)[replica])[0]
        losses.append(end.item() / unroll.first_loss[replica].item())
    assert curve[-1] == pytest.approx(sum(losses) / 2, rel=1e-3)


def test_the_best_adamw_is_the_best_of_its_grid() -> None:
    unroll = Evaluation(TASKS, tiny_config(), "cpu", {"tiny": [1.0]}).unrolls[0]
    best = final(best_adamw(unroll))
    assert all(best <= final(train(unroll, adamw(unroll, lr, cosine), False)) for lr in LEARNING_RATES for cosine in (False, True))


def test_the_score_is_the_mean_ratio_to_adamw() -> None:
    config = tiny_config(horizon_max=30)
    evaluation = Evaluation({"tiny": tiny_task, "again": tiny_task}, config, "cpu")
    found = evaluation(OptimizerNetwork(SMALL))
    ratios = [ratio for modes in found["ratios"].values() for ratio in modes.values()]
    assert len(ratios) == 4
    assert found["score"] == pytest.approx(math.prod(ratios) ** 0.25)
    curve = found["curves"]["tiny"]["horizon"]
    assert len(curve) == 30
    assert found["ratios"]["tiny"]["horizon"] == pytest.approx(final(curve) / final(evaluation.adamw["tiny"]))
    broken = OptimizerNetwork(SMALL)
    broken.log_step_size.data += 20
    assert evaluation(broken)["score"] > 10 * found["score"]


def test_held_out_tasks_are_not_trained_on() -> None:
    sampled: list[int] = []

    def family(generator: Generator) -> Any:
        sampled.append(generator.initial_seed())
        return tiny_task(generator)

    Evaluation({"tiny": family}, tiny_config(), "cpu", {"tiny": [1.0]})
    held_out = set(sampled)
    sampled.clear()
    meta_train({"tiny": family}, tiny_config(horizon_max=6))
    assert sampled
    assert not held_out & set(sampled)


@pytest.mark.parametrize(("given", "best"), [([0.6, 0.5, 0.3, 0.9], 2), ([0.2, 0.5, 0.3, 0.9], 0)])
def test_a_run_ends_with_its_best_weights_be_they_those_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, given: list[float], best: int
) -> None:
    scores = iter(given)
    seen: list[str] = []

    def evaluate(self: Evaluation, network: OptimizerNetwork) -> dict[str, Any]:
        seen.append(fingerprint(network))
        return {"score": next(scores), "ratios": {}, "curves": {}}

    monkeypatch.setattr(Evaluation, "__call__", evaluate)
    network = acting_network()
    result = meta_train(TASKS, tiny_config(meta_steps=6, evaluate_every=2), network=network)
    assert len(set(seen)) == 4
    assert seen[0] == fingerprint(network)
    assert fingerprint(result.network) == seen[best]
    assert [item["meta_step"] for item in result.evaluations] == [-1, 1, 3, 5]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_after", [1, 4])  # before the first evaluation, and between a checkpoint and the second
def test_a_killed_run_resumes_to_the_same_evaluations(tmp_path: Path, kill_after: int) -> None:
    config = tiny_config(**EVALUATED, checkpoint_every=4)
    whole = meta_train(TASKS, config, folder=tmp_path / "whole")

    def kill(meta_step: int, figures: dict[str, float]) -> None:
        if meta_step == kill_after:
            raise KilledError

    with pytest.raises(KilledError):
        meta_train(TASKS, config, folder=tmp_path / "killed", progress=kill)
    resumed = meta_train(TASKS, config, folder=tmp_path / "killed")
    assert resumed.evaluations == whole.evaluations
    assert len(resumed.evaluations) == 3
    assert fingerprint(resumed.network) == fingerprint(whole.network)


# Logs


def test_tensorboard_has_each_meta_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(**EVALUATED, checkpoint_every=2)

    def kill(meta_step: int, figures: dict[str, float]) -> None:
        if meta_step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        meta_train(TASKS, config, folder=tmp_path, progress=kill, tensorboard=True)
    result = meta_train(TASKS, config, folder=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("meta_loss")] == list(range(6))
    assert [event.value for event in events.Scalars("meta_loss")] == pytest.approx(result.meta_losses)
    assert [event.step for event in events.Scalars("score")] == [2, 5]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["score"] for line in log if "score" in line] == [item["score"] for item in result.evaluations[1:]]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        meta_train(TASKS, tiny_config(), folder=tmp_path, tensorboard=True)


# What a run hands over


def test_a_finished_run_hands_over_a_folder(tmp_path: Path) -> None:
    result = meta_train(TASKS, tiny_config(**EVALUATED), folder=tmp_path / "mine", network=acting_network())
    optimizer = LearnedOptimizer(nn.Linear(2, 2).parameters(), tmp_path / "mine")
    assert optimizer.param_groups[0]["weights"] == fingerprint(result.network)
    card = (tmp_path / "mine/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: learned-optim\n")
    best = min(result.evaluations, key=lambda item: item["score"])
    for fact in (
        fingerprint(result.network),
        "| seed | 0 |",
        "tiny",
        "| wall time |",
        f"Geometric mean {best['score']:.3f}",
        torch.__version__,
    ):
        assert fact in card
    assert f"| {best['ratios']['tiny']['horizon']:.2f} |" in card
    assert (tmp_path / "mine/curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "mine/meta_train.json").read_text() == to_json(tiny_config(**EVALUATED))


def test_without_matplotlib_the_curves_alone_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    meta_train(TASKS, tiny_config(meta_steps=2), folder=tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "README.md").read_text()
    load_network(tmp_path)


def test_the_command_hands_over_what_makes_its_weights_again(tmp_path: Path) -> None:
    stages = [tmp_path / "lstm.json", tmp_path / "controller.json"]
    stages[0].write_text(to_json(tiny_config(meta_steps=2, families=("mlp",), estimators={"coordinate": "exact"})))
    stages[1].write_text(to_json(tiny_config(meta_steps=2, families=("mlp",), estimators={"controller": "pes"})))
    out = tmp_path / "out"
    assert command.main(["--config", *map(str, stages), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    line = next(line.strip() for line in card.splitlines() if "-m learned_optim.meta_train" in line)
    arguments = line.split("-m learned_optim.meta_train ")[1].replace("runs/again", str(tmp_path / "again")).split()
    assert command.main([str(out / word) if word.endswith(".json") else word for word in arguments]) == 0
    assert fingerprint(load_network(tmp_path / "again")) == fingerprint(load_network(out)) in card


def test_the_command_says_where_a_diverged_run_left_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("learned_optim.meta_train.loop.WINDOW", 5)
    config = tmp_path / "config.json"
    config.write_text(to_json(tiny_config(meta_steps=40, families=("mlp",), divergence=1e-9, unrolls_per_step=1)))
    assert command.main(["--config", str(config), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "stopped: the mean meta-loss" in error
    assert str(tmp_path / "out") in error
    load_network(tmp_path / "out/stage1")


def test_a_run_that_diverges_raises_and_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learned_optim.meta_train.loop.WINDOW", 5)
    with pytest.raises(MetaTrainingDivergedError):
        meta_train(TASKS, tiny_config(meta_steps=40, divergence=1e-9, unrolls_per_step=1), folder=tmp_path)
    load_network(tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_finished_folder_is_published_whole(hub: HubServer, online: Client, tmp_path: Path) -> None:
    result = meta_train(TASKS, tiny_config(**EVALUATED), folder=tmp_path)
    push = f"push_to_hub('user/whole', folder={str(tmp_path)!r})"
    commit = online(f"load_network({str(tmp_path)!r}).{push}")
    optimizer = "LearnedOptimizer(torch.nn.Linear(2, 2).parameters(), 'user/whole')"
    assert online(f"{optimizer}.param_groups[0]['weights']") == fingerprint(result.network)
    with pytest.raises(HubError, match=r"ValueError: .*would describe others"):
        online(f"network(1).{push}")
    files = hub.repositories["user/whole"].commits[commit]
    expected = ["README.md", "config.json", "curves.png", "meta_train.json", "model.safetensors"]
    assert sorted(set(files) - {".gitattributes"}) == expected
    assert files["README.md"] == (tmp_path / "README.md").read_bytes()
