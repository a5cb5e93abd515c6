"""Parameter groups: which options there are, whether their numbers are in range, and whether a checkpoint's groups fit."""

from __future__ import annotations

import numbers
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from operator import itemgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .parameters import is_lazy

# What a group may say, and what it may carry for others: schedulers of torch and timm leave these there.
OPTIONS = ("lr", "weight_decay", "total_steps", "maximize", "matrices", "stacked", "weights")
CARRIED = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale")

SAID = itemgetter(*OPTIONS)

LATER = ("maximize", "matrices", "stacked")  # options that checkpoints from before them lack

# What Trainer's arguments hold for AdamW alone; warm-up, schedule, clipping and weight decay it does itself or hands on.
OF_ADAMW = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "optim_target_modules")

EXPERTS = re.compile(r"expert\w*(\.[a-z_]\w*)*$", re.IGNORECASE)  # in one tensor; apart, each has a number in its name

LARGEST = torch.finfo(torch.float32).max  # of an lr or a weight decay

NO_LR = "lr multiplies the learned update and must not be negative, got {}, and must be finite; 1.0 is the default"
SMALL_LR = 0.01  # up to here an lr is more likely AdamW's than a multiplier


def check_keys(group: dict[str, Any]) -> None:
    """Refuses a group with an option that would be ignored."""
    if unknown := sorted(str(key) for key in group if key not in OPTIONS + CARRIED):
        raise ValueError(
            f"LearnedOptimizer does not know the group option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, and would ignore what "
            f"is meant by it; leave it out. A group has {', '.join(OPTIONS[:-1])}."
        )


def ignored_options(group: dict[str, Any]) -> list[str]:
    """What somebody wrote into a group since it was added, and nothing reads."""
    cycled = ("momentum",) if "base_momentum" in group or "max_momentum" in group else ()
    return sorted(str(key) for key in group if key not in OPTIONS + CARRIED + cycled)


def check_caller(frame: FrameType, parts_group: object) -> None:
    """Refuses to be one of the parts of ZeroRedundancyOptimizer without knowing it: nothing else shows that the parameters of an optimizer
    are not the whole model, and steps would be longer without a word.

    Args:
        frame: of what builds the optimizer.
    """
    if parts_group is None and frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer gives each process a part of the model, and LearnedOptimizer must know of it: give it "
            "functools.partial(LearnedOptimizer, parts_group=torch.distributed.group.WORLD, ...) as optimizer_class, with all other "
            "arguments in there too, or shard the model with torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def warn_of_trainer(frame: FrameType, stacklevel: int) -> None:
    """Says so where the plain Trainer of transformers builds the optimizer and was given numbers for AdamW, which it then drops.

    Args:
        frame: of what builds the optimizer.
    """
    if frame.f_globals.get("__name__") != "transformers.trainer":
        return
    trainer = frame.f_locals.get("self")
    args = getattr(trainer, "args", None)
    if not is_dataclass(args) or getattr(trainer, "names_what_it_ignores", False):
        return
    defaults = {field.name: field.default for field in fields(args)}
    if ignored := [f"{name}={getattr(args, name)!r}" for name in OF_ADAMW if getattr(args, name, None) != defaults.get(name)]:
        warnings.warn(
            f"Trainer ignores {', '.join(ignored)} with an optimizer that it was given as a class. LearnedOptimizer needs none of it: "
            "its lr, a multiplier, is given with the class. learned_optim.integrations.transformers.LearnedOptimizerTrainer also leaves "
            "out Trainer's schedule and clipping, without which the weights were meta-trained.",
            stacklevel=stacklevel,
        )


def warn_of_experts(named: Iterable[tuple[str, Tensor]], stacklevel: int) -> None:
    """Says so where experts lie in one tensor, by its name, and nobody said that it is a stack of matrices.

    Args:
        named: parameters that no group calls stacked.
    """
    if experts := [name for name, param in named if EXPERTS.search(name) and param.requires_grad and not is_lazy(param) and param.ndim > 2]:
        warnings.warn(
            f"parameter {experts[0]!r} seems to hold experts, and is taken for a convolution's weight. If its last two dimensions are an "
            'expert\'s matrix, give stacked=True, or such parameters a group with "stacked": True.',
            stacklevel=stacklevel,
        )


def named_parameters(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Those of groups that are not stacked, where the optimizer was given names."""
    for group in groups:
        if not group["stacked"]:
            yield from zip(group.get("param_names", ()), group["params"], strict=False)


def check_group(group: dict[str, Any]) -> None:
    """Refuses numbers that are none or out of range, and puts Python's own in place of NumPy's, which checkpoints would not load with
    `weights_only=True`.

    Raises:
        ValueError: with the option's name and the reason.
    """
    if missing := [key for key in OPTIONS if key not in group]:
        raise ValueError(f"a parameter group lacks {', '.join(missing)}")
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        check_tensor_lr(lr, may_wait=True)
    elif not _is_number(lr):
        raise ValueError(f"lr must be a number or a tensor with one element, got {lr!r:.80}")
    elif not _is_in_range(lr):
        raise ValueError(NO_LR.format(f"{lr!s:.80}"))
    else:
        group["lr"] = float(lr)
    if not _is_number(weight_decay) or not _is_in_range(weight_decay):
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!s:.80}, and must be a finite number")
    group["weight_decay"] = float(weight_decay)
    for key, what in (("total_steps", "optimizer steps"), ("matrices", "matrices in the whole model")):
        count = group[key]
        if count is None:
            continue
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or not 1 <= int(count) < 2**63:
            raise ValueError(f"{key} must be a positive number of {what}, or None where it is not known; got {count!r:.80}")
        group[key] = int(count)
    for key in ("maximize", "stacked"):
        if isinstance(group[key], Tensor) or group[key] not in (True, False):
            raise ValueError(f"{key} must be True or False, got {group[key]!r:.80}")
        group[key] = bool(group[key])


def check_tensor_lr(lr: Tensor, *, may_wait: bool) -> None:
    """Refuses an lr that is a tensor and no number of the kind that an lr is.

    Args:
        may_wait: whether to look at the number where that waits for a GPU.
    """
    if lr.numel() != 1 or lr.is_complex() or lr.is_meta:
        raise ValueError(f"Tensor lr must be 1-element, real and no meta tensor, got shape {tuple(lr.shape)}, {lr.dtype} on {lr.device}")
    if (may_wait or lr.device.type == "cpu") and not 0 <= lr.item() <= LARGEST:
        raise ValueError(NO_LR.format(lr))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_in_range(value: Any) -> bool:
    try:
        return 0 <= float(value) <= LARGEST  # numbers of NumPy might overflow beside the bound
    except OverflowError:
        return False


def warn_of_lr(groups: Sequence[dict[str, Any]], stacklevel: int) -> None:
    """Says so where an lr is of the size of AdamW's."""
    small = {lr for group in groups if 0 < (lr := float(group["lr"])) <= SMALL_LR}
    if small:
        warnings.warn(
            f"lr={max(small):g} multiplies the learned update, so training will be about {1 / max(small):.0f} times as slow as it was "
            "meta-trained to be. It is no learning rate: 1.0 is the default, and what to use unless you mean this.",
            stacklevel=stacklevel,
        )


def changed_options(groups: Sequence[dict[str, Any]], known: Sequence[tuple[Any, ...]], stacklevel: int) -> list[tuple[Any, ...]]:
    """Looks at what groups say where that has changed since the last step.

    Args:
        known: what this returned then.

    Returns:
        what they say now.

    Raises:
        ValueError: a number is out of range.
    """
    found = []
    for k, group in enumerate(groups):
        try:
            options = (*SAID(group), len(group))
        except KeyError:
            options = ()
        if k >= len(known) or len(options) != len(known[k]) or not all(map(operator.is_, options, known[k])):
            check_group(group)
            if ignored := ignored_options(group):
                names = ", ".join(ignored)
                warnings.warn(
                    f"parameter group {k} was given {names}, which LearnedOptimizer does not know and ignores", stacklevel=stacklevel
                )
            options = (*SAID(group), len(group))
        elif isinstance(group["lr"], Tensor):
            check_tensor_lr(group["lr"], may_wait=False)
        found.append(options)
    return found


def match(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], defaults: dict[str, Any], weights: str) -> dict[Any, Tensor]:
    """The parameter of each index in a state dict whose groups and numbers fit.

    Args:
        groups: the optimizer's.
        defaults: of options.
        weights: the fingerprint of the optimizer's.

    Raises:
        ValueError: they do not.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"this is no state of an optimizer: it lacks {key!r}")
    saved = state_dict["param_groups"]
    if not isinstance(state_dict["state"], dict) or not isinstance(saved, list | tuple):
        raise ValueError("this is no state of an optimizer: 'state' must be a dictionary, and 'param_groups' a list")
    for k, group in enumerate(saved):
        if not isinstance(group, dict):
            raise ValueError(f"parameter group {k} of the state is no dictionary but {group!r:.80}")
        for key in ("params", "param_names"):
            if not isinstance(group.get(key) or [], list | tuple) or any(isinstance(entry, list | dict) for entry in group.get(key) or []):
                raise ValueError(f"parameter group {k} of the state has no list of {key} but {group[key]!r:.80}")
    _check_fingerprint(state_dict, weights)
    for k, group in enumerate(saved):
        if missing := [key for key in ("params", "lr", "weight_decay", "total_steps") if key not in group]:
            raise ValueError(f"parameter group {k} of the state lacks {', '.join(missing)}")
    counts, mine = ([len(group["params"]) for group in each] for each in (saved, groups))
    if counts != mine:
        raise ValueError(f"the state has parameter groups of {counts} parameters, and the optimizer of {mine}")
    for group in saved:
        check_group({key: defaults[key] for key in LATER} | group)
    indices = [index for group in saved for index in group["params"]]
    params = [param for group in groups for param in group["params"]]
    if len(set(indices)) < len(set(map(id, params))):
        raise ValueError("parameter groups of the state name a parameter twice")
    ours = [key for key, entry in state_dict["state"].items() if isinstance(entry, dict) and "control" in entry]
    numbered = [key for key in state_dict["state"] if isinstance(key, int)]
    if strays := [key for key in dict.fromkeys([*numbered, *ours]) if key not in indices]:
        raise ValueError(f"the state has entries {strays} of parameters that none of its groups names")
    for theirs, group in zip(saved, groups, strict=True):
        names, others = group.get("param_names") or [], theirs.get("param_names") or []
        if moved := [one for one, other in zip(names, others, strict=False) if one != other and one in others]:
            raise ValueError(
                f"the state has the parameters in another order: {', '.join(moved)} stand elsewhere in it. Give the optimizer "
                "model.named_parameters() in the order in which the checkpoint was made."
            )
    return dict(zip(indices, params, strict=True))


def _check_fingerprint(state_dict: dict[str, Any], mine: str) -> None:
    for group in state_dict["param_groups"]:
        if "weights" not in group:
            raise ValueError("this state was not saved by a LearnedOptimizer; go on with the optimizer that saved it, or start without it")
        if group["weights"] != mine:
            raise ValueError(
                f"this state was made with optimizer weights {group['weights']}, but the optimizer runs {mine}; its hidden state would "
                "mean something else. Build LearnedOptimizer with the weights (and the revision) that the checkpoint was made with."
            )
