"""The rule of large optimizees on a CPU, through the compiled kernel, for estimators that need no graph.

Shapes: `R` replicas, `K` tensors of an optimizee, with `N` coordinates laid end to end.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..features import Layout
from ..kernels import cpu
from ..network import OptimizerNetwork
from ..rule import State
from ..storage import PAIRS
from .unroll import Optimizees, is_large


def serves(network: OptimizerNetwork, optimizees: Optimizees) -> bool:
    """Whether the kernel can run these optimizees, and pays: small ones are better off batched."""
    params = optimizees.params
    return is_large(optimizees) and params.device.type == "cpu" and params.dtype == torch.float32 and cpu.trouble(network) is None


def exact(network: OptimizerNetwork) -> OptimizerNetwork:
    """The same weights, with all bits of the state kept, as everywhere in meta-training."""
    network = copy.copy(network)
    network.config = dataclasses.replace(network.config, moment_format="float32", lstm_format="float32")
    return network


class InPlaceRule:
    """A `Rule` that keeps the state itself, each tensor's apart, as the kernel wants it; that which it is called with stays as it is.

    Args:
        state: of one particle's optimizees, (1, R, ...).
    """

    def __init__(self, network: OptimizerNetwork, layout: Layout, state: State) -> None:
        def row(key: str, r: int) -> Tensor:
            if key == "control":
                return state[key][0, ..., r, :].movedim(-1, 0).clone(memory_format=torch.contiguous_format)
            pairs = zip(*(state[part][0, ..., r, :].split(layout.sizes, -1) for part in PAIRS[key]), strict=True)
            return torch.cat([part.reshape(-1) for part in itertools.chain.from_iterable(pairs)])

        def views(key: str, row: Tensor) -> Sequence[Tensor]:
            return row.unbind() if key == "control" else self._pairs(key, row)

        self.network, self.sizes = exact(network), layout.sizes
        self.change: Tensor | None = None  # the memory of the last one, for the next
        self.shapes = {key: value.shape for key, value in state.items()}
        # Of each key and replica: one tensor after the other.
        keys, replicas = ("control", *PAIRS), state["momentum"].shape[1]
        self.rows = {key: [row(key, r) for r in range(replicas)] for key in keys}
        # Of each replica and tensor: its state, as views of those.
        self.states = [
            [dict(zip(keys, each, strict=True)) for each in zip(*(views(key, self.rows[key][r]) for key in keys), strict=True)]
            for r in range(replicas)
        ]

    def __call__(self, layout: Layout, grad: Tensor, state: State, total_steps: Tensor) -> tuple[Tensor, State]:
        change, count = torch.zeros_like(grad) if self.change is None else self.change.zero_(), len(layout.sizes)
        for r, states in enumerate(self.states):
            moved, slopes = change[0, r].split(layout.sizes), grad[0, r].split(layout.sizes)
            cpu.step(self.network, layout, moved, slopes, states, total_steps[0, r], [1.0] * count, [0.0] * count)
        self.change = change
        return change, state

    def hand_over(self, state: State) -> None:
        """Writes the state, (1, R, ...), of which nothing is left here: key by key, since there is no room for two."""
        self.states.clear()
        self.change = None
        for r, row in enumerate(self.rows.pop("control")):
            state["control"][0, ..., r, :] = row.movedim(0, -1)
        for key, parts in PAIRS.items():
            for r, row in enumerate(self.rows.pop(key)):
                for part, halves in zip(parts, zip(*self._pairs(key, row), strict=True), strict=True):
                    torch.cat(halves, -1, out=state[part][0, ..., r, :])

    def _pairs(self, key: str, row: Tensor) -> list[Tensor]:
        """Each tensor's stretch of a row: (2, ..., size)."""
        leading = self.shapes[PAIRS[key][0]][1:-2]  # the hidden units, if any
        stretches = row.split([2 * leading.numel() * size for size in self.sizes])
        return [stretch.view(2, *leading, size) for stretch, size in zip(stretches, self.sizes, strict=True)]
