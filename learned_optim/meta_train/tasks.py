"""What meta-training trains on: the task protocol, and tasks made of an `nn.Module`.

A *task* is one training problem: an architecture, its data and its loss. A *family* samples tasks. Everything random comes from the
generator that is handed in, so a task is made again from its seed alone.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from . import twice

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]
Batch = tuple[Any, ...] | dict[str, Any]  # of tensors, and what else goes with them: None, strings, numbers, nested ones
Given = Tensor | Sequence[Any] | Mapping[str, Any]  # what data may hold as a batch; see `as_batch`
Sampler = Callable[[Generator], tuple[Tensor, ...]]

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
        """A training batch. Batches of one shape are trained on side by side, others one after the other."""
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
        data: batches, as a function of a generator that draws one, or as an iterable (a DataLoader of any kind, say), of which the first
            256 batches are read, once; training then draws from those at random. A last, smaller batch is left out, as `drop_last` does.
            A batch is a tuple or list, whose last entry is the target; a mapping; or a single tensor, alone or in a tuple, which is its
            own target, as for autoencoders. Entries are tensors, and may be None, strings or anything else that the module takes.
        criterion: loss () of the module's output for `batch[:-1]` against the target `batch[-1]`. For batches that are mappings: of the
            module and the batch.
        validation: data for validation, likewise; `data` by default.

    Parameters that do not require a gradient (a frozen backbone) are left as `build` makes them. One that the module uses twice (tied
    weights) is one entry, under its first name. Buffers, such as BatchNorm's running statistics, evolve with each optimizee.

    Examples:
        >>> import torch
        >>> from learned_optim.meta_train import ModuleTask
        >>> def batch(generator):
        ...     inputs = torch.randn(32, 4, generator=generator)
        ...     return inputs, inputs.sin().sum(1, keepdim=True)
        >>> task = ModuleTask(lambda: torch.nn.Linear(4, 1), batch, torch.nn.functional.mse_loss)
        >>> task.shapes
        {'weight': torch.Size([1, 4]), 'bias': torch.Size([1])}

    Raises:
        ValueError: there is nothing to train, or the data hold no batch, or what is none.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Callable[[Generator], Given] | Iterable[Given],
        criterion: Callable[..., Tensor],
        validation: Callable[[Generator], Given] | Iterable[Given] | None = None,
    ) -> None:
        self.build = build
        self.criterion = criterion
        self.module = build()
        self.shapes = {name: param.shape for name, param in self.module.named_parameters() if param.requires_grad}
        if not self.shapes:
            raise ValueError("the module has no parameter that requires a gradient, so there is nothing to train")
        self.recurrent = twice.prepare(self.module)
        self.held_out = validation is not None
        self.batch = _sampler(data)
        self.validation_batch = self.batch if validation is None else _sampler(validation)

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

        with twice.differentiable(self.recurrent):
            return self.loss_of(call, batch), buffers

    def loss_of(self, module: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss () of a module of this kind, with parameters of its own, on a batch."""
        loss = self.criterion(module, batch) if isinstance(batch, dict) else self.criterion(module(*batch[:-1]), batch[-1])
        if not isinstance(loss, Tensor) or loss.shape != ():
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion must return a loss of shape (), got {found}; take its mean")
        return loss


def _sampler(data: Callable[[Generator], Given] | Iterable[Given]) -> Callable[[Generator], Batch]:
    if callable(data):
        return lambda generator: as_batch(data(generator))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(f"{type(data).__name__} holds single examples; hand over batches of it: DataLoader(dataset, batch_size=32)")
    batches = [as_batch(batch) for batch in itertools.islice(data, BATCHES)]
    if not batches:
        raise ValueError("the data have no batch; an iterator that was read before is empty, so hand over a list or a DataLoader")
    # A last, smaller batch is there by chance, and cannot stand beside the others.
    *others, last = [[leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)] for batch in batches]
    if others and all(shapes == others[0] for shapes in others) and _numbers(last) < _numbers(others[0]):
        batches.pop()
    return lambda generator: batches[int(torch.randint(len(batches), (), generator=generator))]


def _numbers(shapes: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)


def as_batch(given: Given) -> Batch:
    """What data hold as a batch, in the one form that tasks have it: a dict, or a tuple whose last entry is the target."""
    if isinstance(given, Tensor):
        return given, given
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, (tuple, list)) and given:
        return tuple(given) if len(given) > 1 else (given[0], given[0])
    raise ValueError(f"a batch must be a tensor, a tuple or list of tensors, or a mapping of them; got {type(given).__name__}")


def sampled(family: Family, generator: Generator, seed: int) -> Task:
    """A task of a family. What the family draws from torch's global generator, a DataLoader's order say, is decided by the seed, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family(generator)


def check_problem(problem: object) -> None:
    """Refuses what neither is a task of a module's nor makes one."""
    if isinstance(problem, ModuleTask):
        return
    wanted = "a learned_optim.meta_train.ModuleTask, or a function of a torch.Generator that returns one"
    if not callable(problem) or isinstance(problem, (type, nn.Module)):
        kind = f"the class {problem.__name__}" if isinstance(problem, type) else type(problem).__name__
        raise ValueError(f"the problem must be {wanted}, got {kind}")
    try:
        inspect.signature(problem).bind(None)
    except TypeError as error:
        raise ValueError(f"the problem must be {wanted}; this function cannot be called with a generator: {error}") from None


def draw_seed(generator: Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
