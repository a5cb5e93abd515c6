"""Runs of the real Hugging Face Trainer: ways to train, what is logged, checkpoints, the model card and what is pushed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5"')
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")

from hub_server import HubServer
from test_distributed import torchrun
from trainer_helpers import MAKERS, Counting, StopAt, arguments, card, gpt, helped, inner, network, plain, same, weights, without_dropout
from transformers import Trainer, TrainerCallback

from learned_optim import LearnedOptimizer, load_network
from learned_optim.integrations.transformers import LearnedOptimizerTrainer
from learned_optim.network import MOST
from learned_optim.rule import Control
from learned_optim.weights import fingerprint

# Logs


def test_logs_tell_the_size_of_the_update(tmp_path: Path) -> None:
    trainer = helped(arguments(tmp_path, max_steps=1, logging_steps=1, logging_strategy="steps", weight_decay=0.1))
    start = weights(trainer)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    names = {param: name for name, param in trainer.model.named_parameters()}
    end = weights(trainer)
    for i, group in enumerate(inner(trainer).param_groups):
        change = torch.cat([(end[names[param]] - start[names[param]]).flatten() for param in group["params"]])
        assert log[f"update_rms/group_{i}"] == pytest.approx(change.square().mean().sqrt().item())
    assert log["update_rms/group_0"] > 1e-5


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_every_log_has_a_new_size(tmp_path: Path, strategy: str) -> None:
    options = {"logging_steps": 4} if strategy == "steps" else {}
    trainer = helped(arguments(tmp_path, max_steps=-1, num_train_epochs=3, logging_strategy=strategy, eval_strategy="epoch", **options))
    trainer.train()
    sizes = [log["update_rms/group_0"] for log in trainer.state.log_history if "loss" in log]
    assert len(set(sizes)) == len(sizes) == (3 if strategy == "epoch" else 6)
    assert sizes[-1] == min(sizes[1:]), "the horizon's end is near"
    assert not any("update_rms/group_0" in log for log in trainer.state.log_history if "eval_loss" in log)


def test_logs_tell_the_share_of_steps_that_are_as_short_or_as_long_as_they_may_be(tmp_path: Path) -> None:
    class Set(TrainerCallback):
        """Puts the corrections of a share of the tensors at a bound, before the last step."""

        def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, optimizer: Any, **___: Any) -> None:
            if state.global_step == 1:
                for param in optimizer.param_groups[0]["params"][::2]:
                    rows = optimizer.state[param]["control"]
                    rows.copy_(Control.of(rows)._replace(correction=torch.tensor(-100.0)).rows())

    trainer = helped(arguments(tmp_path, max_steps=2, logging_steps=1, logging_strategy="steps"), callbacks=[Set()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    matrices = len(inner(trainer).param_groups[0]["params"])
    assert [log["at_bound/group_0"] for log in logs] == [0, pytest.approx((matrices + 1) // 2 / matrices)]
    assert [log["at_bound/group_1"] for log in logs] == [0, 0]


def test_logs_tell_that_gradients_are_not_finite(tmp_path: Path) -> None:
    """Trainer itself logs a loss of NaN as 0."""

    class Broken(LearnedOptimizerTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    args = arguments(tmp_path, max_steps=4, logging_steps=1, logging_strategy="steps")
    trainer = Broken(model=gpt(), args=args, train_dataset=Counting())
    with pytest.warns(UserWarning, match="is not finite"):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    tensors = len(list(trainer.model.parameters()))
    assert [log["skipped"] for log in logs] == [0, 0, tensors, tensors]
    assert [log["update_rms/group_0"] == 0 for log in logs] == [False, False, True, False]


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_the_bound_is_the_controllers(known: float) -> None:
    ones = torch.ones(1)
    for far in (-100 * ones, 100 * ones):
        correction = network().controller(0 * ones, ones, 0 * ones, known * ones, far)
        assert correction.abs().item() == MOST


# Ways to train


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    ends = []
    for batch, pieces in ((8, 1), (2, 4)):
        args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=batch, gradient_accumulation_steps=pieces)
        trainer = helped(args, model=without_dropout(gpt()))
        trainer.train()
        ends.append(weights(trainer))
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["parameters", "autocast"])
def test_bf16(tmp_path: Path, kind: str) -> None:
    options = {"bf16": True} if kind == "autocast" else {}
    model = gpt(dtype=torch.bfloat16 if kind == "parameters" else torch.float32)
    trainer = helped(arguments(tmp_path, max_steps=40, **options), model=model)
    assert trainer.train().training_loss < 1.5
    assert {state["moments"].dtype for state in inner(trainer).state.values()} == {torch.float32}


def test_model_init_trains_each_model_anew(tmp_path: Path) -> None:
    trainer = helped(arguments(tmp_path, max_steps=4), model_init=lambda: gpt())
    trainer.train()
    first, optimizer = weights(trainer), inner(trainer)
    trainer.train()
    assert inner(trainer) is not optimizer
    assert same(weights(trainer), first)


def test_hyperparameter_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna: make test-integrations")
    trainer = helped(arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3), model_init=lambda: gpt())
    decays = []

    def space(trial: Any) -> dict[str, float]:
        decays.append(trial.suggest_float("weight_decay", 0.0, 0.1))
        return {"weight_decay": decays[-1]}

    best = trainer.hyperparameter_search(hp_space=space, n_trials=2, backend="optuna")
    assert best.hyperparameters["weight_decay"] in decays
    assert inner(trainer).param_groups[0]["weight_decay"] == decays[-1]
    with pytest.raises(ValueError, match=r"ignores learning_rate=.*finds nothing; leave it out"):
        trainer.hyperparameter_search(hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0, 1)}, n_trials=1)


DDP = """
import gc
import sys
from pathlib import Path
import torch
from trainer_helpers import arguments, clocks, gpt, helped, inner, weights, without_dropout

folder = Path(sys.argv[1])
trainer = helped(arguments(folder, max_steps=4, per_device_train_batch_size=4, ddp_backend="gloo"), model=without_dropout(gpt()))
trainer.train()
assert trainer.args.world_size == 2
assert clocks(trainer) == {4}
assert inner(trainer).param_groups[0]["total_steps"] == 4
torch.save(weights(trainer), folder / f"rank{trainer.args.process_index}.pt")
del trainer  # it holds the group, whose threads would run while the process exits, and abort it
gc.collect()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "ddp.py").write_text(DDP)
    done = torchrun(2, tmp_path, str(tmp_path / "ddp.py"), str(tmp_path), imports="trainer_helpers")
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same(*ends), "every process holds the same weights"
    alone = helped(arguments(tmp_path, max_steps=4, per_device_train_batch_size=8), model=without_dropout(gpt()))
    alone.train()
    for name, end in weights(alone).items():
        torch.testing.assert_close(ends[0][name], end, rtol=0, atol=1e-3)


# Checkpoints


# Within an epoch of four steps, at its end, within the next.
RESUMES = [("helped", "fp32", 1), ("helped", "fp32", 4), ("helped", "fp32", 7), ("plain", "fp32", 7)]
RESUMES += [("helped", "bf16 parameters", 7), ("plain", "bf16 autocast", 7)]


@pytest.mark.parametrize(("maker", "kind", "stop"), RESUMES)
def test_a_resume_gives_the_same_weights_bit_for_bit(tmp_path: Path, maker: str, kind: str, stop: int) -> None:
    options = {"max_steps": 9, "gradient_accumulation_steps": 2, "bf16": kind == "bf16 autocast"}
    dtype = torch.bfloat16 if kind == "bf16 parameters" else torch.float32

    def make(folder: str, seed: int, *callbacks: Any) -> Trainer:
        return MAKERS[maker](arguments(tmp_path / folder, **options), model=gpt(seed, dtype), callbacks=list(callbacks))

    whole = make("whole", 0)
    whole.train()
    make("stopped", 0, StopAt(stop)).train()
    resumed = make("stopped", 1)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))
    for a, b in zip(inner(resumed).state.values(), inner(whole).state.values(), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_resume_with_other_weights_names_both(tmp_path: Path, maker: str) -> None:
    network().save_pretrained(tmp_path / "mine")
    make = MAKERS[maker]
    source = {"pretrained": str(tmp_path / "mine")}
    options = source if maker == "helped" else {"optimizer_cls_and_kwargs": (LearnedOptimizer, source)}
    make(arguments(tmp_path / "run"), callbacks=[StopAt(2)], **options).train()
    with pytest.raises(ValueError, match="Build LearnedOptimizer with the weights") as caught:
        make(arguments(tmp_path / "run")).train(resume_from_checkpoint=True)
    assert fingerprint(network()) in str(caught.value)
    assert fingerprint(load_network("default")) in str(caught.value)


# The model card


def test_the_model_card_names_the_optimizer(tmp_path: Path) -> None:
    for make, truthful in ((plain, False), (helped, True)):
        args = arguments(tmp_path, max_steps=2)
        trainer = make(args)
        trainer.train()
        text = card(trainer).lower()
        assert ("learned_optim.learnedoptimizer" in text) == truthful
        assert ("adamw" in text) != truthful, "without the helper, Trainer's card names the optimizer that its arguments stand for"
    assert fingerprint(load_network("default")) in text
    assert "lr_scheduler_type: constant" in text
    assert "5e-05" not in text
    assert trainer.args.optim == args.optim, "the arguments are as they were"


PUSH = """
import sys
from pathlib import Path
from trainer_helpers import arguments, helped
trainer = helped(arguments(Path(sys.argv[1]), max_steps=2, hub_model_id="user/counts", hub_token="hf_token"))
trainer.train()
print(trainer.push_to_hub().oid)
"""


@pytest.mark.slow
def test_push_to_hub(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    with HubServer() as hub:
        command = [sys.executable, "-c", PUSH, str(tmp_path / "out")]
        done = subprocess.run(command, env={**env, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        files = hub.repositories["user/counts"].commits[done.stdout.split()[-1]]
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= files.keys()
    assert not [name for name in files if "optimizer" in name]
    text = files["README.md"].decode()
    assert "learned_optim.LearnedOptimizer" in text
    assert fingerprint(load_network("default")) in text
    assert "adamw" not in text.lower()
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
