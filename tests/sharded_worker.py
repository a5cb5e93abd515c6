"""What `tests/test_sharded.py` has several processes do, started by torchrun: each check by its name, and what became of it in a file.

    torchrun --nproc-per-node 2 tests/sharded_worker.py runs/sharded --backend nccl

runs all checks for so many processes on as many GPUs. `--steps 50 --width 128 --layers 5` makes runs longer and the GPT one of a million
weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
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

STEPS, WIDTH, LAYERS, DEVICE = 8, 24, 2, "cpu"  # what the command line may change
HEADS = 4
DTYPES = torch.float32, torch.bfloat16

TWO = [
    "fully_sharded",
    "fully_sharded_reference",
    "fully_sharded_images",
    "fully_sharded_adapters",
    "fully_sharded_words",
    "state_is_sharded",
    "distributed_data_parallel",
    "zero_redundancy",
    "parts_without_gradients",
    "tensor_parallel",
    "not_finite",
    "traffic",
    "save_checkpoint",
    "load_checkpoint",
]
MORE = ["stacked_experts", "state_of_one_process", "default_weights", "mixed_precision", "offloaded", "flattened"]
FOUR = [
    "fully_sharded",
    "fully_sharded_images",
    "fully_sharded_adapters",
    "state_is_sharded",
    "distributed_data_parallel",
    "zero_redundancy",
    "tensor_parallel",
    "two_dimensions",
    "hybrid",
    "save_checkpoint",
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = width // HEADS
        self.before, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # Keys have no bias: its gradient would be zero but for rounding, and no optimizer without units takes the same steps from noise.
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        normed = self.before(inputs)
        heads = [part(normed).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        inputs = inputs + self.out(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return inputs + self.down(self.up(self.norm(inputs)).tanh())


class Text(nn.Module):
    """A GPT: a table, blocks of matrices, and a vector with fewer elements than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(37, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 37, bias=False)
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
    return kind().to(DEVICE, dtype)


def exact() -> OptimizerNetwork:
    """The default weights with state in fp32: otherwise a few roundings fall the other way where sums have another order."""
    network = load_network("default")
    found = OptimizerNetwork(dataclasses.replace(network.config, lstm_format="float32"))
    found.load_state_dict(network.state_dict())
    return found


def backward(model: nn.Module, step: int, part: tuple[int, int]) -> float:
    """Gradients of one of so many parts of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(0, 37, (16, 5), generator=generator).chunk(part[1])[part[0]].to(DEVICE)
    loss = nn.functional.cross_entropy(model(inputs).float().view(-1, 37), (3 * inputs.flatten() + 1) % 37)
    loss.backward()
    return loss.item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: tuple[int, int] = (0, 1),
    steps: range | None = None,
    between: Callable[[int], None] | None = None,
) -> None:
    for step in range(STEPS) if steps is None else steps:
        optimizer.zero_grad()
        backward(model, step, part)
        if between is not None:
            between(step)
        optimizer.step()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float().cpu()


def local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def difference(model: nn.Module, expected: nn.Module) -> float:
    """The largest one, in units of a parameter's root mean square."""
    found = []
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        scale = whole(other).square().mean().sqrt() + 1e-2
        found.append(((whole(param) - whole(other)).abs().max() / scale).item())
    return max(found)


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    assert difference(model, expected) < tolerance


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def mine() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def adamw(params: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def ours(params: Any, **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, exact(), weight_decay=0.1, **options)


Spread = tuple[nn.Module, torch.optim.Optimizer, tuple[int, int]]  # and a process's part of the batch


def fsdp2(model: nn.Module, make_optimizer: Any, **options: Any) -> Spread:
    shard(model, **options)
    return model, make_optimizer(model.parameters()), mine()


def ddp(model: nn.Module, make_optimizer: Any) -> Spread:
    model = nn.parallel.DistributedDataParallel(model)
    return model, make_optimizer(model.parameters()), mine()


def zero(model: nn.Module, make_optimizer: Any) -> Spread:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(model)
    make_part = functools.partial(make_optimizer, parts_group=dist.group.WORLD)
    return model, ZeroRedundancyOptimizer(model.parameters(), make_part), mine()


def tensors(model: nn.Module, make_optimizer: Any) -> Spread:
    tensor_parallel_model(model, init_device_mesh(DEVICE, (dist.get_world_size(),)))
    return model, make_optimizer(model.parameters()), (0, 1)


def both(model: nn.Module, make_optimizer: Any) -> Spread:
    mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    shard(tensor_parallel_model(model, mesh["tensor"]), mesh=mesh["data"])
    return model, make_optimizer(model.parameters()), (mesh.get_coordinate()[0], 2)


def compare(spread: Callable[..., Spread], kind: type[nn.Module] = Text, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """One process and several differ by at most ten times as much as they do with AdamW, whose difference counts as 1e-6 at least."""
    found = []
    for make_optimizer in (adamw, functools.partial(ours, **options)):
        alone = make(kind, dtype)
        train(alone, make_optimizer(alone.parameters()))
        model, optimizer, part = spread(make(kind, dtype), make_optimizer)
        train(model, optimizer, part)
        found.append(difference(model, alone))
    assert found[1] < 10 * max(found[0], 1e-6), found
    if spread is not zero:  # whose processes have other parameters each
        assert_same_control(optimizer)


def assert_same_control(optimizer: torch.optim.Optimizer) -> None:
    """What a tensor has once is the same in all processes, to the last bit."""
    controls = torch.stack([state["control"] for state in optimizer.state.values()])
    everyone = [torch.empty_like(controls) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, controls)
    assert all(torch.equal(one, controls) for one in everyone)


# Checks


def fully_sharded(folder: Path) -> None:
    for dtype in DTYPES:
        compare(fsdp2, dtype=dtype)


def fully_sharded_reference(folder: Path) -> None:
    compare(fsdp2, kernel="reference")


def fully_sharded_images(folder: Path) -> None:
    compare(fsdp2, Images)


def fully_sharded_words(folder: Path) -> None:
    compare(fsdp2, Words)


def fully_sharded_adapters(folder: Path) -> None:
    compare(fsdp2, Adapters, total_steps=2 * STEPS)


def distributed_data_parallel(folder: Path) -> None:
    for kind in (Text, Images, Adapters):
        compare(ddp, kind)
    compare(ddp, dtype=torch.bfloat16)


def zero_redundancy(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    for kind in (Text, Images, Adapters):  # many matrices, and two, which move further
        compare(zero, kind)
    compare(zero, kernel="reference")
    compare(zero, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="parts_group"):
        ZeroRedundancyOptimizer(make(Text).parameters(), LearnedOptimizer)


def tensor_parallel(folder: Path) -> None:
    for dtype in DTYPES:
        compare(tensors, dtype=dtype)
    compare(tensors, kernel="reference")


def two_dimensions(folder: Path) -> None:
    for dtype in DTYPES:
        compare(both, dtype=dtype)


def hybrid(folder: Path) -> None:
    mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    compare(functools.partial(fsdp2, mesh=mesh))


def offloaded(folder: Path) -> None:
    compare(functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)))


class Experts(nn.Module):
    """Matrices that are stacked in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts = nn.Embedding(37, 12), nn.Parameter(torch.randn(5, 37, 12) / 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("eoi,...i->...o", self.experts.tanh(), self.table(inputs))


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
    alone, model = make(Text), shard(make(Text))
    for one, part in ((alone, (0, 1)), (model, mine())):
        train(one, LearnedOptimizer(one.parameters()), part)
    assert_close(model, alone, 3e-3)


def mixed_precision(folder: Path) -> None:
    model = shard(make(Text), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = LearnedOptimizer(model.parameters(), exact())
    train(model, optimizer, mine())
    alone = make(Text)
    train(alone, LearnedOptimizer(alone.parameters(), exact()))
    assert_close(model, alone, 0.2)
    assert_same_control(optimizer)


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
        columns = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel())
        parallelize_module(block, mesh, columns | {"out": RowwiseParallel(), "down": RowwiseParallel()})
    return model


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
    for kernel in ("compiled", "reference") if DEVICE == "cpu" else ("reference",):
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
    folder = folder / "killed"  # has the end of a run of two
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
def joined(backend: str) -> Iterator[None]:
    # torchrun's store outlives a restart, and with it the addresses of the processes before.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # what is offloaded is summed on CPUs
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    global STEPS, WIDTH, LAYERS, DEVICE
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where results and checkpoints go; it should be empty")
    options.add_argument("names", nargs="*", help="checks; all for so many processes where none is named")
    options.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    for name, value in (("steps", STEPS), ("width", WIDTH), ("layers", LAYERS)):
        options.add_argument(f"--{name}", type=int, default=value)
    arguments = options.parse_args()
    STEPS, WIDTH, LAYERS = arguments.steps, arguments.width, arguments.layers
    DEVICE = "cuda" if arguments.backend == "nccl" else "cpu"
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    with joined(arguments.backend):
        for name in arguments.names or (FOUR if dist.get_world_size() == 4 else TWO + MORE):
            file = arguments.folder / f"{name}.{dist.get_rank()}.json"
            if again and file.exists() and not json.loads(file.read_text()):  # passed; what the killed one took with it runs again
                continue
            outcome = ""
            try:
                globals()[name](arguments.folder)
            except Exception:
                outcome = traceback.format_exc()
            file.write_text(json.dumps(outcome))
            if dist.get_rank() == 0:
                print(f"{name}: {outcome or 'passed'}", flush=True)
            dist.barrier()  # does not return where another process is elsewhere by now


if __name__ == "__main__":
    main()
