"""A language model small enough for Trainer to train in a second, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork
from learned_optim.integrations.transformers import LearnedOptimizerTrainer

VOCABULARY = LENGTH = 8


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from a random number, modulo 8."""

    def __init__(self, size: int = 32) -> None:
        self.starts = torch.randint(VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (self.starts[i] + torch.arange(LENGTH)) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


class StopAt(TrainerCallback):
    """Stops and saves after a step, as a run that is killed and had saved there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def gpt(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """With dropout, so that a resume must restore random numbers too."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype)


def without_dropout(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def network(seed: int = 1) -> OptimizerNetwork:
    torch.manual_seed(seed)
    return OptimizerNetwork(NetworkConfig(hidden_units=2))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(str(folder), **{**defaults, "per_device_train_batch_size": 4, "max_steps": 8, **options})


def plain(args: TrainingArguments, **options: Any) -> Trainer:
    """Trainer as it is, given the optimizer."""
    options = {"model": gpt(), "train_dataset": Counting(), "optimizer_cls_and_kwargs": (LearnedOptimizer, {}), **options}
    return Trainer(args=args, **options)


def helped(args: TrainingArguments, **options: Any) -> LearnedOptimizerTrainer:
    if "model_init" not in options:
        options = {"model": gpt(), **options}
    return LearnedOptimizerTrainer(args=args, **{"train_dataset": Counting(), "eval_dataset": Counting(8), **options})


MAKERS = {"plain": plain, "helped": helped}


def inner(trainer: Trainer) -> LearnedOptimizer:
    """The optimizer inside accelerate's wrapper."""
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LearnedOptimizer)
    return optimizer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def clocks(trainer: Trainer) -> set[float]:
    """The steps that the parameters' clocks show."""
    return {state["control"][0].item() for state in inner(trainer).state.values()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def card(trainer: Trainer) -> str:
    trainer.create_model_card(model_name="mine")
    return (Path(trainer.args.output_dir) / "README.md").read_text()
