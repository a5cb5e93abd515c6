"""Checkpoints that survive a kill at any moment: written beside the old one and put in its place in one move.

A checkpoint is what `torch.save` writes, a zip archive, with a SHA-256 of all bytes before it as the archive's comment: a flipped bit in a
tensor would train on without a sign.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..config import from_json, to_json
from . import distributed
from .config import MetaTrainConfig
from .estimators import Weights
from .slots import Slot

CHECKPOINT = "checkpoint.pt"
SEAL = 64  # characters of a SHA-256 in hexadecimal
PARTS = ("config", "meta_parameters", "meta_optimizer", "slots", "progress")
PIECE = 2**20  # bytes that are read at once


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
    """Writes the checkpoint of a run; every process calls it, and the first one writes.

    Raises:
        OSError: it could not be written; the one before is as it was.
    """
    places = {
        estimator: distributed.gather_to_first({i: slot.state_dict() for i, slot in enumerate(mine) if distributed.is_mine(i)})
        for estimator, mine in slots.items()
    }
    if distributed.rank() > 0:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parameters = {name: weight.detach() for name, weight in meta_parameters.items()}
    kept = {key.name: getattr(progress, key.name) for key in fields(progress)}
    state = dict(zip(PARTS, (to_json(config), parameters, meta_optimizer.state_dict(), places, kept), strict=True))
    temporary = path / f"{CHECKPOINT}.{os.getpid()}.tmp"
    try:
        torch.save(state, temporary)
        _seal(temporary)
        os.replace(temporary, path / CHECKPOINT)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where the disk is full
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"{path / CHECKPOINT} could not be written, on a full disk for one, and is as it was before ({reason})") from error


def load(folder: str | os.PathLike[str], config: MetaTrainConfig, device: str | torch.device) -> dict[str, Any] | None:
    """The checkpoint in a folder, on a device, or None if there is none.

    Raises:
        ValueError: it is damaged, or belongs to a run with another configuration.
    """
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        return None
    if not _is_whole(path):
        raise ValueError(f"{path} is damaged: its checksum does not fit. Put a copy back, or delete it to begin this stage anew")
    state = _read(path, map_location=device)
    theirs, mine = json.loads(state["config"]), json.loads(to_json(config))
    if theirs != mine:
        different = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        raise ValueError(f"{path} belongs to a run whose configuration differs in {different}; use another folder or delete it")
    return state


def config_of(folder: str | os.PathLike[str]) -> MetaTrainConfig | None:
    """The configuration of the run whose checkpoint is in a folder, or None if there is none that is whole."""
    path = Path(folder) / CHECKPOINT
    if not (path.exists() and _is_whole(path)):
        return None
    return from_json(MetaTrainConfig, _read(path, mmap=True)["config"], str(path))


def saved_steps(folder: str | os.PathLike[str]) -> int:
    """The meta-steps that the checkpoint in a folder has behind it; 0 if there is none that can be read."""
    path = Path(folder) / CHECKPOINT
    if not (path.exists() and _is_whole(path)):
        return 0
    try:
        return len(_read(path, mmap=True)["progress"]["history"])
    except ValueError:
        return 0


def _read(path: Path, **options: Any) -> dict[str, Any]:
    """What is in a checkpoint whose checksum fits.

    Raises:
        ValueError: it is no checkpoint of this version.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, **options)
        kept = set(state), set(state["progress"])
    except (RuntimeError, EOFError, UnpicklingError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of meta-training; use another folder or delete it") from error
    if kept != (set(PARTS), {key.name for key in fields(Progress)}):
        raise ValueError(f"{path} is the checkpoint of another version of learned_optim; use another folder or delete it")
    return state


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(SEAL.to_bytes(2, "little"))  # an archive ends with the length of its comment, and the comment
        size = file.tell()
        file.seek(0)
        file.write(_digest(file, size))
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave a name without its content


def _is_whole(path: Path) -> bool:
    size = path.stat().st_size - SEAL
    with path.open("rb") as file:
        return size > 0 and _digest(file, size) == file.read()


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the next bytes."""
    digest = hashlib.sha256()
    for begin in range(0, size, PIECE):
        digest.update(file.read(min(PIECE, size - begin)))
    return digest.hexdigest().encode()
