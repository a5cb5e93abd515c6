"""What the optimizer network sees of a gradient, and of a weight before its first step: numbers without units.

None changes when the loss or the weights are multiplied by a constant, so one network serves all losses.

Shapes: `N` coordinates of `K` tensors laid end to end; `...` any leading dimensions (replicas of a model).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Floors of the second moment. The relative one is a share of the tensor's own mean, which keeps the rule scale-free: a coordinate whose
# gradient is 1e-4 of its tensor's is damped, not amplified. The absolute one serves tensors that have seen no gradient at all, and is large
# enough for the derivative of x ** -0.5 there to stay finite in fp32.
RELATIVE_FLOOR = 1e-8
ABSOLUTE_FLOOR = 1e-20

# Bound of the normalised gradient: one outlier batch must not drive the LSTM into saturation.
GRADIENT_BOUND = 3.0

# Of matrices before training: by how much `unevenness` exceeds 1 by chance, at most, times the root of the number of entries; what may be
# above that in any fresh matrix; and what is above that again in one that was surely trained.
SCATTER, FRESH, TRAINED = 2.0, 0.03, 0.1
SURELY = 0.5  # how far a matrix must look trained to count as such, where it has to be the one or the other

ODD, EVEN = 2, 3  # how many features change sign with the gradient, and how many do not


CONSTANTS = 8  # of numbers that all tensors of a layout have, as a learning rate, that are kept
LAYOUTS = 256  # that are kept, since an optimizer may have been made for each parameter of a model


class Layout:
    """Where each tensor lies among the coordinates, and what its shape says about it.

    Torch keeps a layer's outputs in the first dimension: a weight of shape (fan_out, ...) is a matrix fan_out x fan_in, convolution kernels
    flattened. A vector has a fan-in of 1. Where a tensor is *stacked*, such as the weights of experts (..., fan_out, fan_in), each of its
    last two dimensions' matrices is one of its own. A *table* has a row for each of many words, most of which have no gradient in a step.
    A *matrix* is what has both fans above 1 and is no table. It is *fresh* where it did not look trained before its first step. What is
    *plain* keeps the length of its direction: tables, and matrices that are not fresh.

    Args:
        stacked: which tensors are; none where it is empty.
        matrices: how many matrices the model of each tensor has, which may be more than are here; None for as many as are here, and for all
            tensors where it is empty.
        tables: which tensors are tables; none where it is empty.
        trained: which tensors looked trained before their first step, see `looks_trained`; none where it is empty.
    """

    def __init__(
        self,
        shapes: tuple[torch.Size, ...],
        device: torch.device,
        stacked: tuple[bool, ...] = (),
        matrices: tuple[int | None, ...] = (),
        tables: tuple[bool, ...] = (),
        trained: tuple[bool, ...] = (),
    ) -> None:
        self.shapes, self.device = shapes, device
        self.stacked, self.matrices = stacked or (False,) * len(shapes), matrices or (None,) * len(shapes)
        self.tables, self.trained = tables or (False,) * len(shapes), trained or (False,) * len(shapes)
        self._constants: dict[float, Tensor] = {}
        self.sizes = [shape.numel() for shape in shapes]
        self.counts = self.sizes  # of whole tensors, of which a process may hold parts, see `learned_optim.sharding`
        self.fans = [(shape[0], math.prod(shape[1:])) if len(shape) > 1 else (shape.numel(), 1) for shape in shapes]
        # How many matrices a tensor is a stack of; none where it is not stacked.
        self.stacks: list[tuple[int, ...]] = [()] * len(shapes)
        for k, shape in enumerate(shapes):
            if self.stacked[k] and len(shape) > 2:
                self.fans[k], self.stacks[k] = (shape[-2], shape[-1]), (math.prod(shape[:-2]),)
        self.is_matrix = [min(fans) > 1 and not table for fans, table in zip(self.fans, self.tables, strict=True)]
        self.is_fresh_matrix = [matrix and not known for matrix, known in zip(self.is_matrix, self.trained, strict=True)]
        self.plain = [min(fans) > 1 and not fresh for fans, fresh in zip(self.fans, self.is_fresh_matrix, strict=True)]

    @staticmethod
    @functools.lru_cache(maxsize=LAYOUTS)
    def of(
        shapes: tuple[torch.Size, ...],
        device: torch.device,
        stacked: tuple[bool, ...] = (),
        matrices: tuple[int | None, ...] = (),
        tables: tuple[bool, ...] = (),
        trained: tuple[bool, ...] = (),
    ) -> Layout:
        """The layout of these tensors; the same object each time."""
        return Layout(shapes, device, stacked, matrices, tables, trained)

    def of_some(self, members: Sequence[int]) -> Layout:
        """The layout of some of the tensors, which goes on counting the matrices of all."""
        total = self.count_matrices()
        every = self.shapes, self.stacked, self.tables, self.trained
        shapes, stacked, tables, trained = (tuple(each[k] for k in members) for each in every)
        return Layout.of(shapes, self.device, stacked, tuple(self.matrices[k] or max(1, total) for k in members), tables, trained)

    def count_matrices(self) -> int:
        return sum(math.prod(stack) for stack, matrix in zip(self.stacks, self.is_matrix, strict=True) if matrix)

    def blocks(self, size: int) -> list[Block]:
        """The coordinates in blocks of about `size`. A large tensor has blocks of its own, so that within them what belongs to a tensor is
        the same everywhere; small neighbours share one."""
        blocks: list[Block] = []
        begin, first = 0, 0
        for k, (end, length) in enumerate(zip(itertools.accumulate(self.sizes), self.sizes, strict=True)):
            if length >= size and begin < end - length:  # what came before is a block
                blocks.append(Block(self, begin, end - length, first, k))
                begin, first = end - length, k
            if end - begin >= size or k == len(self.sizes) - 1:
                count = max(1, round((end - begin) / size)) if first == k else 1
                borders = [begin + (end - begin) * part // count for part in range(count + 1)]
                blocks += [Block(self, low, high, first, k + 1) for low, high in itertools.pairwise(borders)]
                begin, first = end, k + 1
        return blocks

    def per_tensor(self, numbers: Sequence[float | Tensor]) -> Tensor:
        """Numbers that tensors have once, (K,), in fp32. They go to the device as arguments of its kernels, one for a run of equal ones: a
        copy would make the host wait for a GPU, and a CUDA graph could not hold it."""
        if not isinstance(numbers[0], Tensor) and len(set(map(id, numbers))) == 1:  # one group, as nearly always, and worth being quick
            return self._constant(float(numbers[0]))
        same = [list(run) for _, run in itertools.groupby(numbers, id)]  # a group's are one object, which is quick to see
        parts = []
        for _, equal in itertools.groupby(same, lambda run: id(run[0]) if isinstance(run[0], Tensor) else run[0]):
            number, *others = itertools.chain.from_iterable(equal)
            if isinstance(number, Tensor) and number.device == self.device:
                parts.append(number.float().expand(1 + len(others)))
            else:
                parts.append(torch.full((1 + len(others),), float(number), dtype=torch.float32, device=self.device))
        return torch.cat(parts)

    def _constant(self, number: float) -> Tensor:
        """The number for each tensor, (K,), which nobody may change: on a CPU it is kept, since to make it takes longer than to find it. On
        a GPU it might belong to a graph that is being captured."""
        known = self._constants.get(number)
        if known is None:
            known = torch.full((len(self.shapes),), number, dtype=torch.float32, device=self.device)
            # One that was made while tracing, or in inference mode, would serve nobody else.
            if known.is_cpu and type(known) is Tensor and not known.is_inference():
                if len(self._constants) >= CONSTANTS:
                    self._constants.clear()
                self._constants[number] = known
        return known

    @functools.cached_property
    def is_plain(self) -> Tensor:
        """`plain` as numbers, (K,)."""
        return self.per_tensor(self.plain)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each tensor: (..., N) -> (..., K)."""
        return torch.stack([part.mean(-1) for part in values.split(self.sizes, -1)], -1)

    def means(self, values: Sequence[Tensor]) -> Tensor:
        """`mean` of several, (len(values), ..., K)."""
        return torch.stack([self.mean(each) for each in values])

    def mean_squares(self, values: Sequence[Tensor], members: Sequence[int]) -> list[Tensor]:
        """Of some tensors, each (..., 1), of all of them, each (..., n)."""
        return [values[k].square().mean(-1, keepdim=True) for k in members]

    def places(self, k: int) -> Tensor:
        """Which coordinates of a tensor are here, (n,)."""
        return torch.arange(self.sizes[k], device=self.device)

    def looks_trained(self, params: Tensor) -> Tensor:
        """Which tensors look as if they had been trained before, from 0 to 1, and -1 where that cannot be seen: (..., N) -> (..., K)."""
        looks = []
        for part, (fan_out, fan_in), stack in zip(params.split(self.sizes, -1), self.fans, self.stacks, strict=True):
            if fan_in > 1 and fan_out > 0:
                uneven = unevenness(part.unflatten(-1, (*stack, fan_out, fan_in)))
                uneven = uneven.mean(-1) if stack else uneven
                excess = (uneven - 1 - FRESH - SCATTER / math.sqrt(fan_out * fan_in)) / TRAINED
                looks.append(torch.where(excess > 0, excess.clamp(max=1), 0))  # 0 also where a weight is not finite
            else:
                looks.append(params.new_full(params.shape[:-1], -1))
        return torch.stack(looks, -1)

    def spread(self, values: Tensor) -> Tensor:
        """Each tensor's value at each of its coordinates: (..., K) -> (..., N)."""
        return spread(values, self.sizes)


def spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    # Not index_select: its derivative, index_add, is an order of magnitude slower than sums over stretches.
    each = zip(values.split(1, -1), sizes, strict=True)
    return torch.cat([value.expand(*value.shape[:-1], size) for value, size in each], -1)


class Block(NamedTuple):
    """Neighbouring coordinates, of tensors `first` to `last`."""

    layout: Layout
    begin: int
    end: int
    first: int
    last: int

    def spread(self, values: Tensor) -> Tensor:
        """Each tensor's value at the block's coordinates: (..., K) -> (..., n), or (..., 1) where that is one value for all."""
        if self.last - self.first == 1:
            return values[..., self.first : self.last]
        return spread(values[..., self.first : self.last], self.layout.sizes[self.first : self.last])


class CoordinateFeatures(NamedTuple):
    """Inputs of the coordinate-wise LSTM, split by what a flip of the gradient's sign does to them."""

    odd: Tensor  # (2, ..., N): normalised momentum, normalised gradient; they change sign
    even: Tensor  # (3, ..., N): their sizes, and the coordinate's share of its tensor's second moment; they do not


def coordinate_features(grad: Tensor, momentum: Tensor, second_moment: Tensor, mean: Tensor) -> CoordinateFeatures:
    """Features of each coordinate.

    Args:
        grad, momentum, second_moment: the gradient and the bias-corrected running means of it and of its square, (..., N).
        mean: each tensor's mean of `second_moment` at its coordinates, (..., N) or (..., 1).
    """
    variance = second_moment + RELATIVE_FLOOR * mean + ABSOLUTE_FLOOR
    scale = variance.rsqrt()
    slow = momentum * scale
    gradient = grad * scale
    fast = gradient * (1 + (gradient / GRADIENT_BOUND).square()).rsqrt()
    share = (variance / (mean + ABSOLUTE_FLOOR)).log() / 8
    return CoordinateFeatures(torch.stack([slow, fast]), torch.stack([slow.abs(), fast.abs(), share]))


def unevenness(matrix: Tensor) -> Tensor:
    """How much some singular values exceed others: (..., m, n) -> (...).

    The sum of their fourth powers, over what it is on average where entries are independent, have no mean and one variance,
    `m n (m + n)` times the variance squared (Marchenko & Pastur 1967). So it is 1 in a matrix that was drawn, whatever its scale, 1/2 in a
    square orthogonal one, and up to `min(m, n)` where training has made a few singular values large.
    """
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    rows, columns = wide.shape[-2:]
    wide = wide * (wide.square().mean((-2, -1), keepdim=True) + ABSOLUTE_FLOOR).rsqrt()
    return (wide @ wide.mT).square().sum((-2, -1)) / (rows * columns * (rows + columns))


def cosine(products: Tensor) -> Tensor:
    """The cosine of the angle between each tensor's gradient and its momentum before that gradient, (..., K).

    Up to scale it is the hypergradient of the step size (Baydin et al. 2018, "Online learning rate adaptation with hypergradient descent"):
    positive while the steps are too short, negative once they overshoot.

    Args:
        products: means of the squared gradient, of the squared momentum and of the product of the two, (3, ..., K).
    """
    grad_square, momentum_square, product = products
    cosine: Tensor = product * (grad_square + ABSOLUTE_FLOOR).rsqrt() * (momentum_square + ABSOLUTE_FLOOR).rsqrt()
    return cosine
