"""The rule of large optimizees on a CPU, through the compiled kernel, for estimators that need no graph.

Shapes: `P` particles, `R` replicas of each, `K` tensors of an optimizee, with `N` coordinates laid end to end.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..features import Layout
from ..kernels import cpu
from ..network import OptimizerNetwork
from ..rule import PER_TENSOR, State
from .unroll import Optimizees, is_large

COORDINATES = ("momentum", "second_moment", "hidden", "cell")


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
        networks: of each particle.
        state: of the optimizees, (P, ...).
    """

    def __init__(self, networks: Sequence[OptimizerNetwork], layout: Layout, state: State) -> None:
        def apart(p: int, r: int) -> list[State]:
            parts = {key: state[key][p, ..., r, :].split(layout.sizes, -1) for key in COORDINATES}
            parts |= {key: state[key][p, r].unbind() for key in PER_TENSOR}
            each = (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))
            return [{key: value.clone(memory_format=torch.contiguous_format) for key, value in tensor.items()} for tensor in each]

        self.networks = [exact(network) for network in networks]
        # Of each particle, replica and tensor.
        self.states = [[apart(p, r) for r in range(state["step"].shape[1])] for p in range(len(networks))]

    def __call__(self, layout: Layout, grad: Tensor, state: State, total_steps: Tensor) -> tuple[Tensor, State]:
        change, count = torch.zeros_like(grad), len(layout.sizes)
        for p, network in enumerate(self.networks):
            for r, states in enumerate(self.states[p]):
                moved, slopes = change[p, r].split(layout.sizes), grad[p, r].split(layout.sizes)
                cpu.step(network, layout, moved, slopes, states, total_steps[p, r], [1.0] * count, [0.0] * count)
        return change, state

    def hand_over(self) -> State:
        """The state, (P, ...), of which nothing is left here: tensor by tensor, since there is no room for two."""

        def one(states: list[State], key: str) -> Tensor:
            values = [state.pop(key) for state in states]
            return torch.cat(values, -1) if key in COORDINATES else torch.stack(values)

        def particle(replicas: list[list[State]], key: str) -> Tensor:
            return torch.stack([one(states, key) for states in replicas], -2 if key in COORDINATES else 0)

        return {key: torch.stack([particle(replicas, key) for replicas in self.states]) for key in (*PER_TENSOR, *COORDINATES)}
