"""Settings of a process that does nothing but meta-train."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def settle() -> None:
    """Keeps the processor from slow paths."""
    torch.set_flush_denormal(True)  # optimizees that are all but solved have tiny gradients, and denormal numbers are slow on CPUs
    # Large blocks go back to the system as soon as they are free, which clears them page by page when they are wanted again: a fifth of the
    # time of meta-gradients through ten million parameters. Let the process keep them.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
