"""Copies of a `LearnedOptimizer`, its state dict, and torch's distributed checkpoints of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizer_helpers import assert_same, make_model, save_and_load, train, values
from rule_helpers import acting_network
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import lr_scheduler

from learned_optim.config import NetworkConfig
from learned_optim.network import OptimizerNetwork
from learned_optim.optimizer import LearnedOptimizer, init_state
from learned_optim.weights import fingerprint


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Copies


@pytest.mark.parametrize("method", ["deepcopy", "pickle"])
def test_copies_train_on_identically(network: OptimizerNetwork, method: str) -> None:
    """A copy of model and optimizer keeps the network, shares nothing, and is free of the scheduler that patched `step`."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, total_steps=8)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, range(3), scheduler)
    assert "step" in vars(optimizer)
    pair = (model, optimizer)
    other_model, other = copy.deepcopy(pair) if method == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert isinstance(other, LearnedOptimizer)
    assert "step" not in vars(other)
    assert_same(dict(other.network.state_dict()), dict(optimizer.network.state_dict()))
    assert other.network is not optimizer.network
    before = values(model)
    train(other_model, other, range(3, 8))
    assert_same(values(model), before)
    train(model, optimizer, range(3, 8))
    assert_same(values(other_model), values(model))
    assert scheduler.last_epoch == 3


# State dicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resume_is_bit_identical(network: OptimizerNetwork, dtype: torch.dtype) -> None:
    """Through a file read with `weights_only=True`, as Trainer and accelerate read it."""
    model = make_model(dtype)
    optimizer = LearnedOptimizer(model.parameters(), network, weight_decay=0.1, total_steps=8)
    train(model, optimizer, range(4))
    saved = save_and_load({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(4, 8))

    resumed = make_model(dtype)
    resumed.load_state_dict(saved["model"])
    other = LearnedOptimizer(resumed.parameters(), network)
    other.load_state_dict(state_dict=saved["optimizer"])
    assert_same(other.state_dict(), saved["optimizer"])
    train(resumed, other, range(4, 8))
    assert_same(values(resumed), values(model))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_loaded_state_is_a_copy(network: OptimizerNetwork) -> None:
    """Two optimizers that load one dict share nothing with it or with each other."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    first, second = (LearnedOptimizer(make_model().parameters(), network) for _ in range(2))
    for other in (first, second):
        other.load_state_dict(saved)
    for state in first.state.values():
        for value in state.values():
            value.fill_(7)
    assert_same(saved, before)
    assert_same(second.state_dict(), before)


def test_state_of_another_parameter_dtype_stays_fp32(network: OptimizerNetwork) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(3))
    halved = make_model(torch.bfloat16)
    other = LearnedOptimizer(halved.parameters(), network)
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
    train(halved, other, range(3, 4))


def test_load_hooks_see_what_was_saved(network: OptimizerNetwork) -> None:
    """A pre-hook may replace the dict that is loaded; a post-hook finds the state as it was saved, on bf16 parameters too."""
    model = make_model(torch.bfloat16)
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = LearnedOptimizer(make_model(torch.bfloat16).parameters(), network)
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, __: copy.deepcopy(saved))
    other.register_load_state_dict_post_hook(lambda self: seen.append(copy.deepcopy(self.state_dict())))
    empty = LearnedOptimizer(make_model(torch.bfloat16).parameters(), network).state_dict()
    other.load_state_dict(empty)
    assert_same(other.state_dict(), saved)
    assert_same(seen, [saved])


def test_load_refuses_other_weights(network: OptimizerNetwork) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(2))
    stranger = acting_network(seed=1)
    assert fingerprint(stranger) != fingerprint(network)
    other = LearnedOptimizer(make_model().parameters(), stranger, lr=0.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="was made with optimizer weights") as error:
        other.load_state_dict(optimizer.state_dict())
    assert fingerprint(stranger) in str(error.value)
    assert fingerprint(network) in str(error.value)
    assert_same(other.state_dict(), before)


def test_load_refuses_other_optimizers(network: OptimizerNetwork) -> None:
    """The state of an AdamW would load and only fail later, in `step`."""
    model = make_model()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(2))
    optimizer = LearnedOptimizer(model.parameters(), network)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="not saved by a LearnedOptimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    assert_same(optimizer.state_dict(), before)


def test_load_refuses_other_groups(network: OptimizerNetwork) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(2))
    other = LearnedOptimizer(model.first.parameters(), network)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), before)


# Distributed checkpoints, in one process


def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(network: OptimizerNetwork) -> None:
    """Torch makes the state by a step with zero gradients and lr=0. Training afterwards is as if it had never been asked."""
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, weight_decay=0.1, total_steps=6)
    reference = LearnedOptimizer(other.parameters(), network, weight_decay=0.1, total_steps=6)
    before = values(model)
    asked = get_optimizer_state_dict(model, optimizer)
    assert asked["state"].keys() == dict(model.named_parameters()).keys()
    assert_same(values(model), before)
    train(model, optimizer, range(6))
    train(other, reference, range(6))
    assert_same(values(model), values(other))
    assert_same(optimizer.state_dict(), reference.state_dict())


@pytest.mark.parametrize(
    "options",
    [(), ("full_state_dict",), ("cpu_offload",), ("full_state_dict", "cpu_offload"), ("flatten_optimizer_state_dict",)],
    ids=" ".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("process_group")
def test_distributed_state_dict_round_trip(network: OptimizerNetwork, dtype: torch.dtype, options: tuple[str, ...]) -> None:
    """With torch's options, which flatten and rebuild the dict; full and flat at once fails in torch, with AdamW too."""
    how = StateDictOptions(**dict.fromkeys(options, True))

    def make(model: nn.Module) -> LearnedOptimizer:
        params = list(model.parameters())
        groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 0.5}]
        return LearnedOptimizer(groups, network, total_steps=8)

    model = make_model(dtype)
    optimizer = make(model)
    train(model, optimizer, range(4))
    saved = save_and_load(get_optimizer_state_dict(model, optimizer, options=how))
    resumed = make_model(dtype)
    resumed.load_state_dict(model.state_dict())
    other = make(resumed)
    set_optimizer_state_dict(resumed, other, saved, options=how)
    assert_same(values(resumed), values(model))
    assert_same(other.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert_same(values(resumed), values(model))


@pytest.mark.parametrize(("placement", "expected"), [(Shard(0), Shard(1)), (Shard(1), Shard(2)), (Replicate(), Replicate())], ids=str)
@pytest.mark.usefixtures("process_group")
def test_state_is_placed_like_the_parameter(placement: Any, expected: Any) -> None:
    """What a coordinate has several of stands in front, so a sharded dimension moves up by one."""
    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6, dtype=torch.bfloat16), mesh, [placement]))
    state = init_state(param, NetworkConfig(hidden_units=3))
    for key, shape, dtype in (("moments", (2, 4, 6), torch.float32), ("lstm", (6, 4, 6), torch.bfloat16)):
        value = state[key]
        assert isinstance(value, DTensor), key
        assert value.device_mesh == mesh
        assert value.placements == (expected,), key
        assert value.shape == shape
        assert value.dtype == dtype


@pytest.mark.usefixtures("process_group")
def test_state_that_is_placed_otherwise_is_refused(network: OptimizerNetwork) -> None:
    """A sharded tensor for a plain parameter, one that is sharded along another dimension, and a part of what each process has whole. A
    tensor for a sharded parameter is cut."""
    mesh = init_device_mesh("cpu", (1,))

    def fresh(placement: Any = None) -> LearnedOptimizer:
        weight = torch.ones(4, 6)
        param = nn.Parameter(weight if placement is None else distribute_tensor(weight, mesh, [placement]))
        optimizer = LearnedOptimizer([param], network)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    plain, rows, columns = fresh(), fresh(Shard(0)), fresh(Shard(1))
    sharded = distribute_tensor(torch.zeros(plain.state_dict()["state"][0]["control"].shape), mesh, [Shard(0)])
    for optimizer, other, changes, message in [
        (plain, rows, {}, "is a DTensor, and the parameter a plain tensor"),
        (rows, columns, {}, "is sharded otherwise than the parameter"),
        (rows, rows, {"control": sharded}, "is sharded otherwise than the parameter"),
    ]:
        state_dict = other.state_dict()
        state_dict["state"] = {0: state_dict["state"][0] | changes}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
    rows.load_state_dict(plain.state_dict())


def test_state_for_a_parameter_without_numbers_is_refused(network: OptimizerNetwork) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is on the device meta.*load the state after"):
        LearnedOptimizer(make_model(device="meta").parameters(), network).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_state_that_lacks_a_piece_is_refused_before_anything_moves(network: OptimizerNetwork, kernel: str) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, kernel=kernel)
    train(model, optimizer, range(2))
    before = values(model)
    del optimizer.state[model.second.weight]["moments"]
    with pytest.raises(RuntimeError, match=r"the state of parameter \d of group 0 lacks 'moments'"):
        train(model, optimizer, range(2, 3))
    assert_same(values(model), before)
