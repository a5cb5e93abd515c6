"""The meta-training loop: tasks -> unroll -> meta-gradient -> meta-optimizer -> checkpoint.

A meta-step advances a few unrolls by one truncation each, back-propagates their meta-losses into the network, and steps the meta-optimizer.
Unrolls go on from where they were, and start over with a new task when their horizon is reached, so that one meta-step sees all phases of
training. A resumed run continues with the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network import OptimizerNetwork
from ..weights import save_network
from . import checkpoint
from .config import MetaTrainConfig
from .slots import Slot
from .tasks import Family
from .unroll import advance, draw

# The meta-loss is log(FLOOR + loss / first loss): relative progress counts alike in all tasks, and a task that is all but solved stops
# counting.
FLOOR = 0.02
NORM_DECAY = 0.9  # per visit, of the running mean of a family's log meta-gradient norm


@dataclass
class MetaTrainResult:
    """What a finished run hands over."""

    network: OptimizerNetwork
    meta_losses: list[float]  # one a meta-step; NaN where every unroll was dropped
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
        folder: where the finished weights go, and until then the checkpoint and the log (`log.jsonl`); a run that finds its checkpoint
            there resumes from it.
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
    weights = [weight for name, weight in network.named_parameters() if not any(map(name.startswith, config.frozen))]
    meta_optimizer = torch.optim.Adam(weights, lr=config.learning_rate, betas=(0.9, 0.99))
    slots = [Slot(families, config, family, index) for index in range(config.unrolls_per_family) for family in families]
    log_norms: dict[str, float] = {}  # logarithm of each family's usual meta-gradient norm
    history: list[float] = []
    dropped = 0

    if folder is not None and (saved := checkpoint.load(folder, config, device)) is not None:
        network.load_state_dict(saved["network"])
        meta_optimizer.load_state_dict(saved["meta_optimizer"])
        log_norms, history, dropped = saved["log_norms"], saved["history"], saved["dropped"]
        for slot, state in zip(slots, saved["slots"], strict=True):
            slot.load_state_dict(state)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(checkpoint.open_log(folder, len(history))) if folder is not None else None
        for meta_step in range(len(history), config.meta_steps):
            began = time.perf_counter()
            for group in meta_optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * meta_step / config.meta_steps))
            total = [torch.zeros_like(weight) for weight in weights]
            meta_losses = []
            for turn in range(config.families_per_step):
                slot = slots[(meta_step * config.families_per_step + turn) % len(slots)]
                meta_loss, gradient = meta_gradient(slot, network, weights, meta_step)
                norm = torch.linalg.vector_norm(torch.cat([part.flatten() for part in gradient])).item()
                if not math.isfinite(meta_loss + norm):
                    dropped += 1
                    slot.unroll = None
                    continue
                # Families differ in the size of their meta-gradients by orders of magnitude: divide by the usual size, then clip. Some
                # unrolls are chaotic and their meta-gradients huge, so the usual size is a geometric mean.
                log_norm = math.log(norm + 1e-12)
                log_usual = log_norms[slot.family] = NORM_DECAY * log_norms.get(slot.family, log_norm) + (1 - NORM_DECAY) * log_norm
                scale = min(math.exp(-log_usual), config.clip * math.exp(-log_norm))
                for part, share in zip(total, gradient, strict=True):
                    part.add_(share, alpha=scale / config.families_per_step)
                meta_losses.append(meta_loss)
            if meta_losses:
                for weight, part in zip(weights, total, strict=True):
                    weight.grad = part
                meta_optimizer.step()
            history.append(sum(meta_losses) / len(meta_losses) if meta_losses else math.nan)

            figures = {"meta_loss": history[-1], "dropped": dropped, "seconds": time.perf_counter() - began}
            if log is not None:
                log.write(json.dumps({"meta_step": meta_step, **figures}) + "\n")
            if progress is not None:
                progress(meta_step, figures)
            done = meta_step + 1
            if folder is not None and (done % config.checkpoint_every == 0 or done == config.meta_steps):
                places = [slot.state_dict() for slot in slots]
                checkpoint.save(
                    folder, config, network, meta_optimizer, log_norms=log_norms, history=history, dropped=dropped, slots=places
                )
    network.requires_grad_(False)
    if folder is not None:
        save_network(network, folder)
    return MetaTrainResult(network, history, dropped)


def meta_gradient(slot: Slot, network: OptimizerNetwork, weights: Sequence[Tensor], meta_step: int) -> tuple[float, Sequence[Tensor]]:
    """Advances a slot's unroll by one truncation. Returns the meta-loss of that stretch and its gradient by the network's weights."""
    config, unroll = slot.config, slot.current(network, meta_step)
    length = min(config.truncation, unroll.horizon - unroll.step)
    generator = slot.generator("batches", meta_step)
    batches = [draw(unroll.task, config.replicas, generator, unroll.params.device) for _ in range(length + 1)]
    slot.unroll, losses = advance(network, unroll, batches, first_order=config.first_order)
    measured = (FLOOR + losses / (unroll.first_loss + 1e-8)).log().mean(1)  # (T,)
    if config.meta_loss == "ramp":
        measured = measured * (2 / unroll.horizon * torch.arange(unroll.step + 1, unroll.step + length + 1, device=measured.device))
    meta_loss = measured.mean()
    return meta_loss.item(), torch.autograd.grad(meta_loss, weights, materialize_grads=True)
