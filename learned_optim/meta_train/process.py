"""Settings of a process that does nothing but meta-train."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE, ANY_NUMBER = 32 * 2**20, 65536  # the highest threshold that glibc takes, in bytes, and its own maximum

settled = False


def settle() -> None:
    """Keeps the processor from slow paths."""
    global settled
    torch.set_flush_denormal(True)  # optimizees that are all but solved have tiny gradients, and denormal numbers are slow on CPUs
    # Large blocks go back to the system as soon as they are free, which clears them page by page when they are wanted again: a fifth of the
    # time of meta-gradients through ten million parameters. Let the process keep them.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        settled = True
        _malloc(M_MMAP_MAX, 0)
        _malloc(M_MMAP_THRESHOLD, LARGE)
        _malloc(M_TRIM_THRESHOLD, -1)


@contextmanager
def thrifty() -> Iterator[None]:
    """Inside, the largest blocks go back nevertheless, and at the end whatever is free: a few of the size of all parameters are all that
    training without a graph takes, and kept ones get too small for the next by what settles in them."""
    if settled:
        _malloc(M_MMAP_MAX, ANY_NUMBER)
    try:
        yield
    finally:
        if settled:
            _malloc(M_MMAP_MAX, 0)
            ctypes.CDLL(None).malloc_trim(0)


def _malloc(option: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(option, value)
