"""Newton-Schulz iteration on a CPU in C, see `orthogonal.c`: each matrix on one thread, and two thirds of the arithmetic of the rule's."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math

import torch
from torch import Tensor

from ..config import NetworkConfig
from ..features import LAYOUTS, Layout
from ..rule import EPSILON, NEWTON_SCHULZ, SMALL, is_orthogonal, spectral_norms
from ..sharding import ShardedLayout
from .native import load, together

INTERFACE = 1  # as in the C file
WORTH_A_THREAD = 1e6  # multiplications, about as many as there are in the time in which a thread wakes up


class Job(ctypes.Structure):
    """See the C file."""

    _fields_ = [("matrices", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "next", "steps"))]
    _fields_ += [(name, ctypes.c_double) for name in ("a", "b", "c", "epsilon")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled iteration, or None as in `load`."""
    loaded = load("orthogonal", INTERFACE)
    if loaded is None:
        return None
    loaded.orthogonalize.argtypes = [ctypes.POINTER(Job), ctypes.c_void_p]
    loaded.scratch_size.argtypes = [ctypes.c_int64, ctypes.c_int64]
    loaded.scratch_size.restype = ctypes.c_int64
    return loaded


@functools.cache
def fastest() -> bool:
    """Whether this is faster than torch for large matrices too. It computes in 256 bits at a time, and torch in more where it can."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class Matrices:
    """Which tensors of a layout are orthogonalised, which of them in C, and what that needs to know of these.

    Small ones are, since torch's products of them take longer to start than to compute; and large ones where `fastest` says so, unless
    other threads would have to wait for the largest. Sharded ones are not: they have to be gathered first.
    """

    def __init__(self, layout: Layout, config: NetworkConfig, threads: int) -> None:
        self.orthogonal = is_orthogonal(layout, config)
        self.is_orthogonal = torch.tensor(self.orthogonal, dtype=torch.float32, device="cpu")  # (K,)
        norms, self.steps = spectral_norms(layout, config), config.orthogonalize_steps
        costs = {k: min(layout.fans[k]) ** 2 * (1.5 * max(layout.fans[k]) + 4.5 * min(layout.fans[k])) for k in norms}
        sharded = isinstance(layout, ShardedLayout)
        chosen = [] if sharded else sorted((k for k in norms if fastest() or min(layout.fans[k]) < SMALL), key=lambda k: -costs[k])
        counts = {k: math.prod(layout.stacks[k]) for k in chosen}
        total = sum(costs[k] * counts[k] for k in chosen)
        while chosen and min(layout.fans[chosen[0]]) >= SMALL and costs[chosen[0]] * threads > total:
            total -= costs[chosen[0]] * counts[chosen[0]]
            del chosen[0]
        self.others = [k for k in norms if k not in chosen]  # which torch orthogonalises
        starts = list(itertools.accumulate(layout.sizes, initial=0))
        rows = [(starts[k] + math.prod(layout.fans[k]) * i, *layout.fans[k], norms[k]) for k in chosen for i in range(counts[k])]
        self.count = len(rows)
        if rows:
            first, fans_out, fans_in, norm = (list(column) for column in zip(*rows, strict=True))
            columns = [4 * torch.tensor(first, device="cpu"), torch.tensor(fans_out, device="cpu"), torch.tensor(fans_in, device="cpu")]
            norm_bits = torch.tensor(norm, dtype=torch.float64, device="cpu").view(torch.int64)
            self.table = torch.stack([*columns, norm_bits], -1)  # as in the C file, with places among the directions, in bytes
            self.is_place = torch.tensor([1, 0, 0, 0], device="cpu")
            self.scratch: int = max(getattr(library(), "scratch_size")(*layout.fans[k]) for k in chosen)  # noqa: B009
            self.threads = max(1, min(threads, self.count, int(total / WORTH_A_THREAD)))

    @staticmethod
    @functools.lru_cache(maxsize=LAYOUTS)
    def of(layout: Layout, config: NetworkConfig, threads: int) -> Matrices:
        return Matrices(layout, config, threads)

    def orthogonalize(self, directions: Tensor) -> None:
        """Orthogonalises those that are chosen, among the directions (N,), with the spectral norms of step 4 of the rule."""
        if not self.count:
            return
        table = torch.add(self.table, self.is_place, alpha=directions.data_ptr())
        scratch = torch.empty(self.threads * self.scratch, dtype=torch.float32, device="cpu")
        job = Job(table.data_ptr(), self.count, 0, self.steps, *NEWTON_SCHULZ, EPSILON)
        parts = range(scratch.data_ptr(), scratch.data_ptr() + 4 * len(scratch), 4 * self.scratch)
        together(getattr(library(), "orthogonalize"), [(ctypes.byref(job), part) for part in parts])  # noqa: B009
