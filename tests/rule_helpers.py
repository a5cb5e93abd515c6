"""What tests of the update rule share: networks, steps of it with the tensors in their shapes, and views of its state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.config import NetworkConfig
from learned_optim.features import Layout
from learned_optim.network import OptimizerNetwork
from learned_optim.rule import Control, State, init_state, update

SHAPES = [(), (1,), (7,), (1, 6), (5, 3), (6, 1), (3, 8), (4, 3, 2, 2), (4, 12), (8, 3)]  # the last three have one kind of fans twice


def acting_network(dtype: torch.dtype = torch.float32, seed: int = 0, **config: float | str) -> OptimizerNetwork:
    """A network in which everything acts: an untrained one has zeros where the LSTM and the controller speak."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = OptimizerNetwork(NetworkConfig(**config))
        with torch.no_grad():
            for param in network.parameters():
                param.add_(torch.randn_like(param), alpha=0.2)
    return network.to(dtype)


def draw(shapes: Sequence[tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    return Layout.of(tuple(tensor.shape for tensor in tensors), torch.device("cpu"))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def fresh(params: Sequence[Tensor], network: OptimizerNetwork) -> State:
    return init_state(layout_of(params), network.config, flat(params).to(network.log_step_size.dtype))


def step(
    network: OptimizerNetwork,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: State,
    total_steps: float | Sequence[float] = math.inf,
) -> tuple[list[Tensor], State]:
    """One step of the rule, with the tensors in their shapes."""
    horizons = torch.tensor(total_steps, dtype=network.log_step_size.dtype).expand(len(params))
    change, state = update(network, layout_of(params), flat(grads), state, horizons)
    parts = change.split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)], state


def run(
    network: OptimizerNetwork,
    params: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    total_steps: float | Sequence[float] = math.inf,
) -> tuple[list[list[Tensor]], State]:
    """The updates of each step and the last state; the parameters stay where they are."""
    state, history = fresh(params, network), []
    for grads in gradients:
        updates, state = step(network, params, grads, state, total_steps)
        history.append(updates)
    return history, state


def steps_of(state: State) -> Tensor:
    return Control.of(state["control"]).step


def corrections_of(state: State) -> Tensor:
    return Control.of(state["control"]).correction


def assert_updates_close(actual: list[list[Tensor]], expected: list[list[Tensor]], rtol: float) -> None:
    """Within a share of each update's largest entry: small entries of an orthogonalised matrix are differences of large ones."""
    for step in range(len(expected)):
        for one, other in zip(actual[step], expected[step], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=rtol * other.abs().max().item())


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
