"""The real Trainer with `LearnedOptimizer`, on a transformer of a few thousand weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("transformers", reason="needs transformers and accelerate: pip install 'learned-optim[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'learned-optim[transformers]'")

from learned_optim.integrations.transformers import LearnedOptimizerMixin, LearnedOptimizerTrainer, learned_optimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),  # the Trainer's default, and there is no accelerator
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning"),
]


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up, modulo 20."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) + index) % 20
        return {"input_ids": tokens, "labels": tokens}


def gpt2() -> GPT2LMHeadModel:
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=12, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 8, "max_steps": 6, "report_to": [], "logging_steps": 2, "save_strategy": "no"}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **defaults | options)


def make(folder: Path, model: nn.Module | None = None, optimizer_kwargs: dict[str, Any] | None = None, **options: Any) -> Trainer:
    args = arguments(folder, **options)
    return LearnedOptimizerTrainer(model or gpt2(), args, train_dataset=Counting(), optimizer_kwargs=optimizer_kwargs)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [param.detach().clone() for param in trainer.model.parameters()]


def test_it_trains_and_logs_the_size_of_its_updates(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=40, logging_steps=10)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    rates = [entry["effective_lr_0"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < rates[-1] < 0.2 * rates[0]  # it anneals, though the Trainer's schedule is constant
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry} == {1.0}


def test_the_optimizer_knows_the_horizon_and_gradients_are_not_clipped(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    assert [group["total_steps"] for group in trainer.optimizer.param_groups] == [8, 8]  # 64 examples, 16 a step, twice
    assert trainer.args.max_grad_norm == 0


def test_the_plain_trainer_takes_the_class(tmp_path: Path) -> None:
    trainer = Trainer(
        gpt2(), arguments(tmp_path), train_dataset=Counting(), optimizer_cls_and_kwargs=(LearnedOptimizer, {"total_steps": 6})
    )
    before = weights(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LearnedOptimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, dtype: torch.dtype, stop: int) -> None:
    options = {"save_strategy": "steps", "save_steps": stop}
    whole = make(tmp_path / "whole", gpt2().to(dtype), **options)
    whole.train()
    resumed = make(tmp_path / "resumed", gpt2().to(dtype), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
    for expected, actual in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(actual, expected)


def test_a_longer_run_may_resume(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = make(tmp_path, max_steps=9)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.optimizer.param_groups[0]["total_steps"] == 9


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=4).train()
    torch.manual_seed(1)
    trainer = make(tmp_path, optimizer_kwargs={"pretrained": OptimizerNetwork(NetworkConfig(hidden_units=2))})
    with pytest.raises(ValueError, match=r"weights sha256:\w+, but the optimizer runs sha256:\w+"):
        trainer.train(resume_from_checkpoint=True)


def test_a_second_train_goes_on_to_a_new_horizon(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    before = weights(trainer)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["total_steps"] == 12
    changes = [(new - old).norm() for old, new in zip(before, weights(trainer), strict=True)]
    assert min(changes) > 1e-3  # it has not annealed to nothing


def test_model_init_begins_anew(tmp_path: Path) -> None:
    trainer = LearnedOptimizerTrainer(model_init=gpt2, args=arguments(tmp_path), train_dataset=Counting())
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(first, weights(trainer), strict=True))


def test_auto_find_batch_size(tmp_path: Path) -> None:
    trainer = make(tmp_path, auto_find_batch_size=True, max_steps=-1, num_train_epochs=1)
    step, failures = trainer.training_step, iter([True])

    def out_of_memory_once(*inputs: Any, **options: Any) -> torch.Tensor:
        if next(failures, False):
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return step(*inputs, **options)

    trainer.training_step = out_of_memory_once
    trainer.train()
    assert trainer.state.train_batch_size < 8
    assert trainer.optimizer.param_groups[0]["total_steps"] == trainer.state.max_steps > 8


def test_weight_decay_is_the_trainers(tmp_path: Path) -> None:
    trainer = make(tmp_path, weight_decay=0.1)
    trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


def test_conflicting_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)schedule.*clipping.*learning_rate"):
        make(tmp_path, lr_scheduler_type="cosine", max_grad_norm=0.5, learning_rate=1e-3)
    with pytest.raises(ValueError, match="warm-up"):
        make(tmp_path, warmup_steps=10)
    with pytest.raises(ValueError, match="optimizer_kwargs"):
        LearnedOptimizerTrainer(gpt2(), arguments(tmp_path), optimizers=(None, None))


def test_the_mixin_serves_other_trainers(tmp_path: Path) -> None:
    class Theirs(Trainer):
        pass

    class Mine(LearnedOptimizerMixin, Theirs):
        pass

    trainer = Mine(gpt2(), arguments(tmp_path), train_dataset=Counting(), optimizer_kwargs={"lr": 0.5})
    trainer.train()
    assert learned_optimizer(trainer.optimizer).param_groups[0]["lr"] == 0.5


def test_hyperparameter_search_rebuilds_it(tmp_path: Path) -> None:
    """A search is a `train(trial)` for each trial; the parameters come through the Trainer's own set-up."""
    trainer = LearnedOptimizerTrainer(model_init=gpt2, args=arguments(tmp_path), train_dataset=Counting())
    seen = []
    for decay in (0.0, 0.3):
        trainer.args.weight_decay = decay
        trainer.train()
        seen.append((trainer.optimizer.param_groups[0]["weight_decay"], trainer.optimizer.param_groups[0]["total_steps"]))
    assert seen == [(0.0, 6), (0.3, 6)]


def test_the_model_card_tells_the_truth(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="counting")
    card = (tmp_path / "README.md").read_text()
    assert f"- optimizer: LearnedOptimizer, weights {trainer.optimizer.param_groups[0]['weights']}" in card
    assert "adamw" not in card.lower()
    assert "learning_rate:" not in card


PUSH = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integration_transformers as tests
trainer = tests.make(Path(sys.argv[2]), push_to_hub=True, hub_model_id="user/counting", save_strategy="steps", save_steps=6)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
def test_push_to_hub(tmp_path: Path) -> None:
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(tmp_path / "hf"),
        }
        command = [sys.executable, "-c", PUSH, str(Path(__file__).parent), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["user/counting"]
        files = repository.commits[repository.refs["main"]]
    assert "model.safetensors" in files
    assert b"- optimizer: LearnedOptimizer, weights sha256:" in files["README.md"]


DDP = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import test_integration_transformers as tests
trainer = tests.make(Path(sys.argv[2]), per_device_train_batch_size=4, max_steps=20, logging_steps=10)
trainer.train()
torch.save([tests.weights(trainer), trainer.state.log_history], Path(sys.argv[2]) / f"{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_and_learn(tmp_path: Path) -> None:
    (tmp_path / "ddp.py").write_text(DDP)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "ddp.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    (first, history), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
