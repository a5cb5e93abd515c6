"""What is inside optimizer weights, and inside the state of an optimizer that was saved: `learned-optim inspect`.

The state says why a model does not learn: which tensors had no gradient, whose steps are as short or as long as they may be, whether the
warm-up is over and the horizon behind.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks
from .config import NetworkConfig
from .network import MOST, OptimizerNetwork
from .report import aligned, count, plain
from .rule import CONTROL, Control
from .storage import bytes_per_weight
from .weights import fingerprint

BEHIND = 0.9  # a tensor with less than this share of the others' steps was left out of some
SHOWN = 20  # tensors of a group that the text has
WIDTH = 120  # of lines of text
DEPTH = 4  # of dictionaries and lists around an optimizer's state


@dataclass
class TensorState:
    """What an optimizer keeps of one tensor."""

    name: str
    shape: list[int]
    steps: int  # since its first gradient that was not zero
    factor: float  # of the step size: what the controller has made of the prior
    at_bound: str  # "shortest" or "longest" where the factor is the least or greatest, else ""
    warm_up: float | None  # share of the step size that the warm-up lets through; None where the optimizer weights are not known
    trend: float  # recent cosine of gradient and momentum
    gradient_rms: float  # of recent gradients
    momentum_rms: float
    nbytes: int
    finite: bool


@dataclass
class GroupState:
    """A parameter group."""

    lr: float
    weight_decay: float
    total_steps: int | None
    parameters: int
    without_state: list[str]  # names of parameters that had no gradient
    tensors: list[TensorState]


@dataclass
class OptimizerState:
    """The state of a `LearnedOptimizer`.

    Args:
        place: where in the file it was found.
        weights: fingerprint of the optimizer weights that it was made with.
        known_as: their name, where they are known.
    """

    place: str
    weights: str
    known_as: str | None
    groups: list[GroupState] = field(default_factory=list)

    @property
    def tensors(self) -> list[TensorState]:
        return [tensor for group in self.groups for tensor in group.tensors]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(asdict(self) | {"findings": self.findings()})
        return found

    def text(self, everything: bool = False) -> str:
        """A line on the whole, a table of each group, and the findings.

        Args:
            everything: all tensors, and not only the first of each group.
        """
        size, nbytes = sum(math.prod(tensor.shape) for tensor in self.tensors), sum(tensor.nbytes for tensor in self.tensors)
        known = f'"{self.known_as}"' if self.known_as else "which are none of the bundled ones"
        lines = [
            f"{self.place}{count(len(self.tensors), 'tensor')} of {size:,} weights, {nbytes / 2**20:.1f} MB of state"
            + (f" ({nbytes / size:.1f} bytes a weight)" if size else ""),
            f"made with optimizer weights {self.weights}, {known}",
        ]
        for i, group in enumerate(self.groups):
            horizon = "not known" if group.total_steps is None else f"{group.total_steps} steps"
            head = f"group {i}: lr {group.lr:g}, weight_decay {group.weight_decay:g}, horizon {horizon}"
            lines += ["", f"{head}, {count(group.parameters, 'parameter')}, {len(group.without_state)} without state"]
            shown = group.tensors if everything else group.tensors[:SHOWN]
            if shown:
                rows = [("", "shape", "steps", "step size", "warm-up", "trend", "gradient", "momentum")]
                rows += [
                    (
                        tensor.name,
                        "x".join(map(str, tensor.shape)) or "()",
                        f"{tensor.steps:,}",
                        f"x {tensor.factor:.2f}",
                        "" if tensor.warm_up is None else f"x {tensor.warm_up:.2f}",
                        f"{tensor.trend:+.2f}",
                        f"{tensor.gradient_rms:.2g}",
                        f"{tensor.momentum_rms:.2g}",
                    )
                    for tensor in shown
                ]
                lines.append(aligned(rows))
            if more := len(group.tensors) - len(shown):
                lines.append(f"and {more} more; --all shows them")
        legend = (
            "Step size: what the controller has made of the prior, 0.05 to 20. Warm-up: the share that it lets through. Trend: recent\n"
            "cosine of gradient and momentum, above 0 where gradients agree. Gradient, momentum: their recent root mean squares."
        )
        return "\n".join(
            [*lines, "", legend, "", *(textwrap.fill(f"- {finding}", WIDTH, subsequent_indent="  ") for finding in self.findings())]
        )

    def findings(self) -> list[str]:
        """What stands out, in sentences, worst first."""
        found = []
        if broken := [tensor.name for tensor in self.tensors if not tensor.finite]:
            found.append(f"The state of {_named(broken)} is not finite: start without it.")
        for i, group in enumerate(self.groups):
            where = f"Group {i}" if len(self.groups) > 1 else "The optimizer"
            if group.lr <= checks.groups.SMALL_LR:
                found.append(
                    f"{where} has lr={group.lr:g}. It multiplies the update and is no learning rate, so training is slower by as much: "
                    "leave it at 1.0, and look for a scheduler that lowers it."
                )
            over = [tensor.name for tensor in group.tensors if group.total_steps is not None and tensor.steps >= group.total_steps]
            if over:
                found.append(
                    f"{where} has total_steps={group.total_steps}, which {_named(over)} went through: steps there have come down to zero. "
                    "Raise total_steps in the group, or go on without this state."
                )
            if group.without_state:
                found.append(
                    f"There is no state of {_named(group.without_state)}: no gradient came there so far. Frozen, unused in forward, or "
                    "detached from the loss?"
                )
        if idle := [tensor.name for tensor in self.tensors if not tensor.steps]:
            found.append(f"All gradients of {_named(idle)} were zero so far, so nothing moved there.")
        most = max((tensor.steps for tensor in self.tensors), default=0)
        if behind := [tensor.name for tensor in self.tensors if 0 < tensor.steps < BEHIND * most]:
            found.append(
                f"There were {most:,} steps, and fewer of {_named(behind)}: no gradient, or one that was not finite (`optimizer.skipped` "
                "counts those), or it was added later."
            )
        for bound, meaning in (
            ("shortest", "gradients turned back at nearly every step. A larger batch, if they are noise; or the loss is as low as it gets"),
            ("longest", "gradients went on agreeing. Try a larger lr, 3 say, if this lasts"),
        ):
            if names := [tensor.name for tensor in self.tensors if tensor.at_bound == bound]:
                found.append(f"Steps of {_named(names, len(self.tensors))} are the {bound} that the controller allows: {meaning}.")
        if cold := [tensor for tensor in self.tensors if tensor.warm_up is not None and tensor.warm_up < 1 and tensor.steps]:
            share, names = statistics.median(tensor.warm_up or 0.0 for tensor in cold), [tensor.name for tensor in cold]
            found.append(
                f"The warm-up of {_named(names, len(self.tensors))} goes on: steps have {share:.2g} of their size. It ends as gradients "
                "agree, so early in a run this is as it should be, and in fine-tuning throughout. From scratch and after a hundred steps "
                "it means that gradients are noise: look at data, labels and loss."
            )
        return found or ["Nothing stands out: all tensors move, none at the bounds of its step size."]


def weights_text(name: str, network: OptimizerNetwork, reference: tuple[str, OptimizerNetwork]) -> str:
    """Each tensor of optimizer weights: a scalar's value, and what a logarithm stands for; of others the root mean square and the greatest
    absolute value. Beside them the same of a reference."""
    tensors, others = network.state_dict(), reference[1].state_dict()
    rows = [("", "shape", name, reference[0])]
    rows += [
        (key, "x".join(map(str, tensor.shape)) or "()", _described(key, tensor), _described(key, others[key]) if key in others else "")
        for key, tensor in tensors.items()
    ]
    size = sum(tensor.numel() for tensor in tensors.values())
    head = f"{size} numbers, {bytes_per_weight(network.config):.1f} bytes of state for each weight of a model, {fingerprint(network)}"
    return f"{head}\n\n{aligned(rows)}\n\nThe docstrings in learned_optim/network.py say what each is for."


def weights_dict(name: str, network: OptimizerNetwork) -> dict[str, Any]:
    """The same, as JSON has it: every number."""
    tensors = {key: plain(tensor.tolist()) for key, tensor in network.state_dict().items()}
    return {"weights": name, "fingerprint": fingerprint(network), "tensors": tensors}


def _described(key: str, tensor: Tensor) -> str:
    if tensor.ndim:
        return f"rms {tensor.square().mean().sqrt():.3f}, max {tensor.abs().max():.3f}"
    value = tensor.item()
    return f"{value:.3f} (e^ {math.exp(value):.3g})" if key.rpartition(".")[2].startswith("log_") else f"{value:.3f}"


def _named(names: Sequence[str], of: int | None = None) -> str:
    if of is not None and len(names) == of > 1:
        return f"all {of} tensors"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_states(path: Path, weights_of: Callable[[str], tuple[str, OptimizerNetwork] | None]) -> list[OptimizerState]:
    """The states of `LearnedOptimizer` in a file that `torch.save` wrote: a state dict, or a checkpoint with some among its entries. No
    code runs that the file might hold.

    Args:
        weights_of: name and network of optimizer weights by their fingerprint, where they are known.

    Raises:
        ValueError: the file holds none, or what does not fit one; the message names it.
        OSError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch raises errors of many kinds for damaged files
        raise ValueError(
            f"{path} was not written by torch.save, is damaged, or holds other things than tensors, numbers and text, a whole model say, "
            "which are not loaded since they could run code; save optimizer.state_dict()"
        ) from None
    found = dict(_optimizers(content))
    ours = {place: state for place, state in found.items() if any("weights" in group for group in state["param_groups"])}
    if not ours:
        keys = f"it holds {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) else f"it holds a {type(content).__name__}"
        other = "the state of another optimizer" if found else "no optimizer's state"
        raise ValueError(f"{path} has {other}, and none of a LearnedOptimizer; {keys}")
    try:
        return [_state(place, state, weights_of) for place, state in ours.items()]
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds a state that does not fit this learned_optim: {str(error) or type(error).__name__}") from None


def _optimizers(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whatever looks like an optimizer's state dict, by its place."""
    if depth > DEPTH or not isinstance(content, (Mapping, list, tuple)):
        return
    if isinstance(content, Mapping) and isinstance(content.get("state"), Mapping) and isinstance(content.get("param_groups"), list):
        if all(isinstance(group, Mapping) for group in content["param_groups"]):
            yield place, dict(content)
        return
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        yield from _optimizers(value, f"{place}[{key!r}]", depth + 1)


def _state(place: str, state_dict: Mapping[str, Any], weights_of: Callable[[str], tuple[str, OptimizerNetwork] | None]) -> OptimizerState:
    weights = str(state_dict["param_groups"][0]["weights"])
    known = weights_of(weights)
    found = OptimizerState(f"{place}: " if place else "", weights, known[0] if known else None)
    for group in state_dict["param_groups"]:
        names = group.get("param_names") or [f"parameter {index}" for index in group["params"]]
        total_steps, states = group["total_steps"], state_dict["state"]
        pairs = list(zip(names, group["params"], strict=True))
        tensors = [_tensor(name, states[index], known[1] if known else None) for name, index in pairs if "control" in states.get(index, {})]
        without = [name for name, index in pairs if "control" not in states.get(index, {})]
        found.groups.append(GroupState(float(group["lr"]), float(group["weight_decay"]), total_steps, len(names), without, tensors))
    return found


def _tensor(name: str, state: Mapping[str, Tensor], network: OptimizerNetwork | None) -> TensorState:
    rows, moments = state["control"].float(), state["moments"]
    if rows.shape != (CONTROL,):
        raise ValueError(f"the state 'control' of {name} has the shape {tuple(rows.shape)}, and this version keeps ({CONTROL},)")
    if len(moments) != 2:
        raise ValueError(f"the state 'moments' of {name} has the shape {tuple(moments.shape)}, and this version keeps (2, ...)")
    control = Control.of(rows)
    momentum, gradient = (moment.mean().item() if moment.numel() else 0.0 for moment in (moments[0].float().square(), moments[1].float()))
    bias = 1 - (network.config if network else NetworkConfig()).second_moment ** max(1, int(control.step))
    correction, climbed = control.correction.item(), control.climbed.item()
    return TensorState(
        name=name,
        shape=list(moments.shape[1:]),
        steps=int(control.step),
        factor=math.exp(correction),
        at_bound="" if abs(correction) < MOST else "longest" if correction > 0 else "shortest",
        warm_up=None if network is None else math.exp(min(0.0, network.controller.log_start.item() + climbed)),
        trend=control.trend.item(),
        gradient_rms=math.sqrt(max(0.0, gradient) / bias),
        momentum_rms=math.sqrt(momentum),
        nbytes=sum(value.nbytes for value in state.values() if isinstance(value, Tensor)),
        finite=all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, Tensor)),
    )
