"""Checks that sharded state goes through torch's distributed checkpoints, for `tests/sharded_worker.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import Text, backward, local, make, mine, shard, train, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from learned_optim import LearnedOptimizer


def sharded_pair() -> tuple[nn.Module, LearnedOptimizer]:
    model = shard(make(Text))
    return model, LearnedOptimizer(model.named_parameters(), weight_decay=0.1, total_steps=20)


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resumed(folder: Path) -> tuple[nn.Module, LearnedOptimizer]:
    model, optimizer = sharded_pair()
    content = checkpoint_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])
    return model, optimizer


def save_checkpoint(folder: Path) -> None:
    """Saved, loaded and gone on with, it is the same to the last bit. Leaves what others of this file load, and where a run should end."""
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": full}, folder / "full.pt")
    train(model, optimizer, mine(), range(3, 6))
    other, theirs = resumed(folder)
    train(other, theirs, mine(), range(3, 6))
    for one, param in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(local(one), local(param))
        for key, value in optimizer.state[param].items():
            assert torch.equal(local(theirs.state[one][key]), local(value)), key
    end = {name: whole(param) for name, param in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(end, folder / "end.pt")


def assert_end(model: nn.Module, folder: Path, tolerance: float = 1e-3) -> None:
    for name, value in torch.load(folder / "end.pt", weights_only=True).items():
        difference = (whole(model.get_parameter(name)) - value).abs().max() / (value.square().mean().sqrt() + 1e-2)
        assert difference <= tolerance, (name, difference)


def load_checkpoint(folder: Path) -> None:
    """In as many processes as this has; where those that saved it were as many, the end is the same to the last bit."""
    model, optimizer = resumed(folder)
    train(model, optimizer, mine(), range(3, 6))
    assert_end(model, folder, 1e-3 if "full.pt" in os.listdir(folder) else 0)


def load_full(folder: Path) -> None:
    """A file of one process's state, which rank 0 reads, or everyone."""
    for broadcast in (True, False):
        content = torch.load(folder / "full.pt", weights_only=True)
        model, optimizer = sharded_pair()
        here = content if dist.get_rank() == 0 or not broadcast else {"model": {}, "optimizer": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_model_state_dict(model, here["model"], options=options)
        set_optimizer_state_dict(model, optimizer, here["optimizer"], options=options)
        train(model, optimizer, mine(), range(3, 6))
        assert_end(model, folder)


def flattened(folder: Path) -> None:
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    content = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(content, checkpoint_id=folder / "flattened")
    other, theirs = sharded_pair()
    set_model_state_dict(other, get_model_state_dict(model))
    found = get_optimizer_state_dict(other, theirs, options=options)
    dcp.load(found, checkpoint_id=folder / "flattened")
    set_optimizer_state_dict(other, theirs, found, options=options)
    train(model, optimizer, mine(), range(3, 5))
    train(other, theirs, mine(), range(3, 5))
    for one, param in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(local(one), local(param))


def survive(folder: Path) -> None:
    """Saves after three steps and loses a process in the next; begun again, it goes on and ends as if nothing had happened."""
    folder = folder / "killed"  # has the end of a run of two
    if (folder / "checkpoint" / ".metadata").exists():
        load_checkpoint(folder)
        return
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    backward(model, 3, mine())
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
