"""Checkpoints that survive a kill at any moment: written beside the old one and put in its place in one move."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import to_json
from . import distributed
from .config import MetaTrainConfig
from .estimators import Weights
from .slots import Slot

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


def save(
    folder: str | os.PathLike[str],
    config: MetaTrainConfig,
    *,
    meta_parameters: Weights,
    slots: Mapping[str, Sequence[Slot]],
    **progress: Any,
) -> None:
    """Writes the checkpoint of a run; every process calls it, and the first one writes. `progress` holds plain values and tensors."""
    places = {
        estimator: distributed.gather_to_first({i: slot.state_dict() for i, slot in enumerate(mine) if distributed.is_mine(i)})
        for estimator, mine in slots.items()
    }
    if distributed.rank() > 0:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parameters = {name: weight.detach() for name, weight in meta_parameters.items()}
    state = {"config": to_json(config), "meta_parameters": parameters, "slots": places, **progress}
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


class Log:
    """The run's log of the first process: a line of JSON for each meta-step, without what a killed run wrote after its last checkpoint."""

    def __init__(self, folder: str | os.PathLike[str] | None, meta_step: int) -> None:
        self.file = None
        if folder is None or distributed.rank() > 0:
            return
        path = Path(folder) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["meta_step"] < meta_step))
        self.file = path.open("a", buffering=1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, meta_step: int, figures: Mapping[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"meta_step": meta_step, **figures}) + "\n")
