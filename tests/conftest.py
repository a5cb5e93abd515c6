"""What every test starts from: one thread, so that sums have one order, and a fixed seed; and what tests of the rule share."""

import os

import pytest
import torch

from learned_optim import NetworkConfig, OptimizerNetwork

# Without a GPU Triton's interpreter runs its kernels. Triton looks when it is imported, and any test module may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def untrained() -> OptimizerNetwork:
    """A network without a warm-up, so that a first step shows what all the rest makes of it; `tests/test_warm_up.py` is about that."""
    network = OptimizerNetwork(NetworkConfig()).requires_grad_(False)
    network.controller.log_start.zero_()
    return network


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
