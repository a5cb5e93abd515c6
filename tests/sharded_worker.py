"""What `tests/test_sharded.py` has several processes do, started by torchrun: each check by its name, and what became of it in a file.

    torchrun --nproc-per-node 2 tests/sharded_worker.py runs/sharded --backend nccl

runs all checks for so many processes on as many GPUs. `--steps 50 --width 128 --layers 5` makes runs longer and the GPT one of a million
weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sharded_models as models
import torch
import torch.distributed as dist
from sharded_checkpoints import flattened, load_checkpoint, load_full, save_checkpoint, survive
from sharded_models import (
    Adapters,
    Experts,
    Images,
    Text,
    Tuned,
    Words,
    assert_close,
    assert_same_control,
    backward,
    difference,
    exact,
    local,
    make,
    mine,
    shard,
    train,
    whole,
)
from test_tables import load
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from learned_optim import LearnedOptimizer
from learned_optim.config import NetworkConfig
from learned_optim.optimizer import init_state
from learned_optim.rule import Control


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


def tensor_parallel_model(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.blocks:
        columns = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel())
        parallelize_module(block, mesh, columns | {"out": RowwiseParallel(), "down": RowwiseParallel()})
    return model


def tensors(model: nn.Module, make_optimizer: Any) -> Spread:
    tensor_parallel_model(model, init_device_mesh(models.DEVICE, (dist.get_world_size(),)))
    return model, make_optimizer(model.parameters()), (0, 1)


def both(model: nn.Module, make_optimizer: Any) -> Spread:
    mesh = init_device_mesh(models.DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    shard(tensor_parallel_model(model, mesh["tensor"]), mesh=mesh["data"])
    return model, make_optimizer(model.parameters()), (mesh.get_coordinate()[0], 2)


@functools.cache
def trained_alone(make_optimizer: Any, kind: type[nn.Module], dtype: torch.dtype, **options: Any) -> nn.Module:
    """What the first process makes of it by itself, and tells the others. Several checks compare with the same."""
    model = make(kind, dtype)
    if dist.get_rank() == 0:
        train(model, make_optimizer(model.parameters(), **options))
    for param in model.parameters():
        value = param.detach().float()
        dist.broadcast(value, 0)
        param.data.copy_(value)
    return model


def compare(spread: Callable[..., Spread], kind: type[nn.Module] = Text, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """One process and several differ by at most ten times as much as they do with AdamW, whose difference counts as 1e-6 at least."""
    found = []
    for make_optimizer, given in ((adamw, {}), (ours, options)):
        model, optimizer, part = spread(make(kind, dtype), functools.partial(make_optimizer, **given))
        train(model, optimizer, part)
        found.append(difference(model, trained_alone(make_optimizer, kind, dtype, **given)))
    assert found[1] < 10 * max(found[0], 1e-6), found
    if spread is not zero:  # whose processes have other parameters each
        assert_same_control(optimizer)


def fully_sharded(folder: Path) -> None:
    compare(fsdp2)


def fully_sharded_bfloat16(folder: Path) -> None:
    compare(fsdp2, dtype=torch.bfloat16)


def fully_sharded_reference(folder: Path) -> None:
    compare(fsdp2, kernel="reference")


def fully_sharded_images(folder: Path) -> None:
    compare(fsdp2, Images)


def fully_sharded_words(folder: Path) -> None:
    compare(fsdp2, Words)


def fully_sharded_tuned(folder: Path) -> None:
    model = make(Tuned)
    optimizer = ours(model.parameters())
    train(model, optimizer, steps=range(1))
    looks = [Control.of(state["control"]).trained.item() for state in optimizer.state.values()]
    assert max(looks) == 1, "or this would be as with other models"
    compare(fsdp2, Tuned)


def fully_sharded_adapters(folder: Path) -> None:
    compare(fsdp2, Adapters, total_steps=2 * models.STEPS)


def distributed_data_parallel(folder: Path) -> None:
    for kind in (Text, Images, Adapters):
        compare(ddp, kind)
    compare(ddp, dtype=torch.bfloat16)


def zero_redundancy(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    for kind in (Text, Images, Adapters, Tuned):  # many matrices, two, which move further, and such as are not orthogonalised
        compare(zero, kind)
    compare(zero, kernel="reference")
    compare(zero, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="parts_group"):
        ZeroRedundancyOptimizer(make(Text).parameters(), LearnedOptimizer)


def tensor_parallel(folder: Path) -> None:
    compare(tensors)
    compare(tensors, dtype=torch.bfloat16)
    compare(tensors, kernel="reference")


def two_dimensions(folder: Path) -> None:
    compare(both)


def hybrid(folder: Path) -> None:
    mesh = init_device_mesh(models.DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    compare(functools.partial(fsdp2, mesh=mesh))


def offloaded(folder: Path) -> None:
    compare(functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)))


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
    assert counts == [8 * weights, 8 * weights]
    assert weights < 1.1 / dist.get_world_size() * sum(param.numel() for param in model.parameters())


def trained_matrices_are_seen_whole(folder: Path) -> None:
    """Of each matrix the rows of one half look fresh, and those of the other trained."""
    model = make(Text)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                half = len(param) // 2
                param[half:] = param[half:, :1] * param[:1] * len(param)
    states = [init_state(param, NetworkConfig()) for param in model.parameters()]
    expected = [float(Control.of(state["control"]).trained) for state in states]
    shard(model)
    optimizer = LearnedOptimizer(model.parameters())
    train(model, optimizer, mine(), range(1))
    assert [float(Control.of(optimizer.state[param]["control"]).trained) for param in model.parameters()] == pytest.approx(expected)
    assert max(expected) == 1


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


def traffic_of(kernel: str) -> None:
    """What the simulation of large models counts is what is sent."""
    program = load("sharded_simulation")
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


def traffic(folder: Path) -> None:
    for kernel in ("compiled", "reference") if models.DEVICE == "cpu" else ("triton", "reference"):
        traffic_of(kernel)


def triton_kernels(folder: Path) -> None:
    """Triton's interpreter runs them too, which takes its time: two steps of small matrices."""
    if models.DEVICE == "cpu" and (os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None):
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 2, "WIDTH": 8, "LAYERS": 1}.items():
            patch.setattr(models, name, value)
        for spread, kind in ((fsdp2, Text), (zero, Adapters)):
            compare(spread, kind, kernel="triton")
        traffic_of("triton")


TWO = [
    fully_sharded,
    fully_sharded_bfloat16,
    fully_sharded_reference,
    fully_sharded_images,
    fully_sharded_adapters,
    fully_sharded_words,
    fully_sharded_tuned,
    state_is_sharded,
    trained_matrices_are_seen_whole,
    distributed_data_parallel,
    zero_redundancy,
    parts_without_gradients,
    tensor_parallel,
    not_finite,
    traffic,
    save_checkpoint,
    load_checkpoint,
]
MORE = [triton_kernels, stacked_experts, state_of_one_process, default_weights, mixed_precision, offloaded, flattened]
# What two processes do not show: groups in two dimensions, and tensors and matrices that not every process has a part of.
FOUR = [
    fully_sharded,
    fully_sharded_images,
    fully_sharded_adapters,
    state_is_sharded,
    zero_redundancy,
    two_dimensions,
    hybrid,
    save_checkpoint,
]
CHECKS = {check.__name__: check for check in (*TWO, *MORE, *FOUR, load_full, survive)}


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
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where results and checkpoints go; it should be empty")
    options.add_argument("names", nargs="*", help="checks; all for so many processes where none is named")
    options.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    for name, value in (("steps", models.STEPS), ("width", models.WIDTH), ("layers", models.LAYERS)):
        options.add_argument(f"--{name}", type=int, default=value)
    arguments = options.parse_args()
    models.STEPS, models.WIDTH, models.LAYERS = arguments.steps, arguments.width, arguments.layers
    models.DEVICE = "cuda" if arguments.backend == "nccl" else "cpu"
    if models.DEVICE == "cuda":  # matrices in bfloat16 would differ by more than what is looked for
        from learned_optim.kernels import gpu

        gpu.MATRIX_DTYPE = None
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    with joined(arguments.backend):
        everything = FOUR if dist.get_world_size() == 4 else TWO + MORE
        for name in arguments.names or [check.__name__ for check in everything]:
            file = arguments.folder / f"{name}.{dist.get_rank()}.json"
            if again and file.exists() and not json.loads(file.read_text()):  # passed; what the killed one took with it runs again
                continue
            outcome = ""
            try:
                CHECKS[name](arguments.folder)
            except Exception:
                outcome = traceback.format_exc()
            file.write_text(json.dumps(outcome))
            if dist.get_rank() == 0:
                print(f"{name}: {outcome or 'passed'}", flush=True)
            dist.barrier()  # does not return where another process is elsewhere by now


if __name__ == "__main__":
    main()
