"""What every test starts from: one thread, so that sums have one order, and a fixed seed; and what tests of the rule share."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_server import HubServer
from rule_helpers import acting_network

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.cli import MINE

# Without a GPU Triton's interpreter runs its kernels. Triton looks when it is imported, and any test module may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-kernels", action="store_true", help="compile every Triton kernel for every GPU, which takes minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process gets a run of them: files with long tests come first there, so that short ones are left to even out the end."""
    size = -(-len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    long = {item.path for item in items if "slow" in item.keywords}
    for begin in range(0, len(items), size):
        items[begin : begin + size] = sorted(items[begin : begin + size], key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells leave it to what they run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process():
    """Without what programs set for the whole of their process, and a test that comes after one would find."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        if name.startswith("HF_"):
            del os.environ[name]


@pytest.fixture
def untrained() -> OptimizerNetwork:
    """A network without a warm-up, so that a first step shows what all the rest makes of it; `tests/test_warm_up.py` is about that."""
    network = OptimizerNetwork(NetworkConfig()).requires_grad_(False)
    network.controller.log_start.zero_()
    return network


@pytest.fixture
def network() -> OptimizerNetwork:
    return acting_network().requires_grad_(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def online(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of that server, which all tests of a process share; each has repositories of its own there."""
    client = Client(tmp_path_factory.mktemp("hf-home"), hub.url, HF_TOKEN="hf_token")
    yield client
    client.close()


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a file of a user's that the command then imports; what that changes is undone."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, MINE, None)

    def write(text: str) -> Path:
        (tmp_path / "my_file.py").write_text(text)
        return tmp_path / "my_file.py"

    return write
