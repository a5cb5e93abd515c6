"""C code of the package: how it is loaded, and threads that run it together."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def load(name: str, interface: int) -> ctypes.CDLL | None:
    """A compiled file of this folder, or None where the package was installed without it, or with that of another version: a clone that was
    updated and not installed again."""
    found = importlib.util.find_spec(f"{__package__}.{name}")
    if found is None or found.origin is None:
        return None
    loaded = ctypes.CDLL(found.origin)
    return loaded if hasattr(loaded, "interface") and loaded.interface() == interface else None


@functools.lru_cache(maxsize=1)
def pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # which has none of its parent's threads, and would wait for them


def together(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Calls a function of a C library, which lets other threads run meanwhile, with each of these arguments at the same time, in this
    thread and in others. There should be no more of them than torch has threads."""
    mine, *theirs = arguments
    others = [pool(torch.get_num_threads() - 1).submit(function, *each) for each in theirs]
    function(*mine)
    for other in others:
        other.result()
