"""The meta-training loop: tasks -> unroll -> meta-gradient -> meta-optimizer -> checkpoint.

A meta-step advances a few unrolls by one truncation each, back-propagates their meta-loss into the network, and steps the meta-optimizer.
Unrolls go on from where they were, and start over with a new task when their horizon is reached, so that one meta-step sees all phases of
training. Everything random is drawn from a generator seeded by its place in the run; hence a resumed run continues with the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor

from ..network import OptimizerNetwork
from ..weights import save_network
from . import checkpoint
from .config import MetaTrainConfig
from .tasks import Family, Reparametrized, Task
from .unroll import Unroll, advance, draw, initial_params, start

# The meta-loss is log(FLOOR + loss / first loss): relative progress counts alike in all tasks, and a task that is all but solved stops counting.
FLOOR = 0.02
NORM_DECAY = 0.9  # of the running mean of each family's meta-gradient norm


@dataclass
class Slot:
    """A place for unrolls of one family, one after the other."""

    family: str
    index: int
    restarts: int = 0  # unrolls begun
    task_restart: int = 0  # the unroll for which the task was sampled
    unroll: Unroll | None = None  # under way, or finished and about to be replaced


@dataclass
class MetaTrainResult:
    """What a finished run hands over."""

    network: OptimizerNetwork
    meta_losses: list[float]  # one a meta-step
    dropped: int  # unrolls dropped because their loss or meta-gradient was not finite


def meta_train(
    families: Mapping[str, Family],
    config: MetaTrainConfig,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    network: OptimizerNetwork | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MetaTrainResult:
    """Meta-trains an optimizer network.

    Args:
        families: what to train on, by name.
        config: how.
        folder: where the finished weights go, and until then the checkpoint and the log (`log.jsonl`); a run that finds its checkpoint there
            resumes from it.
        device: where to run, "cpu" or "cuda".
        network: the weights to start from; fresh ones by default.
        progress: called after each meta-step with its number and its figures.

    Raises:
        ValueError: there is nothing to train on, or the folder holds a run with another configuration.
    """
    if not families:
        raise ValueError("meta_train needs at least one task family")
    torch.manual_seed(config.seed)
    network = (network or OptimizerNetwork(config.network)).to(device).requires_grad_(True)
    for name, weight in network.named_parameters():
        weight.requires_grad_(not name.startswith(config.frozen) if config.frozen else True)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    meta_optimizer = torch.optim.Adam(weights, lr=config.learning_rate, betas=(0.9, 0.99))
    slots = [Slot(family, index) for index in range(config.unrolls_per_family) for family in families]
    norms: dict[str, float] = {}
    history: list[float] = []
    dropped = 0

    state = checkpoint.load(folder, config) if folder is not None else None
    if state is not None:
        network.load_state_dict(state["network"])
        meta_optimizer.load_state_dict(state["meta_optimizer"])
        norms, history, dropped = state["norms"], state["history"], state["dropped"]
        for slot, saved in zip(slots, state["slots"], strict=True):
            restore(slot, saved, families, config)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(checkpoint.open_log(folder, len(history))) if folder is not None else None
        for meta_step in range(len(history), config.meta_steps):
            began = time.perf_counter()
            for group in meta_optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * meta_step / config.meta_steps))
            total = [torch.zeros_like(weight) for weight in weights]
            losses = []
            for turn in range(config.families_per_step):
                slot = slots[(meta_step * config.families_per_step + turn) % len(slots)]
                meta_loss, gradient = slot_gradient(slot, families, config, network, weights, meta_step)
                norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
                if not math.isfinite(meta_loss) or not math.isfinite(norm):
                    dropped += 1
                    slot.unroll = None
                    continue
                norms[slot.family] = NORM_DECAY * norms.get(slot.family, norm) + (1 - NORM_DECAY) * norm
                relative = norm / (norms[slot.family] + 1e-12)
                scale = min(1.0, config.clip / (relative + 1e-12)) / (norms[slot.family] + 1e-12)
                for part, piece in zip(total, gradient, strict=True):
                    part.add_(piece, alpha=scale / config.families_per_step)
                losses.append(meta_loss)
            for weight, part in zip(weights, total, strict=True):
                weight.grad = part
            if losses:
                meta_optimizer.step()
            history.append(sum(losses) / len(losses) if losses else math.nan)

            figures = {"meta_loss": history[-1], "dropped": dropped, "seconds": time.perf_counter() - began}
            if log is not None:
                log.write(json.dumps({"meta_step": meta_step, **figures}) + "\n")
            if progress is not None:
                progress(meta_step, figures)
            done = meta_step + 1
            if folder is not None and (done % config.checkpoint_every == 0 or done == config.meta_steps):
                saved_slots = [save(slot) for slot in slots]
                checkpoint.save(folder, config, network, meta_optimizer, norms=norms, history=history, dropped=dropped, slots=saved_slots)
    if folder is not None:
        save_network(network, folder)
    return MetaTrainResult(network.requires_grad_(False), history, dropped)


def slot_gradient(
    slot: Slot,
    families: Mapping[str, Family],
    config: MetaTrainConfig,
    network: OptimizerNetwork,
    weights: list[Tensor],
    meta_step: int,
) -> tuple[float, list[Tensor]]:
    """Advances a slot by one truncation; returns the meta-loss there and its gradient by the network's weights."""
    if slot.unroll is None or slot.unroll.step == slot.unroll.horizon:
        slot.unroll = begin(slot, families, config, network)
    generator = seeded(config.seed, 1, slots_id(slot), meta_step)
    length = min(config.truncation, slot.unroll.horizon - slot.unroll.step)
    batches = [draw(slot.unroll.task, config.replicas, generator, network.log_step_size.device) for _ in range(length + 1)]
    advanced, losses = advance(network, slot.unroll, batches, first_order=config.first_order)
    slot.unroll = advanced
    relative = losses / (advanced.first_loss + 1e-8)
    meta_loss = (relative + FLOOR).log().mean()
    return meta_loss.item(), list(torch.autograd.grad(meta_loss, weights, allow_unused=True, materialize_grads=True))


def begin(slot: Slot, families: Mapping[str, Family], config: MetaTrainConfig, network: OptimizerNetwork) -> Unroll:
    """A slot's next unroll: a new horizon, and a new task or, as in fine-tuning, the trained optimizees of the last one with fresh state.

    The first unrolls are cut short at random, so that slots fall out of step.
    """
    generator = seeded(config.seed, 0, slots_id(slot), slot.restarts)
    position = float(torch.rand((), generator=generator))
    horizon = round(config.horizon_min * (config.horizon_max / config.horizon_min) ** position)
    if slot.restarts == 0:
        horizon = max(config.truncation, round(horizon * float(torch.rand((), generator=generator))))
    known = bool(torch.rand((), generator=generator) < config.horizon_known)
    warm = bool(torch.rand((), generator=generator) < config.warm_restart) and slot.unroll is not None
    if not warm:
        slot.task_restart = slot.restarts
    slot.restarts += 1
    if warm and slot.unroll is not None:
        return start(slot.unroll.task, network, slot.unroll.params, horizon, known, generator)
    task = sample_task(slot, families, config)
    return start(task, network, initial_params(task, config.replicas, generator), horizon, known, generator)


def sample_task(slot: Slot, families: Mapping[str, Family], config: MetaTrainConfig) -> Task:
    generator = seeded(config.seed, 2, slots_id(slot), slot.task_restart)
    task = families[slot.family](generator)
    if config.reparametrize and torch.rand((), generator=generator) < 0.5:
        task = Reparametrized(task, generator, config.reparametrize)
    return task


def slots_id(slot: Slot) -> int:
    return slot.index * 1_000_003 + sum(ord(letter) * 257**place for place, letter in enumerate(slot.family)) % 1_000_003


def seeded(*keys: int) -> Generator:
    """A generator for one place of the run."""
    seed = 0
    for key in keys:
        seed = (seed * 6364136223846793005 + key + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def save(slot: Slot) -> dict[str, object]:
    """A slot as plain values and tensors; its task is made again from `task_restart`."""
    saved: dict[str, object] = {"restarts": slot.restarts, "task_restart": slot.task_restart}
    if slot.unroll is not None:
        saved["unroll"] = {field.name: getattr(slot.unroll, field.name) for field in fields(slot.unroll) if field.name != "task"}
    return saved


def restore(slot: Slot, saved: dict[str, Any], families: Mapping[str, Family], config: MetaTrainConfig) -> None:
    """Undoes `save`."""
    slot.restarts, slot.task_restart = saved["restarts"], saved["task_restart"]
    if "unroll" in saved:
        slot.unroll = Unroll(task=sample_task(slot, families, config), **saved["unroll"])
