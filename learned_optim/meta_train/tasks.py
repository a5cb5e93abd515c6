"""What meta-training trains on: the task protocol, and tasks made of an `nn.Module`.

A *task* is one training problem: an architecture, its data and its loss. A *family* samples tasks. Everything random comes from the
generator that is handed in, so a task is made again from its seed alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Sampler = Callable[[Generator], Batch]

BATCHES = 256  # how many batches are kept of an iterable


class Task(Protocol):
    """One training problem."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' names and shapes, in the order of `init`."""
        ...

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        """Fresh parameters and buffers of one optimizee, by name."""
        ...

    def batch(self, generator: Generator) -> Batch:
        """A training batch: tensors whose shapes never change."""
        ...

    def validation_batch(self, generator: Generator) -> Batch:
        """A batch of data that is not trained on, where there are any."""
        ...

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        """Loss, shape (), and the buffers after the forward pass.

        Pure, so that `torch.func.vmap` can run many optimizees of one task at once; twice differentiable by the parameters where exact
        meta-gradients are wanted.
        """
        ...


Family = Callable[[Generator], Task]


class ModuleTask:
    """A task made of any `nn.Module`, its data and its loss.

    Args:
        build: makes the module with fresh parameters. It may use torch's global generator, which is seeded for the call and restored.
        data: batches, as a function of a generator that draws one, or as an iterable (a DataLoader, say), of which the first 256 batches
            are read, once; training then draws from those at random. A batch is a tuple of tensors, or a mapping of them.
        criterion: loss () of the module's output for `batch[:-1]` against the target `batch[-1]`. For batches that are mappings: of the
            module and the batch.
        validation: data for validation, likewise; `data` by default.

    Parameters that do not require a gradient (a frozen backbone) are left as `build` makes them. One that the module uses twice (tied
    weights) is one entry, under its first name. Buffers, such as BatchNorm's running statistics, evolve with each optimizee.

    Raises:
        ValueError: there is nothing to train, or no data.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Sampler | Iterable[Sequence[Tensor] | Mapping[str, Tensor]],
        criterion: Callable[..., Tensor],
        validation: Sampler | Iterable[Sequence[Tensor] | Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.build = build
        self.criterion = criterion
        self.module = build()
        self.shapes = {name: param.shape for name, param in self.module.named_parameters() if param.requires_grad}
        if not self.shapes:
            raise ValueError("the module has no parameter that requires a gradient, so there is nothing to train")
        self.keys: tuple[str, ...] | None = None  # of batches that are mappings
        self.batch = self._sampler(data)
        self.validation_batch = self.batch if validation is None else self._sampler(validation)

    def _sampler(self, data: Sampler | Iterable[Sequence[Tensor] | Mapping[str, Tensor]]) -> Sampler:
        if callable(data):
            return data
        batches = []
        for batch in itertools.islice(data, BATCHES):
            if isinstance(batch, Mapping):
                self.keys = tuple(batch)
                batch = list(batch.values())
            batches.append(tuple(batch))
        # A last, smaller batch cannot stand beside the others.
        batches = [batch for batch in batches if [part.shape for part in batch] == [part.shape for part in batches[0]]]
        if not batches:
            raise ValueError("the data have no batch; an iterator that was read before is empty, so hand over a list or a DataLoader")
        return lambda generator: batches[int(torch.randint(len(batches), (), generator=generator))]

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(generator))
            module = self.build()
        params = {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}
        frozen = {name: param.detach() for name, param in module.named_parameters() if not param.requires_grad}
        return params, frozen | dict(module.named_buffers())

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        self.module.train(training)
        buffers = {name: value.clone() for name, value in buffers.items()}  # modules update them in place

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.module, (params, buffers), args, kwargs, tie_weights=True)

        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            if self.keys is None:
                loss = self.criterion(call(*batch[:-1]), batch[-1])
            else:
                loss = self.criterion(call, dict(zip(self.keys, batch, strict=True)))
        if loss.shape != ():
            raise ValueError(f"the criterion must return a loss of shape (), got {tuple(loss.shape)}; take its mean")
        return loss, buffers


def draw_seed(generator: Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
