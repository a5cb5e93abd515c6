"""The meta-training loop: tasks -> unroll -> meta-gradient -> meta-optimizer -> checkpoint.

A meta-step advances a few unrolls by one stretch each, estimates their meta-gradients, and steps the meta-optimizer. Unrolls go on from
where they were, and start over with a new task when their horizon is reached, so that one meta-step sees all phases of training. A resumed
run continues with the same numbers. Processes share the unrolls out among them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..network import OptimizerNetwork, load_network
from . import bar, checkpoint, distributed, stopping
from .averaging import average
from .checkpoint import Progress
from .config import MetaTrainConfig
from .estimators import INITIAL, Weights
from .evaluate import Evaluation
from .folder import claimed
from .handover import hand_over
from .logs import Log
from .recipe import STEPS, recipe
from .slots import Slot
from .tasks import Family, ModuleTask, check_problem

WINDOW = 50  # meta-steps that the check for divergence averages over


class MetaTrainingDivergedError(RuntimeError):
    """The meta-loss rose far above its lowest, or no unroll stayed finite."""


@dataclass
class MetaTrainResult:
    """What a finished run hands over."""

    network: OptimizerNetwork  # the best that was evaluated, or where nothing was, the last
    meta_losses: list[float]  # one a meta-step; NaN where every unroll was dropped
    dropped: int  # unrolls dropped because their loss or meta-gradient was not finite
    initial: Tensor | None = None  # learned initial parameters, (N,), of the same meta-step as the network
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # see `Evaluation`; with "meta_step"


def meta_train(
    families: Mapping[str, Family] | Family | ModuleTask,
    config: MetaTrainConfig | None = None,
    *,
    steps: int | None = None,
    budget: str | float | None = None,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    network: OptimizerNetwork | None = None,
    initial: Tensor | None = None,
    held_out: Mapping[str, Family] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    tensorboard: bool = False,
    command: str | None = None,
) -> MetaTrainResult:
    """Meta-trains an optimizer network.

    In a process group of `torch.distributed` (under `torchrun`, say), every process calls this with the same arguments.

    Args:
        families: what to train on, by name; or one problem, a task or a function that samples it, whose name is "problem".
        config: how. Without one, the bundled weights, or `network`, are specialised for these problems by `recipe.recipe`, which looks how
            long a training run takes.
        steps: of a training run, where there is no config; 100 by default.
        budget: wall time after which the run ends, "30 min", "2 h" or seconds, should it not be through with its meta-steps before; the
            time before a resume counts. The learning rate falls, and horizons grow, as if it were the last meta-step's.
        folder: where the finished weights and their model card go, and until then the checkpoint and the log (`log.jsonl`); a run that
            finds its checkpoint there resumes from it. No two runs at a time may have the same.
        device: where to run, "cpu" or "cuda".
        network: the weights to start from; fresh ones by default.
        initial: parameters of the optimizees, laid end to end (N,), to be learned too (Finn et al. 2017, MAML); every unroll starts from
            them, so all tasks must have the same shapes.
        held_out: what to evaluate on every `config.evaluate_every` meta-steps; by default the same families, with other seeds.
        progress: called after each meta-step with its number and its figures; by default, a terminal shows a bar.
        tensorboard: log to TensorBoard too, in the folder.
        command: how to make the run again, for the model card; by default, this call.

    Examples:
        >>> import torch
        >>> from learned_optim import LearnedOptimizer, load_network
        >>> from learned_optim.meta_train import MetaTrainConfig, ModuleTask, meta_train
        >>> inputs = torch.randn(32, 4)
        >>> task = ModuleTask(lambda: torch.nn.Linear(4, 1), [(inputs, inputs.sum(1, keepdim=True))], torch.nn.functional.mse_loss)
        >>> config = MetaTrainConfig(meta_steps=1, horizon_min=5, horizon_max=5, evaluate_every=1)  # a real run takes some hundred
        >>> result = meta_train(task, config, network=load_network("default"))
        >>> optimizer = LearnedOptimizer(torch.nn.Linear(4, 1).parameters(), result.network)

    Raises:
        ValueError: there is nothing to train on, the folder holds a run with another configuration or a damaged checkpoint, or the budget
            has no room for enough training runs.
        OSError: the folder cannot be written to, or another process has it (BlockingIOError).
        MetaTrainingDivergedError: going on is of no use; the checkpoint stays, and the best weights so far are in the folder.
        KeyboardInterrupt: Ctrl-C; the meta-step was finished, a checkpoint saved, and the best weights so far are in the folder.
    """
    if not isinstance(families, Mapping):
        check_problem(problem := families)
        families = {"problem": (lambda _: problem) if isinstance(problem, ModuleTask) else problem}
    limit = None if budget is None else stopping.seconds(budget)
    called = ["families", "config" if config else f"steps={steps or STEPS}", *([f"budget={budget!r}"] if budget else [])]
    command = command or f"learned_optim.meta_train.meta_train({', '.join(called)})"
    if config is None:
        network = network or load_network("default")
        begun = None if folder is None else checkpoint.config_of(folder)
        config = begun or recipe(families, copy.deepcopy(network).to(device), STEPS if steps is None else steps, limit, device)
        if steps not in (None, config.horizon_max):
            raise ValueError(f"{folder} holds a run of {config.horizon_max} steps, not {steps}; use another folder or delete it")
    elif steps is not None:
        raise ValueError("steps is for runs without a config, whose horizon_min and horizon_max say it")

    def spent(seconds: float) -> float:
        """The share of the budget that is used up, the same on every process."""
        return max(distributed.gather({distributed.rank(): seconds / limit}).values()) if limit else 0.0

    names = names_of(families, config)
    torch.manual_seed(config.seed)
    network = copy.deepcopy(network or OptimizerNetwork(config.network)).to(device).requires_grad_(True)
    meta_parameters = dict(network.named_parameters())
    if initial is not None:
        meta_parameters[INITIAL] = nn.Parameter(initial.detach().clone().to(device))
    start = meta_parameters.get(INITIAL)
    own = hold(meta_parameters, config)
    weights = by_estimator(meta_parameters, config)
    meta_optimizer, rates = make_meta_optimizer({name: weight for group in weights.values() for name, weight in group.items()}, config)
    kept = names * config.unrolls_per_family
    numbered = [(name, kept[:place].count(name)) for place, name in enumerate(kept)]
    slots = {estimator: [Slot(families, config, estimator, *each) for each in numbered] for estimator in weights}
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder))
        so_far = Progress()
        if folder is not None and (saved := checkpoint.load(folder, config, device)) is not None:
            set_values(meta_parameters, saved["meta_parameters"])
            meta_optimizer.load_state_dict(saved["meta_optimizer"])
            so_far = Progress(**saved["progress"])
            for estimator, places in saved["slots"].items():
                for index, place in places.items():
                    if distributed.is_mine(index):
                        slots[estimator][index].load_state_dict(place, device)
        evaluation = None
        if config.evaluate_every:
            began = time.perf_counter()
            evaluation = Evaluation(held_out or {name: families[name] for name in names}, config, device, so_far.adamw)
            so_far.adamw = evaluation.adamw
            if not so_far.evaluations:
                so_far.evaluations.append({"meta_step": -1, **evaluation(network)})
                so_far.best = {name: weight.detach().clone() for name, weight in meta_parameters.items()}
                so_far.seconds += time.perf_counter() - began  # a budget is for all of the run

        trouble = None
        with Log(folder, len(so_far.history), tensorboard) as log, stopping.after_a_meta_step() as stop:
            if progress is None:
                hidden = None if distributed.rank() == 0 else True
                progress = stack.enter_context(bar.shown(config.meta_steps, "meta_train", hidden))
            used = spent(so_far.seconds)
            for meta_step in range(len(so_far.history), config.meta_steps):
                if used >= 1:
                    break
                began, done = time.perf_counter(), meta_step + 1
                phase = max(meta_step, math.floor(used * config.meta_steps))  # where the schedules are
                for group, rate in zip(meta_optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(config, phase)
                meta_losses: list[float] = []
                for estimator, served in weights.items():
                    places = slots[estimator]
                    turns = [(meta_step * config.unrolls_per_step + turn) % len(places) for turn in range(config.unrolls_per_step)]
                    mine = {turn: places[turn] for turn in turns if distributed.is_mine(turn)}
                    estimates = {turn: slot.estimate(network, served, start, phase) for turn, slot in mine.items()}
                    families_of = {turn: places[turn].family for turn in turns}
                    gradient, found = average(estimates, families_of, estimator, served, so_far.log_norms, config)
                    for name, weight in served.items():
                        weight.grad = gradient[name]
                    for turn, meta_loss in found.items():
                        if math.isnan(meta_loss):
                            places[turn].unroll = None
                    meta_losses += found.values()
                finite = [meta_loss for meta_loss in meta_losses if math.isfinite(meta_loss)]
                so_far.dropped += len(meta_losses) - len(finite)
                so_far.history.append(sum(finite) / len(finite) if finite else math.nan)
                if finite:
                    meta_optimizer.step()

                used = spent(so_far.seconds + time.perf_counter() - began)
                last = done == config.meta_steps or used >= 1
                figures = {"meta_loss": so_far.history[-1], "dropped": so_far.dropped}
                if evaluation and (done % config.evaluate_every == 0 or last):
                    so_far.evaluations.append({"meta_step": meta_step, **evaluation(network)})
                    figures |= {"score": so_far.evaluations[-1]["score"], "first_score": so_far.evaluations[0]["score"]}
                    if figures["score"] <= min(past["score"] for past in so_far.evaluations):
                        so_far.best = {name: weight.detach().clone() for name, weight in meta_parameters.items()}
                figures["seconds"] = time.perf_counter() - began
                so_far.seconds += figures["seconds"]
                log.write(meta_step, figures)
                progress(meta_step, figures)
                if folder is not None and (done % config.checkpoint_every == 0 or last or stop.asked):
                    checkpoint.save(folder, config, meta_parameters, meta_optimizer, slots, so_far)
                if stop.asked:
                    break
                if done % WINDOW == 0 and (trouble := divergence(so_far.history, config)):
                    break

        set_values(meta_parameters, so_far.best | own)
        network.requires_grad_(False)
        if folder is not None and distributed.rank() == 0:
            hand_over(folder, network, config, names, so_far, command, timed=limit is not None)
        if stop.asked:
            where = "nothing is kept without a folder" if folder is None else f"the best weights are in {folder}, and the same call goes on"
            raise KeyboardInterrupt(f"stopped after {len(so_far.history)} of {config.meta_steps} meta-steps; {where}")
        if trouble:
            raise MetaTrainingDivergedError(trouble)
        return MetaTrainResult(network, so_far.history, so_far.dropped, None if start is None else start.detach(), so_far.evaluations)


def check(families: Mapping[str, Family], config: MetaTrainConfig) -> None:
    """Refuses what a run would refuse before its first meta-step; for stages that begin when others have taken their hours.

    Raises:
        ValueError: see `meta_train`.
    """
    names_of(families, config)
    meta_parameters = dict(OptimizerNetwork(config.network).named_parameters())
    hold(meta_parameters, config)
    make_meta_optimizer(
        {name: weight for group in by_estimator(meta_parameters, config).values() for name, weight in group.items()}, config
    )


def names_of(families: Mapping[str, Family], config: MetaTrainConfig) -> tuple[str, ...]:
    """The families to train on."""
    names = config.families or tuple(families)
    if not names or set(names) - set(families):
        raise ValueError(f"meta_train needs families to train on; config names {list(names)}, and these were handed over: {list(families)}")
    if config.unrolls_per_step > (kept := config.unrolls_per_family * len(names)):
        raise ValueError(f"unrolls_per_step is {config.unrolls_per_step}, but only {kept} unrolls are kept going; raise unrolls_per_family")
    return names


@torch.no_grad()
def set_values(weights: Weights, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        weights[name].copy_(value)


def hold(meta_parameters: Weights, config: MetaTrainConfig) -> dict[str, Tensor]:
    """Gives the scalars of `config.held` their values for the run. Returns their own."""
    for name in config.held:
        if name not in meta_parameters or meta_parameters[name].ndim or config.estimator_of(name) != "frozen":
            scalars = [name for name, weight in meta_parameters.items() if not weight.ndim]
            raise ValueError(f"held is for frozen scalars of the network, which {name!r} is not; its scalars are {scalars}")
    own = {name: meta_parameters[name].detach().clone() for name in config.held}
    set_values(meta_parameters, {name: torch.tensor(value) for name, value in config.held.items()})
    return own


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


def make_meta_optimizer(weights: Weights, config: MetaTrainConfig) -> tuple[torch.optim.Optimizer, list[float]]:
    """The meta-optimizer, with a group for each scale, and the groups' peak learning rates."""
    groups: dict[float, list[Tensor]] = {}
    for name, weight in weights.items():
        groups.setdefault(config.learning_rate * config.scale_of(name), []).append(weight)
    params = [{"params": members, "lr": rate} for rate, members in groups.items()]
    try:
        return optimizer_class(config.optimizer)(params, **config.optimizer_options), list(groups)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot make the meta-optimizer {config.optimizer!r} with optimizer_options {config.optimizer_options}: {error}"
        ) from error


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """What a configuration names is called, so it must be an optimizer."""
    found = pkgutil.resolve_name(name)
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise TypeError("it is no subclass of torch.optim.Optimizer")
    return found


def schedule(config: MetaTrainConfig, meta_step: int) -> float:
    """The share of the peak learning rate at a meta-step."""
    warm = min(1.0, (meta_step + 1) / config.warmup) if config.warmup else 1.0
    return warm * (0.5 * (1 + math.cos(math.pi * meta_step / config.meta_steps)) if config.schedule == "cosine" else 1.0)


def divergence(history: Sequence[float], config: MetaTrainConfig) -> str | None:
    """Why going on is of no use, or None."""
    if all(math.isnan(meta_loss) for meta_loss in history[-WINDOW // 5 :]):
        return f"no unroll of the last {WINDOW // 5} meta-steps stayed finite; lower learning_rate or the horizons"
    windows = [[value for value in history[begin : begin + WINDOW] if math.isfinite(value)] for begin in range(0, len(history), WINDOW)]
    means = [sum(window) / len(window) for window in windows if window]
    if means[-1] > min(means) + config.divergence:
        return (
            f"the mean meta-loss of the last {WINDOW} meta-steps is {means[-1]:.3f}, and has been {min(means):.3f}; lower learning_rate, "
            "or raise divergence if the tasks' losses just differ as much"
        )
    return None
