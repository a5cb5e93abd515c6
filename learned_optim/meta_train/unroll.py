"""Training runs of optimizees, step by step: what every estimator of the meta-gradient runs.

Shapes: `R` optimizees (replicas) of one task, trained side by side; `P` perturbed networks (particles), each with optimizees of its own;
`...` is (R,) or (P, R). `K` tensors of one optimizee, with `N` coordinates laid end to end.
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..config import NetworkConfig
from ..features import ABSOLUTE_FLOOR, SURELY, Layout
from ..rule import Control, State, init_state
from .tasks import Batch, Buffers, Task

# The optimizer: gradients (..., N), state and horizons (..., K) -> what to add to the parameters, and the new state.
Rule = Callable[[Layout, Tensor, State, Tensor], tuple[Tensor, State]]

# From so many coordinates on, optimizees run one after the other: there is nothing left to win by batching them, and not every module
# that is large can be vmapped.
VMAP_LIMIT = 2**21

PLAIN = (str, bytes, int, float)  # parts of a batch that can be compared; replicas share those that are equal

# Tasks that vmap could not batch, by id: they need not be hashable.
one_by_one: weakref.WeakValueDictionary[int, Task] = weakref.WeakValueDictionary()


class Optimizees(NamedTuple):
    """All that a training step reads and writes."""

    params: Tensor  # (..., N)
    state: State  # of the optimizer
    buffers: Buffers  # of the modules, (..., *shape); the meta-gradient takes them as constants

    def differentiable(self) -> list[Tensor]:
        """What the meta-gradient flows through, from step to step."""
        return [self.params, *self.state.values()]

    def map(self, function: Callable[[Tensor], Tensor]) -> Optimizees:
        state, buffers = ({key: function(value) for key, value in tensors.items()} for tensors in (self.state, self.buffers))
        return Optimizees(function(self.params), state, buffers)


@dataclass(frozen=True)
class Unroll:
    """Optimizees of one task, part-way through their training. Its seed decides its batches, whenever and wherever they are drawn."""

    task: Task
    seed: int
    optimizees: Optimizees
    first_loss: Tensor  # (R,), at the start of training
    horizon: int  # optimizee steps in all
    horizon_known: bool  # whether the optimizer network is told
    gradient_noise: float = 0.0  # standard deviation, in units of each tensor's gradient RMS
    validation: bool = False  # whether losses are measured on validation data
    trained: tuple[bool, ...] = ()  # which tensors looked trained at the start of training
    step: int = 0  # optimizee steps done

    @property
    def layout(self) -> Layout:
        return Layout.of(tuple(self.task.shapes.values()), self.optimizees.params.device, trained=self.trained)

    def advanced(self, optimizees: Optimizees, steps: int) -> Unroll:
        return replace(self, optimizees=optimizees.map(Tensor.detach), step=self.step + steps)

    def batches(self, t: int, validation: bool = False) -> list[Batch]:
        """The batch of step `t` for each replica."""
        generator = Generator().manual_seed(derive_seed(self.seed, "validation" if validation else "batch", t))
        draw = self.task.validation_batch if validation else self.task.batch
        return [draw(generator) for _ in range(self.first_loss.numel())]

    def measure(self, t: int, optimizees: Optimizees) -> Tensor:
        """The loss that counts in the meta-loss, at step `t`, before the step; (...)."""
        batches = self.batches(t, self.validation)
        return losses(self.task, optimizees, batches, derive_seed(self.seed, "measure", t), training=not self.validation)[0]

    def train_step(self, t: int, optimizees: Optimizees, rule: Rule, create_graph: bool = False) -> tuple[Tensor, Optimizees]:
        """One training step of all optimizees.

        Args:
            create_graph: keep second derivatives, so that the step can be differentiated exactly.

        Returns:
            the loss that counts in the meta-loss (...), before the step, and the optimizees after it.
        """
        params, state, buffers = optimizees
        seed = derive_seed(self.seed, "step", t)
        with torch.enable_grad():
            differentiable = params.requires_grad
            leaf = params if differentiable else params.detach().requires_grad_()
            loss, new_buffers = losses(self.task, Optimizees(leaf, state, buffers), self.batches(t), seed)
            (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=create_graph, retain_graph=differentiable)
        if self.gradient_noise:
            grad = grad + self.gradient_noise * self._noise(grad, seed)
        horizon = self.horizon if self.horizon_known else math.inf
        total_steps = grad.new_full((*grad.shape[:-1], len(self.layout.sizes)), horizon)
        change, new_state = rule(self.layout, grad, state, total_steps)
        # Unless validation data are asked for, the loss that the gradient is taken of counts: it, too, is on data not trained on yet.
        if self.validation:
            loss = self.measure(t, optimizees)
        return loss, Optimizees(params + change, new_state, {key: value.detach() for key, value in new_buffers.items()})

    def _noise(self, grad: Tensor, seed: int) -> Tensor:
        noise = torch.randn(grad.shape, generator=Generator().manual_seed(seed)).to(grad.device)
        return noise * self.layout.spread((self.layout.mean(grad.square()) + ABSOLUTE_FLOOR).sqrt())


def begin(
    task: Task, seed: int, initial: Tensor | None, replicas: int, config: NetworkConfig, device: torch.device | str, **options: object
) -> Unroll:
    """An unroll at its first step.

    Args:
        initial: parameters to start from, (N,) or (R, N); by default the task's own initialisation, fresh for each replica.
        options: the remaining fields of `Unroll`.
    """
    generator = Generator().manual_seed(derive_seed(seed, "init"))
    inits = [task.init(generator) for _ in range(replicas)]
    params = torch.stack([torch.cat([param.flatten() for param in params.values()]) for params, _ in inits]).to(device)
    if initial is not None:
        if initial.shape[-1] != params.shape[-1]:
            raise ValueError(
                f"the initial parameters are {initial.shape[-1]} numbers, but the task's are {params.shape[-1]}: {task.shapes}"
            )
        params = initial.detach().to(params).expand_as(params)
    buffers = {name: torch.stack([buffers[name] for _, buffers in inits]).to(device) for name in inits[0][1]}
    layout = Layout.of(tuple(task.shapes.values()), params.device)
    state = init_state(layout, config, params)
    # Replicas share a layout, so they are of one kind.
    trained = tuple((Control.of(state["control"]).trained.mean(0) > SURELY).tolist())
    optimizees, first_loss = Optimizees(params, state, buffers), torch.ones(replicas, device=device)
    unroll = Unroll(task, seed, optimizees, first_loss, trained=trained, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return replace(unroll, first_loss=unroll.measure(0, unroll.optimizees))


def losses(task: Task, optimizees: Optimizees, batches: Sequence[Batch], seed: int, training: bool = True) -> tuple[Tensor, Buffers]:
    """Loss of each optimizee, (...), and its buffers after the forward pass.

    Optimizees run side by side where `torch.func.vmap` can batch the task and all batches have the same shapes, and otherwise one after
    the other, of which a warning tells.

    Args:
        batches: one for each of the R replicas; particles share them.
        seed: of dropout and the like.
    """
    params, _, buffers = optimizees
    leading, count = params.shape[:-1], params.shape[:-1].numel()
    rows = params.reshape(count, -1)
    flat_buffers = {key: value.flatten(0, len(leading) - 1) for key, value in buffers.items()}
    batches = [moved(batch, params.device) for batch in batches]

    def loss(row: Tensor, buffers: Buffers, batch: Batch) -> tuple[Tensor, Buffers]:
        return task.loss(named(task, row), buffers, batch, training)

    # A module may differentiate inside its forward pass, so gradients are on in any case; without parameters that want one, that is free.
    grad = torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []), torch.enable_grad():
        values, note = None, None
        new_buffers: Buffers = {}
        if count > 1 and not is_large(optimizees) and id(task) not in one_by_one:
            try:
                leaves, rebuild = side_by_side(batches)
                leaves = [leaf.expand(*leading, *leaf.shape[1:]).flatten(0, len(leading) - 1) for leaf in leaves]
                seed_all(seed, params.device)
                values, new_buffers = vmap(lambda row, buffers, leaves: loss(row, buffers, rebuild(leaves)), randomness="different")(
                    rows, flat_buffers, leaves
                )
            except DifferentShapesError as error:
                note = str(error)
            except Exception as error:  # whatever it is: it is the module's own if it is raised again below
                reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
                note = f"torch.func.vmap cannot batch this model ({reason}), so its replicas are trained one after the other"
                one_by_one[id(task)] = task
        if values is None:
            seed_all(seed, params.device)
            each = [loss(*inputs) for inputs in zip(rows, unbind(flat_buffers, count), itertools.cycle(batches), strict=False)]
            values = torch.stack([value for value, _ in each])
            new_buffers = {key: torch.stack([buffers[key] for _, buffers in each]) for key in buffers}
            if note:
                warnings.warn(note, stacklevel=1)  # from one place, so that Python shows it once
    values = values.reshape(leading)
    return values if grad else values.detach(), {key: value.unflatten(0, leading) for key, value in new_buffers.items()}


class DifferentShapesError(ValueError):
    """Batches of one step that cannot stand side by side."""


def side_by_side(batches: Sequence[Batch]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]]:
    """The tensors of all batches, each (R, ...), and a function that makes a batch of one's tensors again."""
    first, structure = tree_flatten(batches[0])
    rows = [first]
    for batch in batches[1:]:
        leaves, other = tree_flatten(batch)
        if other != structure or not all(map(_alike, first, leaves)):
            raise DifferentShapesError(
                "batches of one step differ in shape, or in what they hold beside tensors, so its replicas are trained one after the "
                "other; pad them to one shape to train side by side"
            )
        rows.append(leaves)
    tensors = [index for index, leaf in enumerate(first) if isinstance(leaf, Tensor)]

    def rebuild(values: Sequence[Tensor]) -> Batch:
        leaves = list(first)
        for index, value in zip(tensors, values, strict=True):
            leaves[index] = value
        batch: Batch = tree_unflatten(leaves, structure)
        return batch

    return [torch.stack([row[index] for row in rows]) for index in tensors], rebuild


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype)
    return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch with all that can be moved on a device."""
    result: Batch = tree_map(lambda part: part.to(device) if hasattr(part, "to") else part, batch)
    return result


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators, the CPU's and the device's."""
    # Not torch.manual_seed: it tells all kinds of devices, which takes a tenth of a small optimizee's step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def is_large(optimizees: Optimizees) -> bool:
    return optimizees.params.numel() >= VMAP_LIMIT


def unbind(tensors: Buffers, count: int) -> Iterator[Buffers]:
    return ({key: value[index] for key, value in tensors.items()} for index in range(count))


def named(task: Task, params: Tensor) -> dict[str, Tensor]:
    """Flat parameters (N,) as the task names and shapes them."""
    parts = params.split([shape.numel() for shape in task.shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(task.shapes.items(), parts, strict=True)}


def derive_seed(*path: object) -> int:
    """A seed for one purpose at one place, the same on every machine."""
    return zlib.crc32("/".join(map(str, path)).encode())
