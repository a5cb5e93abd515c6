"""Models that are spread over processes train as in one: real gloo groups, started by torchrun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sharded_checkpoints as checkpoints
import sharded_models as models
import sharded_worker as worker
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import torchrun
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from learned_optim import LearnedOptimizer

TWO, MORE, FOUR = ([check.__name__ for check in checks] for checks in (worker.TWO, worker.MORE, worker.FOUR))


def run(processes: int, folder: Path, *names: str, restarts: int = 0) -> str:
    done = torchrun(processes, folder, str(Path(worker.__file__)), str(folder), *names, restarts=restarts, imports="sharded_worker")
    return done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run(2, folder, *TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("four")
    return folder, run(4, folder, *FOUR)


def assert_passed(folder: Path, processes: int, name: str, log: str) -> None:
    for rank in range(processes):
        found = folder / f"{name}.{rank}.json"
        assert found.exists(), log[-2000:]
        assert not (outcome := json.loads(found.read_text())), outcome


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one(two: tuple[Path, str], name: str) -> None:
    assert_passed(two[0], 2, name, two[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one(four: tuple[Path, str], name: str) -> None:
    assert_passed(four[0], 4, name, four[1])


@pytest.mark.parametrize("saved", ["two", pytest.param("four", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP says that it will use one process
def test_one_process_goes_on_with_the_checkpoint_of_several(request: pytest.FixtureRequest, saved: str) -> None:
    folder, log = request.getfixturevalue(saved)
    assert_passed(folder, 2, "save_checkpoint", log)
    model = models.make(models.Text)
    optimizer = LearnedOptimizer(model.named_parameters(), weight_decay=0.1, total_steps=20)
    content = checkpoints.checkpoint_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])
    models.train(model, optimizer, steps=range(3, 6))
    checkpoints.assert_end(model, folder)


@pytest.mark.slow
def test_two_processes_go_on_with_what_four_saved_and_outlive_a_killed_one(two: tuple[Path, str], four: tuple[Path, str]) -> None:
    """One start of two processes for all that needs no other."""
    folder = four[0]
    for (saved, log), processes in ((two, 2), (four, 4)):
        assert_passed(saved, processes, "save_checkpoint", log)
    (folder / "killed").mkdir()
    shutil.copy(two[0] / "end.pt", folder / "killed")
    names = ["load_checkpoint", "load_full", *MORE, "survive"]
    log = run(2, folder, *names, restarts=1)
    for name in names:
        assert_passed(folder, 2, name, log)


@pytest.fixture
def group() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of FSDP1 itself
def test_fsdp1_is_refused(group: object, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(models.make(models.Text), device_id=torch.device("cpu"), use_orig_params=original)
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
