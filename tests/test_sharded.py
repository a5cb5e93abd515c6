"""Models that are spread over processes train as in one: real gloo groups, started by torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharded_worker as worker
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import torchrun
from test_tables import load
from torch import nn
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from learned_optim import LearnedOptimizer

TWO = [
    "fully_sharded",
    "fully_sharded_reference",
    "fully_sharded_images",
    "fully_sharded_adapters",
    "fully_sharded_words",
    "bfloat16_parameters",
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
MORE = [
    "stacked_experts",
    "state_of_one_process",
    "default_weights",
    "mixed_precision",
    "offloaded",
    "save_checkpoint",
    "load_full",
    "flattened",
]
FOUR = ["fully_sharded", "fully_sharded_images", "fully_sharded_adapters", "two_dimensions", "hybrid", "tensor_parallel", "zero_redundancy"]


def run(processes: int, folder: Path, *names: str, restarts: int = 0) -> str:
    done = torchrun(processes, folder, str(Path(worker.__file__)), str(folder), *names, restarts=restarts)
    return done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run(2, folder, *TWO)


def assert_passed(folder: Path, processes: int, name: str, log: str) -> None:
    for rank in range(processes):
        found = folder / f"{name}.{rank}.json"
        assert found.exists(), log[-2000:]
        assert not (outcome := json.loads(found.read_text())), outcome


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one(two: tuple[Path, str], name: str) -> None:
    assert_passed(two[0], 2, name, two[1])


def alone() -> tuple[nn.Module, LearnedOptimizer]:
    model = worker.make(worker.Text)
    return model, LearnedOptimizer(model.named_parameters(), weight_decay=0.1, total_steps=20)


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP says that it will use one process
def test_one_process_goes_on_with_the_checkpoint_of_two(two: tuple[Path, str]) -> None:
    folder, log = two
    assert_passed(folder, 2, "save_checkpoint", log)
    model, optimizer = alone()
    content = worker.checkpoint_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder / "checkpoint", no_dist=True)
    worker.set_model_state_dict(model, content["model"])
    worker.set_optimizer_state_dict(model, optimizer, content["optimizer"])
    worker.train(model, optimizer, steps=range(3, 6))
    worker.assert_end(model, folder)


@pytest.mark.slow
def test_two_processes_do_more(tmp_path: Path) -> None:
    log = run(2, tmp_path, *MORE)
    for name in MORE:
        assert_passed(tmp_path, 2, name, log)


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path: Path) -> None:
    log = run(4, tmp_path, *FOUR)
    for name in FOUR:
        assert_passed(tmp_path, 4, name, log)


@pytest.mark.slow
def test_two_processes_go_on_with_the_checkpoint_of_four(tmp_path: Path) -> None:
    log = run(4, tmp_path, "save_checkpoint")
    assert_passed(tmp_path, 4, "save_checkpoint", log)
    log = run(2, tmp_path, "load_checkpoint", "load_full")
    for name in ("load_checkpoint", "load_full"):
        assert_passed(tmp_path, 2, name, log)


@pytest.mark.slow
def test_a_run_outlives_a_killed_process(two: tuple[Path, str], tmp_path: Path) -> None:
    assert_passed(two[0], 2, "save_checkpoint", two[1])
    (tmp_path / "end.pt").write_bytes((two[0] / "end.pt").read_bytes())
    log = run(2, tmp_path, "survive", restarts=1)
    assert_passed(tmp_path, 2, "survive", log)


def test_bytes_of_operations_are_counted() -> None:
    program, one = load("sharded_simulation"), torch.ones(100)
    with program.Counter() as counter:
        two = one + 1
        three = two * 2
        del two
        four = three.view(10, 10) + 1
    assert four.sum() == 500
    assert counter.moved == 3 * 800
    assert counter.most == 800


@pytest.fixture
def group() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of FSDP1 itself
def test_fsdp1_is_refused(group: object, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(worker.make(worker.Text), device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        LearnedOptimizer(model.parameters())


def test_deepspeed_is_refused() -> None:
    param = nn.Parameter(torch.ones(6))
    param.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"DeepSpeed.*fully_shard"):
        LearnedOptimizer([param])
    # Its first two stages replace parameters in the groups of an optimizer that is there already.
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))])
    flat = nn.Parameter(torch.ones(8))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"one vector.*DeepSpeed.*fully_shard"):
        optimizer.step()


def test_parts_that_cannot_be_trained_are_refused(group: object) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    with pytest.raises(RuntimeError, match=r"int8.*pretrained='default'"):
        LearnedOptimizer([sharded], "small")
    with pytest.raises(ValueError, match="Partial"):
        LearnedOptimizer([nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Partial()]))])


def test_an_optimizer_with_a_group_cannot_be_pickled(group: dist.ProcessGroup) -> None:
    import pickle

    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2, 3))], parts_group=group)
    with pytest.raises(TypeError, match="parts_group"):
        pickle.dumps(optimizer)
