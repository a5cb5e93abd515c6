"""Hugging Face's Trainer with `LearnedOptimizer`.

The plain Trainer takes the optimizer as it takes any other, `Trainer(..., optimizer_cls_and_kwargs=(LearnedOptimizer, {}))`. It then
scales the update by a linear schedule, clips gradients and does not tell the optimizer how long training will take.
`LearnedOptimizerTrainer` runs it as its weights were meta-trained.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, load_network
from learned_optim.weights import fingerprint

try:
    from transformers import SchedulerType, Trainer, TrainerCallback, TrainerState, TrainingArguments
except ImportError as error:
    message = 'learned_optim.integrations.transformers needs transformers 5; install it with: pip install "learned-optim[transformers]"'
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
    - `total_steps` is the number of optimizer steps that this training will have, from `max_steps` or from epochs, also after a resume.
    - A `train()` that does not resume begins with fresh optimizer state, also the second one and each try of `auto_find_batch_size`.
    - Logs get `update_rms/group_0` (matrices, with weight decay) and `update_rms/group_1` (biases and norms): the root mean square by which
      the first step since the previous log changed the parameters, weight decay and rounding included, in the parameters' units. Five times
      it is about the learning rate at which AdamW's steps have that size.
    - The model card names this optimizer and its weights.

    Args:
        pretrained, revision: the optimizer's weights, as for `LearnedOptimizer`.
        args, kwargs: as for `Trainer`, but for `optimizers` and `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: the training arguments ask for something that cannot be had with this optimizer (the message lists all of it), or the
            weights cannot be used.
        OSError: there are no such weights.
    """

    args: TrainingArguments

    def __init__(self, *args: Any, pretrained: str = "default", revision: str | None = None, **kwargs: Any) -> None:
        network = load_network(pretrained, revision=revision)
        super().__init__(*args, optimizer_cls_and_kwargs=(LearnedOptimizer, {"pretrained": network}), **kwargs)
        # Another trainer, of AdamW's say, may be made with the same arguments.
        self.args = copy.copy(self.args)
        _check(self.args)
        for name, value in CHOSEN.items():
            setattr(self.args, name, value)
        self._weights = f"pretrained={pretrained!r}, weights {fingerprint(network)}, total_steps of the whole training"
        self._watch = _Watch()
        self.add_callback(self._watch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        _check(self.args)  # again, since a hyperparameter search changes them
        return super().create_optimizer(model)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._watch.update_rms}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # The card is written from the arguments, which know torch's own optimizers only.
        real = self.args
        self.args = copy.copy(real)
        self.args.learning_rate, self.args.optim, self.args.optim_args = 1.0, NAME, self._weights
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args = real
        card = Path(real.output_dir, "README.md")
        if self.is_world_process_zero() and NAME not in (text := card.read_text(encoding="utf-8")):  # TRL's cards name no optimizer
            card.write_text(f"{text.rstrip()}\n\n## Optimizer\n\n`{NAME}`: {self._weights}\n", encoding="utf-8")


class _Watch(TrainerCallback):
    """Tells the optimizer its horizon, and measures its updates."""

    def __init__(self) -> None:
        self.update_rms: dict[str, float] = {}
        self._due = False
        self._before: list[list[Tensor]] = []

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, optimizer: Any, **___: Any) -> None:
        if state.global_step == 0:
            # Trainer keeps the optimizer for a second `train()`. Its clock would stand at the end of the horizon, where it no longer moves.
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["total_steps"] = state.max_steps
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
                self.update_rms[f"update_rms/group_{i}"] = (squares / count).sqrt().item()
        self._before = []

    def on_log(self, *_: Any, **__: Any) -> None:
        self._due = True


def _check(args: TrainingArguments) -> None:
    defaults = {field.name: field.default for field in fields(args)}
    values = {name: getattr(args, name) for name in (*CHOSEN, *WITHOUT_EFFECT)}
    asked = [f"{name}={value!r}" for name, value in values.items() if value not in (defaults[name], CHOSEN.get(name, defaults[name]))]
    if asked:
        raise ValueError(
            "LearnedOptimizerTrainer has no learning rate, a constant schedule and no clipping, as its weights were meta-trained; "
            f"these TrainingArguments ask for something else: {', '.join(asked)}. Leave them out. (weight_decay is used.) To schedule or "
            "clip all the same, give Trainer optimizer_cls_and_kwargs=(LearnedOptimizer, {}), where the schedule scales the learned update."
        )
