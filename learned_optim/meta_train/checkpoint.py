"""Checkpoints that survive a kill at any moment: written beside the old one and put in its place in one move."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

import torch

from ..config import to_json
from ..network import OptimizerNetwork
from .config import MetaTrainConfig

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


def save(
    folder: str | os.PathLike[str],
    config: MetaTrainConfig,
    network: OptimizerNetwork,
    meta_optimizer: torch.optim.Optimizer,
    **progress: Any,
) -> None:
    """Writes the checkpoint of a run; `progress` holds plain values and tensors."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    state = {"config": to_json(config), "network": network.state_dict(), "meta_optimizer": meta_optimizer.state_dict(), **progress}
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


def open_log(folder: str | os.PathLike[str], meta_step: int) -> TextIO:
    """The run's log, open for appending, without what a killed run wrote after its last checkpoint."""
    path = Path(folder) / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["meta_step"] < meta_step]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)
