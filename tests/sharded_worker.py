"""What `tests/test_sharded.py` has several processes do, started by torchrun: each check by its name, and what became of it in a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_tables import load
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network

STEPS = 8


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(self.up(self.norm(inputs)).tanh())


class Text(nn.Module):
    """A table, blocks of matrices, and a vector with fewer elements than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(37, 24)
        self.blocks = nn.ModuleList([Block(24) for _ in range(2)])
        self.head = nn.Linear(24, 37, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.table(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.gain * self.head(hidden)


class Images(nn.Module):
    """Convolutions whose channels do not come out even, and two matrices in all."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 7, 3)
        self.norm = nn.GroupNorm(1, 7)
        self.head = nn.Linear(7 * 36, 37)

    def forward(self, inputs: Tensor) -> Tensor:
        images = torch.nn.functional.one_hot(inputs, 64).view(-1, 1, 8, 8).to(self.head.weight.dtype)
        return self.head(self.norm(self.convolution(images)).relu().flatten(1))


class Adapters(nn.Module):
    """Frozen weights with factors of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.first, self.second = nn.Embedding(37, 24), nn.Linear(24, 3, bias=False), nn.Linear(3, 37, bias=False)
        self.base.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(self.base(inputs)))


class Words(nn.Module):
    """An embedding of which a step sees few rows, all of them in the first process's part."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(1200, 24), nn.Linear(24, 37)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.words(inputs))


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def exact() -> OptimizerNetwork:
    """The default weights with state in fp32: otherwise a few roundings fall the other way where sums have another order."""
    network = load_network("default")
    found = OptimizerNetwork(dataclasses.replace(network.config, lstm_format="float32"))
    found.load_state_dict(network.state_dict())
    return found


def backward(model: nn.Module, step: int, part: tuple[int, int]) -> float:
    """Gradients of one of so many parts of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(0, 37, (16, 5), generator=generator).chunk(part[1])[part[0]].flatten()
    loss = nn.functional.cross_entropy(model(inputs).float(), (3 * inputs + 1) % 37)
    loss.backward()
    return loss.item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: tuple[int, int] = (0, 1),
    steps: range = range(STEPS),
    between: Callable[[int], None] | None = None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, part)
        if between is not None:
            between(step)
        optimizer.step()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float()


def local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    """Up to rounding, in units of a parameter's root mean square."""
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        scale = whole(other).square().mean().sqrt() + 1e-2
        difference = ((whole(param) - whole(other)).abs().max() / scale).item()
        assert difference < tolerance, (name, difference)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def mine() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def compare(kind: type[nn.Module], tolerance: float = 1e-5, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """FSDP2 and one process."""
    options = {"pretrained": exact(), **options}
    alone, model = make(kind, dtype), shard(make(kind, dtype))
    train(alone, LearnedOptimizer(alone.parameters(), **options))
    optimizer = LearnedOptimizer(model.parameters(), **options)
    train(model, optimizer, mine())
    assert_close(model, alone, tolerance)
    assert_same_control(optimizer)


def assert_same_control(optimizer: torch.optim.Optimizer) -> None:
    """What a tensor has once is the same in all processes, to the last bit."""
    controls = torch.stack([state["control"] for state in optimizer.state.values()])
    everyone = [torch.empty_like(controls) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, controls)
    assert all(torch.equal(one, controls) for one in everyone)


# Checks


def fully_sharded(folder: Path) -> None:
    compare(Text, weight_decay=0.1)


def fully_sharded_reference(folder: Path) -> None:
    compare(Text, weight_decay=0.1, kernel="reference")


def fully_sharded_images(folder: Path) -> None:
    compare(Images, 2e-4)  # inputs that are seldom seen have small gradients; DistributedDataParallel differs by as much


def fully_sharded_words(folder: Path) -> None:
    compare(Words)


def fully_sharded_adapters(folder: Path) -> None:
    compare(Adapters, total_steps=2 * STEPS)


class Experts(nn.Module):
    """Matrices that are stacked in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts = nn.Embedding(37, 12), nn.Parameter(torch.randn(5, 37, 12) / 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->no", self.experts.tanh(), self.table(inputs))


def stacked_experts(folder: Path) -> None:
    alone, model = make(Experts), shard(make(Experts))
    for one, part in ((alone, (0, 1)), (model, mine())):
        groups = [{"params": [one.experts], "stacked": True}, {"params": [one.table.weight]}]
        train(one, LearnedOptimizer(groups, exact(), matrices=2), part)
    assert_close(model, alone, 1e-4)


def state_of_one_process(folder: Path) -> None:
    """A file that one process wrote, without the tools for checkpoints."""
    alone, model = make(Text), make(Text)
    theirs = LearnedOptimizer(alone.parameters(), exact())
    train(alone, theirs, steps=range(3))
    model.load_state_dict(alone.state_dict())
    optimizer = LearnedOptimizer(shard(model).parameters(), exact())
    optimizer.load_state_dict(theirs.state_dict())
    train(alone, theirs, steps=range(3, 6))
    train(model, optimizer, mine(), range(3, 6))
    assert_close(model, alone)
    with pytest.raises(ValueError, match="is a DTensor, and the parameter a plain tensor"):
        theirs.load_state_dict(optimizer.state_dict())


def default_weights(folder: Path) -> None:
    compare(Text, 3e-3, pretrained="default")


def bfloat16_parameters(folder: Path) -> None:
    compare(Text, 0.05, torch.bfloat16)


def mixed_precision(folder: Path) -> None:
    model = shard(make(Text), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = LearnedOptimizer(model.parameters(), exact())
    train(model, optimizer, mine())
    alone = make(Text)
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    assert_close(model, alone, 0.2)
    assert_same_control(optimizer)


def offloaded(folder: Path) -> None:
    model, alone = shard(make(Text), offload_policy=CPUOffloadPolicy(pin_memory=False)), make(Text)
    train(model, LearnedOptimizer(model.parameters(), exact()), mine())
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    assert_close(model, alone)


def state_is_sharded(folder: Path) -> None:
    model = shard(make(Text))
    optimizer = LearnedOptimizer(model.parameters())
    train(model, optimizer, mine(), range(1))
    for param, state in optimizer.state.items():
        for key in ("moments", "lstm"):
            assert state[key].shape[1:] == param.shape
            assert local(state[key]).shape[1:] == local(param).shape
    counts = [sum(local(state[key]).nbytes for state in optimizer.state.values()) for key in ("moments", "lstm")]
    weights = sum(local(param).numel() for param in model.parameters())
    assert counts == [8 * weights, 10 * weights]
    assert weights < 1.1 / dist.get_world_size() * sum(param.numel() for param in model.parameters())


def distributed_data_parallel(folder: Path) -> None:
    alone, model = make(Text), nn.parallel.DistributedDataParallel(make(Text))
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    train(model, LearnedOptimizer(model.parameters(), exact()), mine())
    assert_close(model, alone)


def zero_redundancy(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    for kind in (Text, Images):  # many matrices and two, which move further
        for kernel in ("auto", "reference"):
            alone, model = make(kind), nn.parallel.DistributedDataParallel(make(kind))
            train(alone, LearnedOptimizer(alone.parameters(), exact()))
            ours = functools.partial(LearnedOptimizer, pretrained=exact(), kernel=kernel, parts_group=dist.group.WORLD)
            train(model, ZeroRedundancyOptimizer(model.parameters(), ours), mine())
            assert_close(model, alone, 2e-4 if kind is Images else 1e-5)
    with pytest.raises(ValueError, match="parts_group"):
        ZeroRedundancyOptimizer(model.parameters(), LearnedOptimizer)


def parts_without_gradients(folder: Path) -> None:
    """A process whose parameters got no gradient, or one that is not finite, must not leave the others waiting."""
    model = make(Text)
    params = list(model.parameters())[dist.get_rank() :: dist.get_world_size()]
    optimizer = LearnedOptimizer(params, parts_group=dist.group.WORLD)

    def spoil(step: int) -> None:
        for param in params if dist.get_rank() == 0 else ():
            if step == 1:
                param.grad = None
            elif step == 2:
                param.grad.fill_(float("nan"))

    train(model, optimizer, steps=range(2), between=spoil)
    before = [param.detach().clone() for param in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, steps=range(2, 3), between=spoil)
    still = [torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert all(still) == (dist.get_rank() == 0)


def tensor_parallel_model(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tensor_parallel(folder: Path) -> None:
    for kernel in ("auto", "reference"):
        alone, model = make(Text), tensor_parallel_model(make(Text), init_device_mesh("cpu", (dist.get_world_size(),)))
        options = {"weight_decay": 0.1, "kernel": kernel}
        train(alone, LearnedOptimizer(alone.parameters(), exact(), **options))
        optimizer = LearnedOptimizer(model.parameters(), exact(), **options)
        train(model, optimizer)
        assert_close(model, alone)
        assert_same_control(optimizer)


def two_dimensions(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    alone, model = make(Text), shard(tensor_parallel_model(make(Text), mesh["tensor"]), mesh=mesh["data"])
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    optimizer = LearnedOptimizer(model.parameters(), exact())
    train(model, optimizer, (mesh.get_coordinate()[0], 2))
    assert_close(model, alone)
    assert_same_control(optimizer)


def hybrid(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    alone, model = make(Text), shard(make(Text), mesh=mesh)
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    optimizer = LearnedOptimizer(model.parameters(), exact())
    train(model, optimizer, mine())
    assert_close(model, alone)
    assert_same_control(optimizer)


def not_finite(folder: Path) -> None:
    """What one process sees all act on."""
    model = shard(make(Text))
    optimizer = LearnedOptimizer(model.parameters())
    matrix = model.blocks[0].up.weight

    def spoil(step: int) -> None:
        if dist.get_rank() == 0:
            local(matrix.grad)[0, 0] = float("inf")

    before = whole(matrix)
    others = whole(model.head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, mine(), range(1), spoil)
    assert torch.equal(whole(matrix), before)
    assert not torch.equal(whole(model.head.weight), others)
    assert optimizer.skipped == 1
    optimizer.error_if_nonfinite = True
    with pytest.raises(RuntimeError, match="not finite"):
        train(model, optimizer, mine(), range(1), spoil)


@contextmanager
def counted() -> Iterator[tuple[list[int], list[int]]]:
    """Bytes that this process sends to others in each all_to_all, and bytes of each all_reduce."""
    parts: list[int] = []
    sums: list[int] = []
    send, add = dist.all_to_all_single, dist.all_reduce

    def all_to_all_single(incoming: Tensor, outgoing: Tensor, taken: list[int], given: list[int], **options: Any) -> None:
        parts.append(outgoing.element_size() * (sum(given) - given[dist.get_rank()]))
        send(incoming, outgoing, taken, given, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> None:
        sums.append(tensor.nbytes)
        add(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all_single)
        patch.setattr(dist, "all_reduce", all_reduce)
        yield parts, sums


def traffic(folder: Path) -> None:
    """What the simulation of large models counts is what is sent."""
    program = load("sharded_simulation")
    for kernel in ("compiled", "reference"):
        model = shard(make(Text))
        optimizer = LearnedOptimizer(model.parameters(), exact(), weight_decay=0.1, kernel=kernel)
        train(model, optimizer, mine(), range(1))
        backward(model, 1, mine())
        with counted() as (parts, sums):
            optimizer.step()
        layout = program.layout_of([param.shape for param in model.parameters()], dist.get_world_size(), dist.get_rank())
        assert parts == program.parts_sent(layout)
        assert min(parts) > 0
        assert sums == program.sums_sent(layout, kernel)


def sharded_pair() -> tuple[nn.Module, LearnedOptimizer]:
    model = shard(make(Text))
    return model, LearnedOptimizer(model.named_parameters(), weight_decay=0.1, total_steps=20)


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resumed(folder: Path) -> tuple[nn.Module, LearnedOptimizer]:
    model, optimizer = sharded_pair()
    content = checkpoint_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])
    return model, optimizer


def save_checkpoint(folder: Path) -> None:
    """Saved, loaded and gone on with, it is the same to the last bit. Leaves what others of this file load, and where a run should end."""
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": full}, folder / "full.pt")
    train(model, optimizer, mine(), range(3, 6))
    other, theirs = resumed(folder)
    train(other, theirs, mine(), range(3, 6))
    for one, param in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(local(one), local(param))
        for key, value in optimizer.state[param].items():
            assert torch.equal(local(theirs.state[one][key]), local(value)), key
    end = {name: whole(param) for name, param in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(end, folder / "end.pt")


def assert_end(model: nn.Module, folder: Path, tolerance: float = 1e-3) -> None:
    for name, value in torch.load(folder / "end.pt", weights_only=True).items():
        difference = (whole(model.get_parameter(name)) - value).abs().max() / (value.square().mean().sqrt() + 1e-2)
        assert difference <= tolerance, (name, difference)


def load_checkpoint(folder: Path) -> None:
    """In as many processes as this has; where those that saved it were as many, the end is the same to the last bit."""
    model, optimizer = resumed(folder)
    train(model, optimizer, mine(), range(3, 6))
    assert_end(model, folder, 1e-3 if "full.pt" in os.listdir(folder) else 0)


def load_full(folder: Path) -> None:
    """A file of one process's state, which rank 0 reads, or everyone."""
    for broadcast in (True, False):
        content = torch.load(folder / "full.pt", weights_only=True)
        model, optimizer = sharded_pair()
        here = content if dist.get_rank() == 0 or not broadcast else {"model": {}, "optimizer": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_model_state_dict(model, here["model"], options=options)
        set_optimizer_state_dict(model, optimizer, here["optimizer"], options=options)
        train(model, optimizer, mine(), range(3, 6))
        assert_end(model, folder)


def flattened(folder: Path) -> None:
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    content = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(content, checkpoint_id=folder / "flattened")
    other, theirs = sharded_pair()
    set_model_state_dict(other, get_model_state_dict(model))
    found = get_optimizer_state_dict(other, theirs, options=options)
    dcp.load(found, checkpoint_id=folder / "flattened")
    set_optimizer_state_dict(other, theirs, found, options=options)
    train(model, optimizer, mine(), range(3, 5))
    train(other, theirs, mine(), range(3, 5))
    for one, param in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(local(one), local(param))


def survive(folder: Path) -> None:
    """Saves after three steps and loses a process in the next; begun again, it goes on and ends as if nothing had happened."""
    if (folder / "checkpoint" / ".metadata").exists():
        load_checkpoint(folder)
        return
    model, optimizer = sharded_pair()
    train(model, optimizer, mine(), range(3))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    backward(model, 3, mine())
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()


@contextmanager
def joined() -> Iterator[None]:
    # torchrun's store outlives a restart, and with it the addresses of the processes before.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    with joined():
        for name in names:
            outcome = ""
            try:
                globals()[name](folder)
            except Exception:
                outcome = traceback.format_exc()
            (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(outcome))
            dist.barrier()  # does not return where another process is elsewhere by now
