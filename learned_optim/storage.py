"""How the optimizer keeps its state between steps: in fewer bits than the rule computes with.

The rule reads and writes fp32. A format says what is kept of that:

- "float32": everything.
- "bfloat16": the upper half of the bits, rounded stochastically. Running means that change by less than the last bit at each step would
  stand still if they were rounded to the nearest number; this way they are right on average.
- "int8": blocks of 256 neighbouring coordinates, each with a scale of its own in fp32, rounded stochastically.

The rounding's randomness is a hash of the coordinate and the tensor's clock: the same on every device, in every kernel and after a resume,
and no state of a generator's has to be kept.

Shapes: `n` coordinates of a tensor, `C` numbers for each of them, `B` blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import NetworkConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BLOCK = 256  # coordinates that share a scale
LEVELS = 127.0


class Stored(NamedTuple):
    """A tensor of the optimizer's state."""

    parts: dict[str, tuple[int, ...]]  # what it holds of the rule's state, one after the other, and their leading dimensions
    fmt: str

    @property
    def counts(self) -> list[int]:
        """How many numbers of each part a coordinate has."""
        return [math.prod(leading) for leading in self.parts.values()]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Each part in its shape, (..., n), of (C, n)."""
        parts = rows.split(self.counts)
        return {name: part.view(*leading, -1) for (name, leading), part in zip(self.parts.items(), parts, strict=True)}

    def join(self, state: dict[str, Tensor]) -> Tensor:
        """The way back."""
        return torch.cat([state[name].reshape(count, -1) for name, count in zip(self.parts, self.counts, strict=True)])


def stored(config: NetworkConfig) -> dict[str, Stored]:
    """The tensors that hold the state of coordinates. They are few, since a step of many small parameters is mostly a search for where
    they are."""
    units = (config.hidden_units,)
    return {
        "moments": Stored({"momentum": (), "second_moment": ()}, config.moment_format),
        "lstm": Stored({"hidden": units, "cell": units}, config.lstm_format),
    }


def bytes_per_weight(config: NetworkConfig) -> float:
    """Of the state of a large tensor, beside what a tensor has once."""
    sizes = {fmt: dtype.itemsize + (torch.float32.itemsize / BLOCK if fmt == "int8" else 0) for fmt, dtype in DTYPES.items()}
    return sum(sum(tensor.counts) * sizes[tensor.fmt] for tensor in stored(config).values())


def zeros(param: Tensor, count: int, fmt: str) -> tuple[Tensor, Tensor | None]:
    """Zeros for each coordinate of a parameter in a format, (C, *shape), and their scales, (C, B), where the format has some.

    They are made by `zeros_like`, so that they are placed like the parameter.
    """
    values = torch.stack([torch.zeros_like(param, dtype=DTYPES[fmt], memory_format=torch.contiguous_format)] * count)
    scales = values.new_zeros(count, -(-param.numel() // BLOCK), dtype=torch.float32) if fmt == "int8" else None
    return values, scales


def load(values: Tensor, scales: Tensor | None) -> Tensor:
    """What was stored, in fp32: (C, n)."""
    if scales is None:
        return values.float()
    return values.float() * scales.repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]


def store(new: Tensor, bits: Tensor, values: Tensor, scales: Tensor | None) -> None:
    """Replaces what is stored.

    Args:
        new: (C, n), fp32.
        bits: random integers below 2^16, (C, n).
        values, scales: where it goes, (C, n) and (C, B).
    """
    if scales is not None:
        count = new.shape[-1]
        padded = torch.nn.functional.pad(new, (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
        largest = padded.abs().amax(-1)
        scales.copy_(largest / LEVELS)
        inverse = torch.where(largest > 0, LEVELS / largest, 0.0)
        levels = (padded * inverse[..., None]).flatten(-2)[..., :count]
        values.copy_((levels + bits * 2.0**-16).floor())
    elif values.dtype == torch.bfloat16:
        rounded = (new.contiguous().view(torch.int32) + bits.int()) & -0x10000
        values.copy_(torch.where(new.isfinite(), rounded.view(torch.float32), new))
    else:
        values.copy_(new)


def random_bits(places: Tensor, step: Tensor) -> Tensor:
    """Two independent random integers below 2^16 for each coordinate, (2, n): a hash of its place in the tensor, (n,), and of the tensor's
    clock `step`, ()."""
    x = scatter_bits(places * 0x9E3779B1 + step.long() * 0x85EBCA6B)
    return torch.stack([x & 0xFFFF, x >> 16])


def scatter_bits(x: Tensor) -> Tensor:
    """A hash of the lower 32 bits of integers: lowbias32 (Wellons 2018, "Prospecting for hash functions")."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
