"""Processes that share a meta-training run, in the default group of `torch.distributed`; without one, this process is alone.

Unrolls stay where they began: slot `i` belongs to process `i % world_size()`. What travels in a meta-step are a few numbers for each unroll
and, of backprop alone, one gradient the size of the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the process group that torchrun describes in the environment, if any, and leaves it at the end: a process that exits while
    gloo's threads run is aborted. Gives this process's device."""
    if "RANK" in os.environ:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        options: dict[str, Any] = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart, and with it the addresses of the processes before, which those after would wait for.
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )
            attempt = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
            options = {"store": dist.PrefixStore(attempt, store)}  # type: ignore[attr-defined]
            options |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        # Torch imports this when an optimizer steps, and functions there have the group that exists by then as a default argument: it would
        # outlive its end, and with it gloo's threads.
        from torch.distributed import fsdp  # noqa: F401

        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", **options)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_mine(index: int) -> bool:
    """Whether slot `index` belongs to this process."""
    return index % world_size() == rank()


def gather(mine: dict[int, Item]) -> dict[int, Item]:
    """Everybody's items on every process, in the order of their keys."""
    everybodys = [mine]
    if world_size() > 1:
        everybodys = [{} for _ in range(world_size())]
        dist.all_gather_object(everybodys, mine)
    return dict(sorted((key, item) for items in everybodys for key, item in items.items()))


def gather_to_first(mine: dict[int, Item]) -> dict[int, Item]:
    """Everybody's items on process 0, in the order of their keys; nothing on the others."""
    everybodys: list[dict[int, Item]] | None = [mine]
    if world_size() > 1:
        everybodys = [{} for _ in range(world_size())] if rank() == 0 else None
        dist.gather_object(mine, everybodys)
    return dict(sorted((key, item) for items in everybodys or () for key, item in items.items()))


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes."""
    if world_size() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
