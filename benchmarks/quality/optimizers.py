"""The optimizers of the quality benchmark, each by a name that is its key in tables and files.

A baseline's name holds its learning rate and its schedule: "AdamW 0.003 cosine". Both schedules warm up over the first twentieth of the
steps; "constant" stays there, "cosine" and "linear" fall to zero. What is tuned is the family, which is the name's first word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from learned_optim import LearnedOptimizer, load_network
from learned_optim.rule import orthogonalize
from learned_optim.speed import WARM_UP, schedule

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# Families -> the names of their grids. The first one is what the others are measured by.
REFERENCE = "AdamW"
GRIDS: dict[str, list[str]] = {
    REFERENCE: [f"AdamW {lr:g} {schedule}" for lr in LEARNING_RATES for schedule in ("constant", "cosine")],
    "Muon": [f"Muon {lr:g} {schedule}" for lr in LEARNING_RATES[2:] for schedule in ("constant", "cosine")],
    "SGD": [f"SGD {lr:g} {schedule}" for lr in (3e-3, 1e-2, 3e-2, 1e-1, 3e-1) for schedule in ("constant", "cosine")],
    "ScheduleFree": [f"ScheduleFree {lr:g} constant" for lr in LEARNING_RATES[2:]],
}
# Run as they are, nothing tuned.
DEFAULTS = ["AdamW-default 0.001", "Trainer-default 5e-05 linear", "ScheduleFree-default 0.0025 constant", "Prodigy 1 cosine"]


# torch's Muon orthogonalises in bf16, which many CPUs emulate at a fiftieth of the speed. Here it has fp32, its own number of iterations
# and our scaling, from which they end closer to orthogonal. Runs on record were made with the Frobenius norm, as in torch.
torch.optim._muon._zeropower_via_newtonschulz = lambda grad, coefficients, steps, eps: orthogonalize(grad.float(), steps)


@dataclass
class Trained:
    """An optimizer with its schedule. Schedule-Free evaluates other parameters than it trains."""

    optimizer: Optimizer
    schedule: LambdaLR | None = None

    def step(self) -> None:
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()

    def mode(self, training: bool) -> None:
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if switch:
            switch()


class Both(Optimizer):
    """Muon for the matrices of hidden layers, AdamW for embeddings, read-outs and all else, with one learning rate."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        last = [name for name, param in named if param.ndim == 2][-1:]
        hidden = [
            param for name, param in named if param.ndim == 2 and "embed" not in name and "positions" not in name and name not in last
        ]
        chosen = set(hidden)
        rest = [param for _, param in named if param not in chosen]
        self.parts: list[Optimizer] = [torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")] if hidden else []
        self.parts += [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)] if rest else []
        super().__init__([param for _, param in named], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def baseline(name: str, model: nn.Module, steps: int) -> Trained:
    family, rate, *shape = name.split()
    lr, params = float(rate), [param for param in model.parameters() if param.requires_grad]
    if family.startswith("ScheduleFree"):
        from schedulefree import AdamWScheduleFree

        return Trained(AdamWScheduleFree(params, lr=lr, warmup_steps=max(1, round(WARM_UP * steps))))
    if family == "Prodigy":
        from prodigyopt import Prodigy

        optimizer: Optimizer = Prodigy(params, lr=lr)
    elif family == "SGD":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
    elif family == "Muon":
        optimizer = Both(model, lr)
    else:
        optimizer = torch.optim.AdamW(params, lr=lr)
    if family == "Trainer-default":  # its schedule has no warm-up
        return Trained(optimizer, LambdaLR(optimizer, lambda t: 1 - t / steps))
    return Trained(optimizer, schedule(shape[0], optimizer, steps) if shape else None)


# How the optimizer keeps its state between steps, beside what the weights' configuration says.
EXACT = "fp32-state"
STATES: dict[str, dict[str, str]] = {
    EXACT: {"moment_format": "float32", "lstm_format": "float32"},
    "small-state": {"moment_format": "bfloat16", "lstm_format": "int8"},
}
LEARNED, HORIZON = "learned", "learned+T"
MULTIPLIERS = (0.3, 3.0)
LEARNED_NAMES = [LEARNED, HORIZON]
SENSITIVITY = [f"{mode} x{multiplier:g}" for mode in LEARNED_NAMES for multiplier in MULTIPLIERS]
STORED = [f"{mode} {state}" for mode in LEARNED_NAMES for state in STATES]


def learned(name: str, params: Iterable[nn.Parameter], pretrained: str, steps: int) -> Trained:
    """ "learned" or "learned+T" (with the horizon), then perhaps a format of state, or "x0.3" for another multiplier."""
    mode, *changes = name.split()
    network, lr = load_network(pretrained), 1.0
    for change in changes:
        if change.startswith("x"):
            lr = float(change[1:])
        else:
            network.config = dataclasses.replace(network.config, **STATES[change])  # type: ignore[arg-type]
    return Trained(LearnedOptimizer(params, network, lr=lr, total_steps=steps if mode == HORIZON else None))


def make(name: str, model: nn.Module, steps: int, pretrained: str) -> Trained:
    if name.split()[0] in LEARNED_NAMES:
        return learned(name, [param for param in model.parameters() if param.requires_grad], pretrained, steps)
    return baseline(name, model, steps)
