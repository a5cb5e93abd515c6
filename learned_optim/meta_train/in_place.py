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
from ..storage import stored
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
            parts = zip(*(state[part][0, ..., r, :].split(layout.sizes, -1) for part in self.stored[key].parts), strict=True)
            return torch.cat([part.reshape(-1) for part in itertools.chain.from_iterable(parts)])

        def views(key: str, row: Tensor) -> Sequence[Tensor]:
            return row.unbind() if key == "control" else self._stretches(key, row)

        self.network, self.sizes, self.stored = exact(network), layout.sizes, stored(network.config)
        self.change: Tensor | None = None  # the memory of the last one, for the next
        # Of each key and replica: one tensor after the other.
        keys, replicas = ("control", *self.stored), state["momentum"].shape[1]
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
        for key, tensor in self.stored.items():
            for r, row in enumerate(self.rows.pop(key)):
                pieces = list(map(tensor.split, self._stretches(key, row)))
                for part in tensor.parts:
                    torch.cat([piece[part] for piece in pieces], -1, out=state[part][0, ..., r, :])

    def _stretches(self, key: str, row: Tensor) -> list[Tensor]:
        """Each tensor's stretch of a row: (C, size)."""
        count = sum(self.stored[key].counts)
        stretches = row.split([count * size for size in self.sizes])
        return [stretch.view(count, size) for stretch, size in zip(stretches, self.sizes, strict=True)]
