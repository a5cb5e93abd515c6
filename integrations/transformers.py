"""Hugging Face's Trainer with `LearnedOptimizer`.

The plain Trainer takes the optimizer as it takes any other, `Trainer(..., optimizer_cls_and_kwargs=(LearnedOptimizer, {}))`. It then
scales the update by a linear schedule, clips gradients, does not tell the optimizer how long training will take, and drops `learning_rate`
and what else belongs to AdamW, which one warning says.
`LearnedOptimizerTrainer` runs it as its weights were meta-trained.
"""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.checks.groups import warn_of_experts
from learned_optim.network import MOST
from learned_optim.rule import Control
from learned_optim.weights import fingerprint

try:
    from transformers import SchedulerType, Trainer, TrainerCallback, TrainerState, TrainingArguments
except ImportError as error:
    message = 'learned_optim.integrations.transformers needs transformers 5; install it with: pip install "transformers>=5" accelerate'
    raise ImportError(message) from error

NAME = "learned_optim.LearnedOptimizer"  # in model cards
# What the weights were meta-trained with: nothing scales the update from outside, and nothing clips the gradient.
CHOSEN = {"lr_scheduler_type": SchedulerType.CONSTANT, "max_grad_norm": 0.0}
# What the optimizer has no use for.
WITHOUT_EFFECT = (
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


class LearnedOptimizerTrainer(Trainer):
    """`transformers.Trainer` with a `LearnedOptimizer` in place of AdamW.

        trainer = LearnedOptimizerTrainer(model=model, args=TrainingArguments("out"), train_dataset=data)

    For a trainer derived from `Trainer`, inherit from both: `class MySFTTrainer(LearnedOptimizerTrainer, SFTTrainer): pass`.

    What it does beyond `Trainer`:

    - It trains at a constant schedule and without clipping, on a copy of the arguments. `weight_decay` is used, in AdamW's scale.
    - Arguments without effect here, `learning_rate` say, are named in one warning where they differ from their defaults (one that was given
      the default's value looks like none). They are not refused: a script made for AdamW carries its learning rate and warm-up, both are
      what this optimizer takes care of itself, and it should run with one line changed. In a hyperparameter search they are refused, since
      all its trials would be the same.
    - `total_steps` is the number of optimizer steps that this training will have, from `max_steps` or from epochs, also after a resume.
    - A `train()` that does not resume begins with fresh optimizer state, also the second one and each try of `auto_find_batch_size`.
    - Logs get, for `group_0` (matrices, with weight decay) and `group_1` (biases and norms), of the first step since the previous log:
      `update_rms/group_0`, the root mean square by which it changed the parameters, weight decay and rounding included, in the parameters'
      units; five times it is about the learning rate at which AdamW's steps have that size. And `at_bound/group_0`, the share of tensors
      whose steps the controller has made as long or as short as it may, a factor of twenty: near 1, with a tiny `update_rms`, training
      is braked as hard as can be and learns next to nothing; with a large one, steps that were longer still would be taken.
      `skipped` counts the tensors that were left out of a step because their gradient was not finite.
    - The model card names this optimizer and its weights.

    Args:
        pretrained, revision, lr, stacked, error_if_nonfinite, kernel: as for `LearnedOptimizer`.
        total_steps: in place of the number of steps of this training, where it is a part of a longer one, say.
        weight_decay: in place of the training arguments'.
        args, kwargs: as for `Trainer`, but for `optimizers` and `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: there is another optimizer in the arguments, or the weights cannot be used, or a hyperparameter search is about
            something without effect.
        OSError: there are no such weights.
    """

    args: TrainingArguments
    names_what_it_ignores = True  # so that the optimizer need not, see `learned_optim.checks.groups.warn_of_trainer`
    optimizer_cls_and_kwargs: tuple[type[LearnedOptimizer], dict[str, Any]] | None

    def __init__(
        self,
        *args: Any,
        pretrained: str | os.PathLike[str] | OptimizerNetwork = "default",
        revision: str | None = None,
        lr: float = 1.0,
        weight_decay: float | None = None,
        total_steps: int | None = None,
        stacked: bool = False,
        error_if_nonfinite: bool = False,
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        network = pretrained if isinstance(pretrained, OptimizerNetwork) else load_network(pretrained, revision=revision)
        super().__init__(*args, **kwargs)
        # Set here, since not every derived trainer hands it on to Trainer.
        if self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "LearnedOptimizerTrainer makes its own optimizer and schedule; leave optimizers and optimizer_cls_and_kwargs out"
            )
        options = {"lr": lr, "total_steps": total_steps, "stacked": stacked, "error_if_nonfinite": error_if_nonfinite, "kernel": kernel}
        self.optimizer_cls_and_kwargs = LearnedOptimizer, {"pretrained": network, **options}
        # Another trainer, of AdamW's say, may be made with the same arguments.
        self.args = copy.copy(self.args)
        if weight_decay is not None:
            self.args.weight_decay = weight_decay
        if (ignored := _changed(self.args)) and self.is_world_process_zero():
            warnings.warn(
                f"LearnedOptimizerTrainer ignores {', '.join(ignored)}: the optimizer has no learning rate, a constant schedule and no "
                "clipping, as its weights were meta-trained. (weight_decay is used; lr= of the trainer multiplies all steps.) To "
                "schedule or clip all the same, give Trainer optimizer_cls_and_kwargs=(LearnedOptimizer, {}).",
                stacklevel=2,
            )
        for name, value in CHOSEN.items():
            setattr(self.args, name, value)
        self._ignored = _changed(self.args)
        horizon = "the whole training" if total_steps is None else str(total_steps)
        source = "a network" if isinstance(pretrained, OptimizerNetwork) else repr(os.fspath(pretrained))
        self._weights = f"pretrained={source}, weights {fingerprint(network)}, lr={lr}, total_steps of {horizon}"
        self._lr, self._stacked = lr, stacked
        self._watch = _Watch(total_steps)
        self.add_callback(self._watch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        # A hyperparameter search has changed the arguments since.
        if searched := [name for name in _changed(self.args) if name not in self._ignored]:
            raise ValueError(f"LearnedOptimizerTrainer ignores {', '.join(searched)}, so a search over it finds nothing; leave it out")
        if self.optimizer is None and not self._stacked and self.is_world_process_zero():
            # Trainer makes groups without names, which would show it to the optimizer.
            warn_of_experts((self.model if model is None else model).named_parameters(), stacklevel=2)
        given = () if model is None else (model,)  # which trainers before 5.3 do not take
        return super().create_optimizer(*given)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._watch.logs()}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # The card is written from the arguments, which know torch's own optimizers only.
        real = self.args
        self.args = copy.copy(real)
        self.args.learning_rate, self.args.optim, self.args.optim_args = self._lr, NAME, self._weights
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args = real
        card = Path(real.output_dir, "README.md")
        if self.is_world_process_zero() and NAME not in (text := card.read_text(encoding="utf-8")):  # TRL's cards name no optimizer
            card.write_text(f"{text.rstrip()}\n\n## Optimizer\n\n`{NAME}`: {self._weights}\n", encoding="utf-8")


class _Watch(TrainerCallback):
    """Tells the optimizer its horizon, and measures its updates.

    Args:
        total_steps: the horizon; None takes the length of the training.
    """

    def __init__(self, total_steps: int | None) -> None:
        self.figures: dict[str, float] = {}
        self._total_steps = total_steps
        self._optimizer: LearnedOptimizer | None = None
        self._due = False
        self._before: list[list[Tensor]] = []

    def logs(self) -> dict[str, float]:
        return self.figures if self._optimizer is None else {**self.figures, "skipped": self._optimizer.skipped}

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, optimizer: Any, **___: Any) -> None:
        if state.global_step == 0:
            # Trainer keeps the optimizer for a second `train()`. Its clock would stand at the end of the horizon, where it no longer moves.
            optimizer.state.clear()
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        for group in optimizer.param_groups:
            group["total_steps"] = self._total_steps or state.max_steps
        self._due = True

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        if self._due:  # a copy of the parameters, hence not at every step
            self._before = [[param.detach().clone() for param in group["params"]] for group in optimizer.param_groups]

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        if not self._due:
            return
        self._due = False
        for i, (group, before) in enumerate(zip(optimizer.param_groups, self._before, strict=True)):
            if count := sum(param.numel() for param in before):
                changes = [param.detach().float() - old.float() for param, old in zip(group["params"], before, strict=True)]
                squares = torch.stack([change.square().sum() for change in changes]).sum()
                self.figures[f"update_rms/group_{i}"] = (squares / count).sqrt().item()
            states = [optimizer.state[param] for param in group["params"] if param in optimizer.state]
            if states:
                corrections = Control.of(torch.stack([state["control"] for state in states], -1)).correction
                self.figures[f"at_bound/group_{i}"] = (corrections.abs() >= MOST).float().mean().item()
        self._before = []

    def on_log(self, *_: Any, **__: Any) -> None:
        self._due = True


def _changed(args: TrainingArguments) -> list[str]:
    """The arguments without effect that are neither at their defaults nor what they would be set to."""
    defaults = {field.name: field.default for field in fields(args)}
    values = {name: getattr(args, name) for name in (*CHOSEN, *WITHOUT_EFFECT)}
    return [f"{name}={value!r}" for name, value in values.items() if value not in (defaults[name], CHOSEN.get(name, defaults[name]))]
