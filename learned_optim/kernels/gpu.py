"""The update rule on a GPU, in place: passes over coordinates in Triton, all that tensors have once in torch.

As on a CPU (`learned_optim.kernels.cpu`), one pass adds up what the step sizes depend on, a second one updates the moments and runs the
LSTM, a third one changes the parameters. Each is one launch for all tensors of a device, however many: a table says where each tensor
lies, and a second one which stretch of which tensor a program does.

A tensor whose sums are not finite is *left out*: nothing of it is written, and in what all tensors have together it counts as one whose
gradient is zero. The host does not know of it; a counter on the device does.

Nothing here waits for the device or, once the tables are there, copies to it, so that steps can be captured in CUDA graphs.

Importing this module imports Triton. With TRITON_INTERPRET=1 set before that, Triton's interpreter runs the kernels, on a CPU's tensors
too.

Shapes: as in `learned_optim.rule`; `B` blocks. A block's coordinates are (ROWS, GROUP) in the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import features, storage
from ..checks import Ledger
from ..config import FORMATS
from ..features import BUCKETS, EVEN, ODD, Layout
from ..network import OptimizerNetwork
from ..rule import (
    ADAMW_UPDATE_RMS,
    CONTROL,
    LEAST_SHRINKAGE,
    Clock,
    Control,
    State,
    follow,
    is_orthogonal,
    orthogonalize_all,
    step_sizes,
    vector_scale,
)
from . import SCALARS, scalars

BLOCK = 1024  # coordinates of a program
MAX_UNITS = 8  # as on a CPU; more would not fit into registers
ALIGNMENT = 16  # bytes that a thread loads at once
KEPT_TABLES = 8  # of an optimizer, whose gradients may lie at a few places in turn
INTERPRETED = triton.knobs.runtime.interpret

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters and gradients that the kernels read
MATRIX_DTYPE = torch.bfloat16  # that matrices are orthogonalised in, as in Muon

# Columns of the table of tensors. Names in capitals with an underscore are constants that kernels see.
PLACES = ("moments", "lstm", "lstm_scale", "direction")
FIELDS = ("size", "aligned", "orthogonal", "first", "control", "param", "param_type", "grad", "grad_type", *PLACES)
_COLUMNS = tl.constexpr(len(FIELDS))
_CONTROLS, _BUCKETS = tl.constexpr(CONTROL), tl.constexpr(BUCKETS)
_CONTROL, _SIZE, _ALIGNED, _FIRST, _PARAM, _PARAM_TYPE, _GRAD, _GRAD_TYPE = (
    tl.constexpr(FIELDS.index(name)) for name in ("control", "size", "aligned", "first", "param", "param_type", "grad", "grad_type")
)
_MOMENTS, _LSTM, _LSTM_SCALE, _DIRECTION = (tl.constexpr(FIELDS.index(name)) for name in PLACES)

_FLOAT32, _BFLOAT16, _INT8 = map(tl.constexpr, range(len(FORMATS)))
_ALIGNMENT, _BLOCK, _GROUP, _ROWS = (tl.constexpr(n) for n in (ALIGNMENT, BLOCK, storage.BLOCK, BLOCK // storage.BLOCK))
_LEVELS, _ODD, _EVEN = tl.constexpr(storage.LEVELS), tl.constexpr(ODD), tl.constexpr(EVEN)
_RELATIVE_FLOOR, _ABSOLUTE_FLOOR = tl.constexpr(features.RELATIVE_FLOOR), tl.constexpr(features.ABSOLUTE_FLOOR)
_GRADIENT_BOUND, _LEAST_SHRINKAGE, _SCALARS = tl.constexpr(features.GRADIENT_BOUND), tl.constexpr(LEAST_SHRINKAGE), tl.constexpr(SCALARS)


def trouble(network: OptimizerNetwork, device: torch.device) -> str | None:
    """Why the kernels cannot run this network on this device, or None."""
    if network.config.hidden_units > MAX_UNITS:
        return f"the Triton kernel runs networks of up to {MAX_UNITS} hidden units, and this one has {network.config.hidden_units}."
    if device.type != "cuda" and not INTERPRETED:
        return f"the Triton kernel runs on CUDA devices, and a parameter is on {device}."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the Triton kernel needs a GPU of compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} is older."
    return None


class Tables(NamedTuple):
    """Where the tensors lie, on their device."""

    tensors: Tensor  # (K, FIELDS)
    blocks: Tensor  # (B, 2): its tensor, and which of the tensor's blocks it is
    sizes: Tensor  # (K,)
    orthogonal: Tensor  # (K,)

    @staticmethod
    def of(layout: Layout, numbers: tuple[int, ...], kept: dict[Any, Any]) -> Tables:
        """The tables of tensors with these entries, (K * FIELDS,): the same ones each time, so that a step uploads nothing; `kept` are the
        optimizer's last ones.

        A CUDA graph gets tables of its own, which it fills at each replay. So it needs none that may be dropped, and leaves none that are
        empty until then.
        """
        capturing = layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            return Tables.make(layout, numbers, upload_by_kernels)
        if (layout, numbers) not in kept:
            if len(kept) == KEPT_TABLES:
                del kept[next(iter(kept))]
            kept[layout, numbers] = Tables.make(layout, numbers, upload)
        tables: Tables = kept[layout, numbers]
        return tables

    @staticmethod
    def make(layout: Layout, numbers: tuple[int, ...], upload: Any) -> Tables:
        tensors = upload(numbers, layout.device).view(-1, len(FIELDS))
        sizes, first, orthogonal = (tensors[:, FIELDS.index(name)].contiguous() for name in ("size", "first", "orthogonal"))
        block = torch.arange(sum(map(block_count, layout.sizes)), device=layout.device)
        tensor = torch.searchsorted(first, block, right=True) - 1
        return Tables(tensors, torch.stack([tensor, block - first[tensor]], -1).int(), sizes.float(), orthogonal > 0)


def block_count(size: int) -> int:
    return -(-size // BLOCK)


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers, (n,), by a copy that nobody waits for."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def upload_by_kernels(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers, (n,), as arguments of kernels: slower, but the host's memory need not outlive the call."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(numbers))
    return table


def step(
    network: OptimizerNetwork,
    layout: Layout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    total_steps: Tensor,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    ledger: Ledger,
) -> None:
    """One step of the rule, see `learned_optim.optimizer.reference_step`."""
    config, lstm, count = network.config, network.coordinate, len(params)
    flat = [grad.contiguous() if grad.dtype in DTYPES else grad.float().contiguous() for grad in grads]
    fused = [param.dtype in DTYPES and param.is_contiguous() for param in params]
    padded = [size + -size % ALIGNMENT for size in layout.sizes]  # so that each tensor's directions are aligned
    numbers = tuple(table(layout, is_orthogonal(layout, config), params, fused, flat, states, padded))
    ledger.check_places(state_places(numbers), params, states)
    directions = params[0].new_empty(sum(padded), dtype=torch.float32)
    moment_format, lstm_format = FORMATS.index(config.moment_format), FORMATS.index(config.lstm_format)

    with torch.cuda.device_of(directions):  # Triton launches on the current one
        tables = Tables.of(layout, numbers, ledger.memory)
        blocks, every = (len(tables.blocks),), (count,)
        rows = directions.new_empty(CONTROL, count)
        means, sums = directions.new_empty(2 * BUCKETS, count), directions.new_empty(len(tables.blocks), 2 * BUCKETS)
        finite = directions.new_empty(count)
        _gather[every](tables.tensors, rows, count)
        control = Control.of(rows)
        clocks = control.step
        _moments[blocks](tables.tensors, tables.blocks, sums, config.second_moment, moment_format)
        _means[every](tables.tensors, sums, means, count, 4)
        _judge[every](means, finite, ledger.skipped, count)

        clock = Clock.after(clocks, means[3], config)
        step_size, steady, inertia, control = step_sizes(network, clock, means[:3], control, total_steps)
        weights = lstm.gate_weight, lstm.gate_bias, lstm.candidate_weight, lstm.skip, lstm.out
        of_network = *weights, config.momentum, config.second_moment, config.hidden_units, moment_format, lstm_format
        of_tensors = clocks, finite, scalars(clock, steady, inertia)
        _directions[blocks](tables.tensors, tables.blocks, *of_tensors, directions, sums, *of_network)
        _means[every](tables.tensors, sums, means, count, 1)

        mean_square = means[0]
        gain = torch.where(tables.orthogonal, 1.0, vector_scale(network, mean_square, layout.is_table))
        scale = step_size * gain
        parts = [part[:size] for part, size in zip(directions.split(padded), layout.sizes, strict=True)]
        for k, matrix in orthogonalize_all(parts, layout, config, MATRIX_DTYPE):
            parts[k].copy_(matrix)
        if any(weight_decay) and any(is_orthogonal(layout, config)):
            mean_square = torch.stack(torch._foreach_norm(parts)).square() / tables.sizes
        rate = layout.per_tensor(lr)
        shrink = rate * layout.per_tensor(weight_decay) * scale * mean_square.sqrt() / ADAMW_UPDATE_RMS
        factors = torch.stack([shrink, -rate * scale])
        _apply[blocks](tables.tensors, tables.blocks, finite, directions, factors, sums, count)
        _means[every](tables.tensors, sums, means, count, 2 * BUCKETS)
        control = follow(control, clock, means[:BUCKETS] * gain * tables.sizes.sqrt(), means[BUCKETS] * gain.square())
        _scatter[every](tables.tensors, finite, control.rows(), count)
    for k in itertools.compress(range(count), (not fuse for fuse in fused)):
        params[k].add_(factors[1, k] * parts[k].view(params[k].shape) - factors[0, k] * params[k])


def table(
    layout: Layout,
    orthogonal: Sequence[bool],
    params: Sequence[Tensor],
    fused: Sequence[bool],
    grads: Sequence[Tensor],
    states: Sequence[State],
    padded: Sequence[int],
) -> list[int]:
    """The tensors' entries, one after the other; a parameter that the kernels leave to torch is at 0."""
    numbers: list[int] = []
    first, direction = 0, 0
    for k, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        size = layout.sizes[k]
        pointers = [param.data_ptr() if fused[k] else 0, grad.data_ptr()]
        stored = [state[key].data_ptr() for key in ("moments", "lstm")]
        aligned = not any(number % ALIGNMENT for number in (size, *pointers, *stored))
        numbers += [size, aligned, orthogonal[k], first, state["control"].data_ptr()]
        numbers += [pointers[0], DTYPES.index(param.dtype) if fused[k] else 0, pointers[1], DTYPES.index(grad.dtype)]
        numbers += [*stored, state["lstm_scale"].data_ptr() if "lstm_scale" in state else 0, direction]
        first += block_count(size)
        direction += padded[k]
    return numbers


def state_places(numbers: Sequence[int]) -> list[int]:
    """The addresses of the tensors' state among their entries."""
    columns = [FIELDS.index(name) for name in ("control", *PLACES[:3])]
    return [numbers[row + column] for row in range(0, len(numbers), len(FIELDS)) for column in columns]


@triton.jit
def _at(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer of an address that is a multiple of ALIGN, which says how much a thread may load at once."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _gather(tensors, rows, count):
    """What each tensor has once into rows, (CONTROL, K)."""
    k, i = tl.program_id(0), tl.arange(0, 2 * _BUCKETS)  # a power of two, and enough
    control = _at(tl.load(tensors + k * _COLUMNS + _CONTROL), tl.float32, 4)
    tl.store(rows + i * count + k, tl.load(control + i, mask=i < _CONTROLS), mask=i < _CONTROLS)


@triton.jit
def _scatter(tensors, finite, rows, count):
    """The way back, of tensors that are not left out."""
    k, i = tl.program_id(0), tl.arange(0, 2 * _BUCKETS)
    control = _at(tl.load(tensors + k * _COLUMNS + _CONTROL), tl.float32, 4)
    if tl.load(finite + k) != 0:
        tl.store(control + i, tl.load(rows + i * count + k, mask=i < _CONTROLS), mask=i < _CONTROLS)


@triton.jit
def _judge(means, finite, skipped, count):
    """Whether each tensor's means of the first pass are finite, 1 or 0; where they are not, they become zero, and the tensor is counted."""
    k, column = tl.program_id(0), tl.arange(0, 4)
    found = tl.load(means + column * count + k)
    fine = tl.min(tl.where(tl.abs(found) < float("inf"), 1, 0), 0)
    tl.store(means + column * count + k, tl.where(fine != 0, found, 0.0))
    tl.store(finite + k, fine.to(tl.float32))
    if fine == 0:
        tl.atomic_add(skipped, 1)


@triton.jit
def _means(tensors, sums, means, count, COLUMNS: tl.constexpr):
    """Means over each tensor of its blocks' sums, (B, COLUMNS) -> (COLUMNS, K), added in one order."""
    k = tl.program_id(0)
    row = tensors + k * _COLUMNS
    size, first = tl.load(row + _SIZE), tl.load(row + _FIRST)
    blocks, column = tl.cdiv(size, _BLOCK), tl.arange(0, COLUMNS)
    total = tl.zeros((256, COLUMNS), tl.float64)
    for begin in range(0, blocks, 256):
        block = begin + tl.arange(0, 256)[:, None]
        total += tl.load(sums + (first + block) * COLUMNS + column[None, :], mask=block < blocks, other=0.0).to(tl.float64)
    tl.store(means + column * count + k, (tl.sum(total, 0) / size.to(tl.float64)).to(tl.float32))


@triton.jit
def _block(tensors, blocks):
    """This program's tensor and its row in the table; the block's groups, (ROWS, 1), and coordinates, (ROWS, GROUP)."""
    entry = blocks + 2 * tl.program_id(0)
    k = tl.load(entry)
    groups = tl.load(entry + 1).to(tl.int64) * _ROWS + tl.arange(0, _ROWS)[:, None]
    return k, tensors + k * _COLUMNS, groups, groups * _GROUP + tl.arange(0, _GROUP)[None, :]


@triton.jit
def _random_bits(offsets, step):
    """See `learned_optim.storage.random_bits`; the two integers are the lower and the upper half."""
    return _scatter_bits(offsets.to(tl.uint32) * 0x9E3779B1 + step.to(tl.int64).to(tl.uint32) * 0x85EBCA6B)


@triton.jit
def _scatter_bits(x):
    """See `learned_optim.storage.scatter_bits`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _load(row, KEY: tl.constexpr, SCALE: tl.constexpr, unit, size, groups, offsets, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """State that is stored of a unit, in fp32."""
    address, place, mask = tl.load(row + KEY), unit * size + offsets, offsets < size
    if FORMAT == _FLOAT32:
        values = tl.load(_at(address, tl.float32, ALIGN) + place, mask=mask, other=0.0)
    elif FORMAT == _BFLOAT16:
        values = tl.load(_at(address, tl.bfloat16, ALIGN) + place, mask=mask, other=0.0).to(tl.float32)
    else:
        scales = _at(tl.load(row + SCALE), tl.float32, 4) + unit * tl.cdiv(size, _GROUP) + groups
        levels = tl.load(_at(address, tl.int8, ALIGN) + place, mask=mask, other=0)
        values = levels.to(tl.float32) * tl.load(scales, mask=groups * _GROUP < size, other=0.0)
    return values


@triton.jit
def _rounded(new, bits, FORMAT: tl.constexpr):
    """What is left of values once they are stored in fp32 or bfloat16, in fp32, rounded as in `_store`."""
    if FORMAT == _BFLOAT16:
        exact = new.to(tl.uint32, bitcast=True)
        finite = (exact & 0x7F800000) != 0x7F800000
        new = ((exact + tl.where(finite, bits, 0)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return new


@triton.jit
def _store(row, KEY: tl.constexpr, SCALE: tl.constexpr, unit, size, groups, offsets, new, bits, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """Stores values, rounded stochastically by `bits`, integers below 2^16; see `learned_optim.storage.store`."""
    address, place, mask = tl.load(row + KEY), unit * size + offsets, offsets < size
    if FORMAT == _FLOAT32:
        tl.store(_at(address, tl.float32, ALIGN) + place, new, mask=mask)
    elif FORMAT == _BFLOAT16:
        rounded = _rounded(new, bits, FORMAT).to(tl.uint32, bitcast=True) >> 16
        tl.store(_at(address, tl.uint16, ALIGN) + place, rounded.to(tl.uint16), mask=mask)
    else:
        largest = tl.max(tl.where(mask, tl.abs(new), 0.0), 1, keep_dims=True)
        scales = _at(tl.load(row + SCALE), tl.float32, 4) + unit * tl.cdiv(size, _GROUP) + groups
        tl.store(scales, largest / _LEVELS, mask=groups * _GROUP < size)
        inverse = _LEVELS / tl.where(largest > 0, largest, 1.0)
        levels = tl.floor(new * inverse + bits.to(tl.float32) * (1 / 65536))
        levels = tl.where(levels == levels, levels, 0.0)  # NaN stays in the moments and in the direction
        levels = tl.minimum(levels, _LEVELS)  # a GPU's division is off by up to two bits
        tl.store(_at(address, tl.int8, ALIGN) + place, levels.to(tl.int8), mask=mask)


@triton.jit
def _load_gradient(row, offsets, mask, ALIGN: tl.constexpr):
    address, kind = tl.load(row + _GRAD), tl.load(row + _GRAD_TYPE)
    if kind == 0:
        grad = tl.load(_at(address, tl.float32, ALIGN) + offsets, mask=mask, other=0.0)
    elif kind == 1:
        grad = tl.load(_at(address, tl.bfloat16, ALIGN) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        grad = tl.load(_at(address, tl.float16, ALIGN) + offsets, mask=mask, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _moments(tensors, blocks, sums, decay2, FORMAT: tl.constexpr):
    """Sums of step 1 of the rule: of squared gradients, of squared momenta before, of their products, and of new second moments. Nothing of
    a tensor is written yet."""
    _, row, groups, offsets = _block(tensors, blocks)
    if tl.load(row + _ALIGNED) != 0:
        _moments_of(row, groups, offsets, sums, decay2, FORMAT, _ALIGNMENT)
    else:
        _moments_of(row, groups, offsets, sums, decay2, FORMAT, 1)


@triton.jit
def _moments_of(row, groups, offsets, sums, decay2, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    size = tl.multiple_of(tl.load(row + _SIZE), ALIGN)
    mask = offsets < size
    grad = _load_gradient(row, offsets, mask, ALIGN)
    before = _load(row, _MOMENTS, 0, 0, size, groups, offsets, FORMAT, ALIGN)
    second_moment = _load(row, _MOMENTS, 0, 1, size, groups, offsets, FORMAT, ALIGN)
    second_moment += (1.0 - decay2) * (grad * grad - second_moment)
    sums += 4 * tl.program_id(0)  # what is masked is zero in all four
    tl.store(sums, tl.sum(grad * grad))
    tl.store(sums + 1, tl.sum(before * before))
    tl.store(sums + 2, tl.sum(grad * before))
    tl.store(sums + 3, tl.sum(second_moment))


@triton.jit
def _dot(weights, values):
    total = tl.load(weights) * values[0]
    for i in tl.static_range(1, len(values)):
        total += tl.load(weights + i) * values[i]
    return total


@triton.jit
def _tanh(x):
    """Odd to the last bit, relative error 2e-6: the fit of `coordinate.c`."""
    x = tl.minimum(tl.maximum(x, -7.0), 7.0)
    s = x * x
    p = ((3.995905259e-6 * s + 2.293097681e-3) * s + 1.232206542e-1) * s + 9.999989669e-1
    q = ((1.439853416e-4 * s + 2.115165731e-2) * s + 4.565462535e-1) * s + 1.0
    return x * p / q


@triton.jit
def _directions(
    tensors,
    blocks,
    clocks,
    finite,
    scalars,
    directions,
    sums,
    gate_weight,
    gate_bias,
    candidate_weight,
    skip,
    out,
    decay1,
    decay2,
    UNITS: tl.constexpr,
    MOMENTS: tl.constexpr,
    LSTM: tl.constexpr,
):
    """Steps 1 and 3 of the rule, and the sum of squared directions; zeros for tensors that are left out.

    scalars: see `learned_optim.kernels.scalars`.
    """
    k, row, groups, offsets = _block(tensors, blocks)
    weights = gate_weight, gate_bias, candidate_weight, skip, out
    step, scalars, decays = tl.load(clocks + k), scalars + _SCALARS * k, (decay1, decay2)
    if tl.load(finite + k) == 0:
        tl.store(
            directions + tl.load(row + _DIRECTION) + offsets, tl.zeros_like(offsets).to(tl.float32), mask=offsets < tl.load(row + _SIZE)
        )
        tl.store(sums + tl.program_id(0), 0.0)
    elif tl.load(row + _ALIGNED) != 0:
        _directions_of(row, groups, offsets, step, scalars, directions, sums, weights, decays, UNITS, MOMENTS, LSTM, _ALIGNMENT)
    else:
        _directions_of(row, groups, offsets, step, scalars, directions, sums, weights, decays, UNITS, MOMENTS, LSTM, 1)


@triton.jit
def _directions_of(
    row,
    groups,
    offsets,
    step,
    scalars,
    directions,
    sums,
    weights,
    decays,
    UNITS: tl.constexpr,
    MOMENTS: tl.constexpr,
    LSTM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    gate_weight, gate_bias, candidate_weight, skip, out = weights
    size = tl.multiple_of(tl.load(row + _SIZE), ALIGN)
    mask = offsets < size
    grad = _load_gradient(row, offsets, mask, ALIGN)
    bits = _random_bits(offsets, step)
    momentum = _load(row, _MOMENTS, 0, 0, size, groups, offsets, MOMENTS, ALIGN)
    second_moment = _load(row, _MOMENTS, 0, 1, size, groups, offsets, MOMENTS, ALIGN)
    momentum += (1.0 - decays[0]) * (grad - momentum)
    second_moment += (1.0 - decays[1]) * (grad * grad - second_moment)
    _store(row, _MOMENTS, 0, 0, size, groups, offsets, momentum, bits & 0xFFFF, MOMENTS, ALIGN)
    _store(row, _MOMENTS, 0, 1, size, groups, offsets, second_moment, bits >> 16, MOMENTS, ALIGN)
    momentum = _rounded(momentum, bits & 0xFFFF, MOMENTS) * tl.load(scalars)
    second_moment = _rounded(second_moment, bits >> 16, MOMENTS) * tl.load(scalars + 1)
    mean, share, portion, kept = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
    steady, inertia = tl.load(scalars + 6), tl.load(scalars + 7)

    variance = second_moment + (_RELATIVE_FLOOR * mean + _ABSOLUTE_FLOOR)
    scale = tl.rsqrt(variance)
    slow, gradient = momentum * scale, grad * scale
    bounded = gradient / _GRADIENT_BOUND
    fast = steady * gradient * tl.rsqrt(1.0 + bounded * bounded)
    of_tensor = tl.log(variance / (mean + _ABSOLUTE_FLOOR)) * 0.125
    odd, even = (slow, fast), (tl.abs(slow), tl.abs(fast), of_tensor)
    for h in tl.static_range(UNITS):
        unit = _load(row, _LSTM, _LSTM_SCALE, h, size, groups, offsets, LSTM, ALIGN)
        odd, even = odd + (unit,), even + (tl.abs(unit),)  # type: ignore[assignment]  # noqa: RUF005  Triton knows no unpacking

    direction = tl.load(skip) * slow + tl.load(skip + 1) * fast
    for h in tl.static_range(UNITS):
        gate_in = tl.sigmoid(tl.load(gate_bias + h) + _dot(gate_weight + h * (_EVEN + UNITS), even))
        gate_forget = tl.sigmoid(tl.load(gate_bias + UNITS + h) + _dot(gate_weight + (UNITS + h) * (_EVEN + UNITS), even))
        gate_out = tl.sigmoid(tl.load(gate_bias + 2 * UNITS + h) + _dot(gate_weight + (2 * UNITS + h) * (_EVEN + UNITS), even))
        candidate = _tanh(_dot(candidate_weight + h * (_ODD + UNITS), odd))
        cell = _load(row, _LSTM, _LSTM_SCALE, UNITS + h, size, groups, offsets, LSTM, ALIGN)
        cell = gate_forget * cell + gate_in * candidate
        hidden = gate_out * _tanh(cell)
        direction += tl.load(out + h) * hidden
        _store(row, _LSTM, _LSTM_SCALE, h, size, groups, offsets, hidden, bits & 0xFFFF, LSTM, ALIGN)
        _store(row, _LSTM, _LSTM_SCALE, UNITS + h, size, groups, offsets, cell, bits >> 16, LSTM, ALIGN)
    drift = _load(row, _LSTM, _LSTM_SCALE, 2 * UNITS, size, groups, offsets, LSTM, ALIGN)
    shrinkage = tl.sqrt(tl.maximum(1.0 - share * gradient * gradient, _LEAST_SHRINKAGE * _LEAST_SHRINKAGE))
    drift = kept * shrinkage * drift + portion * gradient
    direction += inertia * drift
    _store(row, _LSTM, _LSTM_SCALE, 2 * UNITS, size, groups, offsets, drift, bits & 0xFFFF, LSTM, ALIGN)
    directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT)
    tl.store(directions + offsets, direction, mask=mask)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(mask, direction * direction, 0.0)))


@triton.jit
def _apply(tensors, blocks, finite, directions, factors, sums, count):
    """The rest of steps 4 and 5, and weight decay: parameters lose the share `shrink` and get `scale` times the direction. Its sums are the
    direction's sketch, see `learned_optim.features.Layout.sketch`, and its square.

    factors: each tensor's shrink, then each one's scale.
    """
    k, row, _, offsets = _block(tensors, blocks)
    _sketch(row, offsets, directions, sums + 2 * _BUCKETS * tl.program_id(0))
    shrink, scale = tl.load(factors + k), tl.load(factors + count + k)
    if tl.load(finite + k) != 0:
        if tl.load(row + _ALIGNED) != 0:
            _apply_to(row, offsets, directions, shrink, scale, _ALIGNMENT)
        else:
            _apply_to(row, offsets, directions, shrink, scale, 1)


@triton.jit
def _sketch(row, offsets, directions, sums):
    directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT)
    direction = tl.load(directions + offsets, mask=offsets < tl.load(row + _SIZE), other=0.0)
    sign = (_scatter_bits((offsets // _BUCKETS).to(tl.uint32) * 0x9E3779B1) & 1).to(tl.float32) * 2.0 - 1.0
    buckets = tl.sum(tl.reshape(sign * direction, (_BLOCK // _BUCKETS, _BUCKETS)), 0)
    tl.store(sums + tl.arange(0, _BUCKETS), buckets)
    # The square has a row of zeros beside it, since the number of columns is a power of two.
    bucket = tl.arange(0, _BUCKETS)
    tl.store(sums + _BUCKETS + bucket, tl.where(bucket == 0, tl.sum(direction * direction), 0.0))


@triton.jit
def _apply_to(row, offsets, directions, shrink, scale, ALIGN: tl.constexpr):
    mask = offsets < tl.multiple_of(tl.load(row + _SIZE), ALIGN)
    address, kind = tl.load(row + _PARAM), tl.load(row + _PARAM_TYPE)
    directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT)
    if address != 0:
        change = scale * tl.load(directions + offsets, mask=mask, other=0.0)
        if kind == 0:
            _add(_at(address, tl.float32, ALIGN) + offsets, change, shrink, mask)
        elif kind == 1:
            _add(_at(address, tl.bfloat16, ALIGN) + offsets, change, shrink, mask)
        else:
            _add(_at(address, tl.float16, ALIGN) + offsets, change, shrink, mask)


@triton.jit
def _add(param, change, shrink, mask):
    value = tl.load(param, mask=mask, other=0.0).to(tl.float32)
    tl.store(param, (value + (change - shrink * value)).to(param.dtype.element_ty), mask=mask)
