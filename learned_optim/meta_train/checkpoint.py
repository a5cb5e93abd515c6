"""Checkpoints that survive a kill at any moment: written beside the old one and put in its place in one move."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import to_json
from . import distributed
from .config import MetaTrainConfig
from .estimators import Weights
from .slots import Slot

CHECKPOINT = "checkpoint.pt"


@dataclass
class Progress:
    """What a run has come to, as plain values and tensors."""

    history: list[float] = field(default_factory=list)  # meta-loss of each meta-step; NaN where every unroll was dropped
    dropped: int = 0  # unrolls whose loss or meta-gradient was not finite
    seconds: float = 0.0  # wall time of all meta-steps
    log_norms: dict[str, float] = field(default_factory=dict)  # of each estimator and family: log of the usual meta-gradient norm
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # what `Evaluation` returned, with "meta_step"
    adamw: dict[str, list[float]] = field(default_factory=dict)  # its curves on the held-out tasks
    best: dict[str, Tensor] = field(default_factory=dict)  # the meta-parameters of the best evaluation


def save(
    folder: str | os.PathLike[str],
    config: MetaTrainConfig,
    meta_parameters: Weights,
    meta_optimizer: torch.optim.Optimizer,
    slots: Mapping[str, Sequence[Slot]],
    progress: Progress,
) -> None:
    """Writes the checkpoint of a run; every process calls it, and the first one writes."""
    places = {
        estimator: distributed.gather_to_first({i: slot.state_dict() for i, slot in enumerate(mine) if distributed.is_mine(i)})
        for estimator, mine in slots.items()
    }
    if distributed.rank() > 0:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parameters = {name: weight.detach() for name, weight in meta_parameters.items()}
    state = {
        "config": to_json(config),
        "meta_parameters": parameters,
        "meta_optimizer": meta_optimizer.state_dict(),
        "slots": places,
        "progress": {key.name: getattr(progress, key.name) for key in fields(progress)},
    }
    temporary = path / f"{CHECKPOINT}.{os.getpid()}.tmp"
    torch.save(state, temporary)
    os.replace(temporary, path / CHECKPOINT)


def load(folder: str | os.PathLike[str], config: MetaTrainConfig, device: str | torch.device) -> dict[str, Any] | None:
    """The checkpoint in a folder, on a device, or None if there is none.

    Raises:
        ValueError: it belongs to a run with another configuration.
    """
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    theirs, mine = json.loads(state["config"]), json.loads(to_json(config))
    if theirs != mine:
        different = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        raise ValueError(f"{path} belongs to a run whose configuration differs in {different}; use another folder or delete it")
    return state
