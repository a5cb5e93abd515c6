"""`LearnedOptimizer` in the Trainer of Hugging Face Transformers.

    from learned_optim.integrations.transformers import LearnedOptimizerTrainer

    trainer = LearnedOptimizerTrainer(model, TrainingArguments("out"), train_dataset=dataset)

A trainer of another library takes the mixin: `class Mine(LearnedOptimizerMixin, SFTTrainer): pass`.

`Trainer(..., optimizer_cls_and_kwargs=(LearnedOptimizer, {}))` works too, with the Trainer's own defaults: a linear schedule and clipping,
which the weights were not meta-trained with, and no known horizon.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from learned_optim.optimizer import LearnedOptimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import SchedulerType
except ImportError:
    raise ImportError("this needs transformers and accelerate: pip install 'learned-optim[transformers]'") from None


class LearnedOptimizerMixin:
    """Makes a Trainer train with `LearnedOptimizer`, as its weights were meta-trained.

    - The schedule is constant and gradients are not clipped: the rule anneals by itself, and does not depend on the gradients' scale.
    - The optimizer knows the horizon, `max_steps`, also after a resume and in a second `train()`.
    - Beside the loss, each parameter group's `effective_lr` is logged: the learning rate that would give AdamW updates of that size.
    - The model card names this optimizer and its weights.

    Args:
        optimizer_kwargs: arguments of `LearnedOptimizer`, such as `{"pretrained": "user/name"}`. Weight decay is the Trainer's argument.

    Raises:
        ValueError: the training arguments ask for what this optimizer replaces.
    """

    def __init__(self, *args: Any, optimizer_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("optimizers", "optimizer_cls_and_kwargs"):
            if name in kwargs:
                raise ValueError(
                    f"{type(self).__name__} brings its own optimizer and takes no `{name}`; its arguments are `optimizer_kwargs`"
                )
        chosen = (LearnedOptimizer, dict(optimizer_kwargs or {}))
        super().__init__(*args, optimizer_cls_and_kwargs=chosen, **kwargs)  # type: ignore[call-arg]
        choose_arguments(self.args)  # type: ignore[attr-defined]
        self.add_callback(Horizon())  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = learned_optimizer(self.optimizer)  # type: ignore[attr-defined]
        if "loss" in logs and optimizer:
            logs |= {f"effective_lr_{index}": lr for index, lr in enumerate(optimizer.effective_lr()) if lr is not None}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        optimizer = learned_optimizer(self.optimizer)  # type: ignore[attr-defined]
        card = Path(self.args.output_dir, "README.md")  # type: ignore[attr-defined]
        if optimizer and self.is_world_process_zero() and card.exists():  # type: ignore[attr-defined]
            group = optimizer.param_groups[0]
            truth = (
                f"- optimizer: LearnedOptimizer, weights {group['weights']}, multiplier {group['lr']}, horizon {group['total_steps']} steps"
            )
            text = re.sub(r"^- optimizer: .*$", truth, card.read_text(), flags=re.MULTILINE)
            card.write_text(re.sub(r"^- learning_rate: .*\n", "", text, flags=re.MULTILINE))


class LearnedOptimizerTrainer(LearnedOptimizerMixin, Trainer):
    """`transformers.Trainer` with `LearnedOptimizer`; see `LearnedOptimizerMixin`."""


class Horizon(TrainerCallback):
    """Tells the optimizer how many steps there will be."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = learned_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        clocks = [int(tensors["step"]) for tensors in optimizer.state.values() if "step" in tensors]
        for group in optimizer.param_groups:  # the clocks go on where a first `train()` or a checkpoint left them
            group["total_steps"] = max(clocks, default=0) + state.max_steps - state.global_step


def learned_optimizer(optimizer: torch.optim.Optimizer | None) -> LearnedOptimizer | None:
    """The optimizer inside of accelerate's wrapper, if it is ours."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, LearnedOptimizer) else None


def choose_arguments(args: TrainingArguments) -> None:
    """Changes the Trainer's defaults to what the weights were meta-trained for.

    Raises:
        ValueError: what the user chose otherwise, all of it at once.
    """
    defaults = {field.name: field.default for field in args.__dataclass_fields__.values()}
    conflicts = []
    if args.lr_scheduler_type not in (SchedulerType.LINEAR, SchedulerType.CONSTANT) or args.warmup_steps:
        conflicts.append("a schedule or warm-up (the rule has its own): leave lr_scheduler_type and warmup_steps at their defaults")
    if args.max_grad_norm not in (defaults["max_grad_norm"], 0.0, None):
        conflicts.append(
            "clipping (the update does not depend on the gradient's scale): leave max_grad_norm at its default, or set it to 0"
        )
    if args.learning_rate != defaults["learning_rate"]:
        conflicts.append('learning_rate (there is none): remove it; optimizer_kwargs={"lr": 0.5} halves every update')
    if conflicts:
        raise ValueError("the training arguments ask for what LearnedOptimizer replaces:\n- " + "\n- ".join(conflicts))
    args.lr_scheduler_type = SchedulerType.CONSTANT
    args.max_grad_norm = 0.0
