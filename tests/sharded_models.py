"""Models that `tests/sharded_worker.py` has several processes train, how they are trained, and what is compared afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from learned_optim import OptimizerNetwork, load_network

STEPS, WIDTH, LAYERS, DEVICE = 4, 24, 2, "cpu"  # what the command line may change
HEADS = 4


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


class Tuned(Text):
    """The same, with blocks that look trained, as some of their directions are much larger than others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for param in self.blocks.parameters():
                if param.ndim == 2:
                    param.mul_(torch.linspace(0, 2, param.shape[1]))


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


class Experts(nn.Module):
    """Matrices that are stacked in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts = nn.Embedding(37, 12), nn.Parameter(torch.randn(5, 37, 12) / 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("eoi,...i->...o", self.experts.tanh(), self.table(inputs))


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


def assert_same_control(optimizer: torch.optim.Optimizer) -> None:
    """What a tensor has once is the same in all processes, to the last bit."""
    controls = torch.stack([state["control"] for state in optimizer.state.values()])
    everyone = [torch.empty_like(controls) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, controls)
    assert all(torch.equal(one, controls) for one in everyone)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def mine() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()
