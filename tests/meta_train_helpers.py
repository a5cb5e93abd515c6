"""What the tests of meta-training share: a tiny task, a network that acts, and a configuration of seconds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Generator, nn
from torch.nn import functional as F

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.meta_train import MetaTrainConfig, ModuleTask
from learned_optim.meta_train.families.sampling import mlp_module, sampler
from learned_optim.meta_train.tasks import Batch, Buffers, Params, Task
from learned_optim.meta_train.unroll import Unroll, begin

SMALL = NetworkConfig(hidden_units=2)


def tiny_task(generator: Generator) -> ModuleTask:
    inputs = torch.randn(64, 3, generator=generator)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    return ModuleTask(lambda: mlp_module([3, 5, 1], nn.Tanh), sampler(inputs, targets, 8), F.mse_loss)


def acting_network(config: NetworkConfig = SMALL) -> OptimizerNetwork:
    """A network whose LSTM is not zero."""
    torch.manual_seed(3)
    network = OptimizerNetwork(config)
    with torch.no_grad():
        network.coordinate.out.normal_(std=0.5)
    return network


def tiny_config(**changes: object) -> MetaTrainConfig:
    lengths = {"truncation": 4, "horizon_min": 6, "horizon_max": 12}
    config = MetaTrainConfig(
        network=SMALL, meta_steps=6, unrolls_per_step=2, unrolls_per_family=2, replicas=2, pairs=2, checkpoint_every=2, **lengths
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tiny_unroll(network: OptimizerNetwork, task: Task, *, horizon: int = 20, seed: int = 5, replicas: int = 2) -> Unroll:
    return begin(task, seed, None, replicas, network.config, network.log_step_size.device, horizon=horizon, horizon_known=True)


class InDouble:
    """A task in float64."""

    def __init__(self, task: Task) -> None:
        self.task, self.shapes = task, task.shapes

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        params, buffers = self.task.init(generator)
        return {name: param.double() for name, param in params.items()}, buffers

    def batch(self, generator: Generator) -> Batch:
        return tuple(part.double() for part in self.task.batch(generator))

    def validation_batch(self, generator: Generator) -> Batch:
        return tuple(part.double() for part in self.task.validation_batch(generator))

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[torch.Tensor, Buffers]:
        return self.task.loss(params, buffers, batch, training)
