"""The Triton kernels on parts of tensors, beside the rule: one process plays its part, and what others would add to sums is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rule_helpers import acting_network
from test_tables import load
from torch import Generator, Tensor
from torch.distributed.tensor import Shard

from learned_optim import OptimizerNetwork
from learned_optim.checks.state import Ledger
from learned_optim.optimizer import init_state
from learned_optim.rule import CONTROL
from learned_optim.sharding import ShardedLayout, Shards

pytest.importorskip("triton", reason="Triton is not installed")
from learned_optim.kernels import gpu, reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SIMULATION = load("sharded_simulation")

# Shapes, the mesh, this process's place on it, and how the tensor is cut: rows that begin at an even place, and at an odd one; columns, in
# stretches that are shorter than a block, and the same; rows and columns; a vector; and a tensor of which nothing is here.
CUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[Shard, ...]]] = {
    "rows": ((34, 48), (2,), (1,), (Shard(0),)),
    "uneven rows": ((35, 41), (2,), (1,), (Shard(0),)),
    "even columns": ((40, 64), (2,), (1,), (Shard(1),)),
    "columns": ((11, 30), (2,), (1,), (Shard(1),)),
    "rows and columns": ((6, 40), (2, 3), (1, 2), (Shard(0), Shard(1))),
    "a vector": ((50,), (3,), (1,), (Shard(0),)),
    "nothing": ((2,), (3,), (2,), (Shard(0),)),
}


def ends(step: Any, network: OptimizerNetwork, layout: ShardedLayout, spoiled: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters, and all pieces of state, after two steps."""
    generator = Generator().manual_seed(0)
    params = [torch.randn(shard.region().shape, generator=generator).to(DEVICE) for shard in layout.shards if shard is not None]
    states = [init_state(param, network.config) for param in params]
    ledger, horizons, each = Ledger(DEVICE, network.config, CONTROL, str), torch.full((len(params),), 20.0, device=DEVICE), len(params)
    for _ in range(2):
        grads = [torch.randn(param.shape, generator=generator).to(DEVICE) for param in params]
        if spoiled:
            grads[0].view(-1)[3] = torch.nan
        step(network, layout, params, grads, states, horizons, [0.5] * each, [0.1] * each, ledger)
    assert int(ledger.skipped) == 2 * spoiled
    return params, [piece.float() for state in states for piece in state.values()]


def layout_of(*cuts: str) -> ShardedLayout:
    shapes, meshes, places, placements = zip(*(CUTS[cut] for cut in cuts), strict=True)
    shards = [
        Shards(SIMULATION.Mesh(mesh, place), each, torch.Size(shape))
        for mesh, place, each, shape in zip(meshes, places, placements, shapes, strict=True)
    ]
    return ShardedLayout(tuple(map(torch.Size, shapes)), tuple(shards), DEVICE)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda values, **_: values)


@pytest.mark.parametrize(
    "cuts", [("rows", "uneven rows"), ("even columns", "columns", "a vector", "nothing"), ("rows and columns",), ("nothing",)]
)
def test_parts_equal_the_rule(cuts: tuple[str, ...]) -> None:
    network, layout = acting_network(hidden_units=1, lstm_format="float32", orthogonalize_steps=0), layout_of(*cuts)
    (mine, states), (theirs, expected) = (ends(step, network, layout, spoiled=False) for step in (gpu.step, reference.step))
    for one, other in zip([*mine, *states], [*theirs, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [("uneven rows", "rows and columns"), ("even columns", "columns")])
def test_parts_are_rounded_by_the_bits_of_the_whole(cuts: tuple[str, ...]) -> None:
    """By others, every third number would be another one."""
    network = acting_network(hidden_units=1, lstm_format="bfloat16", orthogonalize_steps=0)
    layout = layout_of(*cuts)
    (_, states), (_, expected) = (ends(step, network, layout, spoiled=False) for step in (gpu.step, reference.step))
    for one, other in zip(states, expected, strict=True):
        if one.ndim > 1:  # of coordinates
            far = (one - other).abs() > 1e-5 + 1e-3 * other.abs()
            assert far.float().mean() < 0.02


def test_a_part_is_left_out_with_its_tensor() -> None:
    network, layout = acting_network(hidden_units=1, lstm_format="float32", orthogonalize_steps=0), layout_of("a vector", "columns")
    (mine, _), (before, _) = ends(gpu.step, network, layout, spoiled=True), ends(lambda *_: None, network, layout, spoiled=False)
    assert mine[0].equal(before[0])
    assert not mine[1].equal(before[1])
