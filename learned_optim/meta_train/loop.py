"""The meta-training loop: tasks -> unroll -> meta-gradient -> meta-optimizer -> checkpoint.

A meta-step advances a few unrolls by one stretch each, estimates their meta-gradients, and steps the meta-optimizer. Unrolls go on from where
they were, and start over with a new task when their horizon is reached, so that one meta-step sees all phases of training. A resumed run
continues with the same numbers. Processes share the unrolls out among them.
"""

from __future__ import annotations

import copy
import math
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network import OptimizerNetwork
from . import checkpoint, distributed
from .averaging import average
from .config import MetaTrainConfig
from .estimators import INITIAL, Weights
from .slots import Slot
from .tasks import Family

WINDOW = 50  # meta-steps that the check for divergence averages over


class MetaTrainingDivergedError(RuntimeError):
    """The meta-loss rose far above its lowest, or no unroll stayed finite."""


@dataclass
class MetaTrainResult:
    """What a finished run hands over."""

    network: OptimizerNetwork
    meta_losses: list[float]  # one a meta-step; NaN where every unroll was dropped
    dropped: int  # unrolls dropped because their loss or meta-gradient was not finite
    initial: Tensor | None = None  # learned initial parameters, (N,)


def meta_train(
    families: Mapping[str, Family],
    config: MetaTrainConfig,
    *,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    network: OptimizerNetwork | None = None,
    initial: Tensor | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> MetaTrainResult:
    """Meta-trains an optimizer network.

    In a process group of `torch.distributed` (under `torchrun`, say), every process calls this with the same arguments.

    Args:
        families: what to train on, by name.
        config: how.
        folder: where the finished weights go, and until then the checkpoint and the log (`log.jsonl`); a run that finds its checkpoint
            there resumes from it.
        device: where to run, "cpu" or "cuda".
        network: the weights to start from; fresh ones by default.
        initial: parameters of the optimizees, laid end to end (N,), to be learned too (Finn et al. 2017, MAML); every unroll starts from
            them, so all tasks must have the same shapes.
        progress: called after each meta-step with its number and its figures.

    Raises:
        ValueError: there is nothing to train on, or the folder holds a run with another configuration.
        MetaTrainingDivergedError: going on is of no use; the checkpoint stays.
    """
    names = config.families or tuple(families)
    if not names or set(names) - set(families):
        raise ValueError(f"meta_train needs families to train on; config names {list(names)}, and these were handed over: {list(families)}")
    torch.manual_seed(config.seed)
    network = copy.deepcopy(network or OptimizerNetwork(config.network)).to(device).requires_grad_(True)
    meta_parameters = dict(network.named_parameters())
    if initial is not None:
        meta_parameters[INITIAL] = nn.Parameter(initial.detach().clone().to(device))
    weights = by_estimator(meta_parameters, config)
    trained = [weight for group in weights.values() for weight in group.values()]
    meta_optimizer = make_meta_optimizer(trained, config)
    slots = {
        estimator: [Slot(families, config, estimator, name, index) for index in range(config.unrolls_per_family) for name in names]
        for estimator in weights
    }
    log_norms: dict[str, float] = {}  # logarithm of the usual meta-gradient norm of each estimator and family
    history: list[float] = []
    dropped = 0

    if folder is not None and (saved := checkpoint.load(folder, config, device)) is not None:
        with torch.no_grad():
            for name, value in saved["meta_parameters"].items():
                meta_parameters[name].copy_(value)
        meta_optimizer.load_state_dict(saved["meta_optimizer"])
        log_norms, history, dropped = saved["log_norms"], saved["history"], saved["dropped"]
        for estimator, places in saved["slots"].items():
            for index, place in places.items():
                if distributed.is_mine(index):
                    slots[estimator][index].load_state_dict(place, device)

    with checkpoint.Log(folder, len(history)) as log:
        for meta_step in range(len(history), config.meta_steps):
            began = time.perf_counter()
            for group in meta_optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(config, meta_step)
            meta_losses: list[float] = []
            for estimator, served in weights.items():
                places = slots[estimator]
                turns = [(meta_step * config.unrolls_per_step + turn) % len(places) for turn in range(config.unrolls_per_step)]
                estimates = {turn: places[turn].estimate(network, served, meta_step) for turn in turns if distributed.is_mine(turn)}
                families_of = {turn: places[turn].family for turn in turns}
                gradient, found = average(estimates, families_of, estimator, served, log_norms, config)
                for name, weight in served.items():
                    weight.grad = gradient[name]
                for turn, meta_loss in found.items():
                    if math.isnan(meta_loss):
                        places[turn].unroll = None
                meta_losses += found.values()
            finite = [meta_loss for meta_loss in meta_losses if math.isfinite(meta_loss)]
            dropped += len(meta_losses) - len(finite)
            if finite:
                meta_optimizer.step()
            history.append(sum(finite) / len(finite) if finite else math.nan)

            figures = {"meta_loss": history[-1], "dropped": dropped, "seconds": time.perf_counter() - began}
            log.write(meta_step, figures)
            if progress is not None:
                progress(meta_step, figures)
            done = meta_step + 1
            if folder is not None and (done % config.checkpoint_every == 0 or done == config.meta_steps):
                checkpoint.save(
                    folder,
                    config,
                    meta_parameters=meta_parameters,
                    meta_optimizer=meta_optimizer.state_dict(),
                    log_norms=log_norms,
                    history=history,
                    dropped=dropped,
                    slots=slots,
                )
            if done % WINDOW == 0:
                stop_if_diverged(history, config)
    network.requires_grad_(False)
    if folder is not None and distributed.rank() == 0:
        network.save_pretrained(folder)
    learned = meta_parameters.get(INITIAL)
    return MetaTrainResult(network, history, dropped, None if learned is None else learned.detach())


def by_estimator(meta_parameters: Weights, config: MetaTrainConfig) -> dict[str, Weights]:
    """The meta-parameters that each estimator serves; frozen ones are left out."""
    served: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in meta_parameters.items():
        estimator = config.estimator_of(name)
        if estimator != "frozen":
            served.setdefault(estimator, {})[name] = weight
    if not served:
        raise ValueError(f"estimators {config.estimators} leave nothing to train; the meta-parameters are {list(meta_parameters)}")
    if INITIAL in served.get("pes", ()) or INITIAL in served.get("es", ()):
        raise ValueError('learned initial parameters need "exact", "first_order" or "reptile": there are too many for evolution strategies')
    if set(served.get("reptile", ())) - {INITIAL}:
        raise ValueError('"reptile" serves initial parameters alone; name another estimator for the network, or "frozen"')
    return dict(served)


def make_meta_optimizer(weights: Sequence[Tensor], config: MetaTrainConfig) -> torch.optim.Optimizer:
    try:
        made: torch.optim.Optimizer = pkgutil.resolve_name(config.optimizer)(weights, lr=config.learning_rate, **config.optimizer_options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"cannot make the meta-optimizer {config.optimizer!r} with optimizer_options {config.optimizer_options}: {error}"
        ) from error
    return made


def schedule(config: MetaTrainConfig, meta_step: int) -> float:
    """The share of the peak learning rate at a meta-step."""
    warm = min(1.0, (meta_step + 1) / config.warmup) if config.warmup else 1.0
    return warm * (0.5 * (1 + math.cos(math.pi * meta_step / config.meta_steps)) if config.schedule == "cosine" else 1.0)


def stop_if_diverged(history: Sequence[float], config: MetaTrainConfig) -> None:
    if len(history) >= WINDOW and all(math.isnan(meta_loss) for meta_loss in history[-WINDOW // 5 :]):
        raise MetaTrainingDivergedError(
            f"no unroll of the last {WINDOW // 5} meta-steps stayed finite; lower learning_rate or the horizons, or clip harder"
        )
    windows = [[value for value in history[begin : begin + WINDOW] if math.isfinite(value)] for begin in range(0, len(history), WINDOW)]
    means = [sum(window) / len(window) for window in windows if window]
    if means and means[-1] > min(means) + config.divergence:
        raise MetaTrainingDivergedError(
            f"the mean meta-loss of the last {WINDOW} meta-steps is {means[-1]:.3f}, and has been {min(means):.3f}; lower learning_rate, "
            "or raise divergence if the tasks' losses just differ as much"
        )
