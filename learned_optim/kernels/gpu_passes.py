"""The passes over a device's tensors, in Triton; what they are for and what runs between them says `learned_optim.kernels.gpu`.

A program does one block of one tensor, or what one tensor has once. Its instructions count, see benchmarks/GPU_NOTES.md, so there is much
here that a plain formula would not have.

Shapes: as in `learned_optim.rule`; `B` blocks, `C` chunks of them. A block's coordinates are (ROWS, GROUP).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .. import features, storage
from ..config import FORMATS
from ..features import EVEN, ODD
from ..rule import CONTROL, Control
from ..sharding import Run
from . import SCALARS

BLOCK = 1024  # coordinates of a program
CHUNK, CHUNKS = 256, 64  # blocks whose sums a program adds up at once, and chunks of them
LOG2E = math.log2(math.e)
ALIGNMENT = 16  # bytes that a thread loads at once
SUMS = 4  # of a pass, at most

# Columns of the table of tensors; the nth `order` is the tensor whose blocks come nth. Names in capitals with an underscore are constants
# that kernels see.
PLACES = ("moments", "lstm", "lstm_scale", "direction")
FIELDS = ("size", "count", *Run._fields, "orthogonal", "order", "first_block", "first_chunk", "control", "param", "grad", *PLACES)
_COLUMNS = tl.constexpr(len(FIELDS))
_CONTROLS, _ROWS_OF_CONTROL = tl.constexpr(CONTROL), tl.constexpr(triton.next_power_of_2(CONTROL))
_CORRECTION = tl.constexpr(Control._fields.index("correction"))
_TOO_LARGE = tl.constexpr(2.0**64)  # the least number whose square is none
_SIZE, _COUNT, _FIRST, _WIDTH, _PITCH, _FIRST_BLOCK, _FIRST_CHUNK, _CONTROL, _PARAM, _GRAD = (
    tl.constexpr(FIELDS.index(name)) for name in ("size", "count", *Run._fields, "first_block", "first_chunk", "control", "param", "grad")
)
_MOMENTS, _LSTM, _LSTM_SCALE, _DIRECTION = (tl.constexpr(FIELDS.index(name)) for name in PLACES)

_FLOAT32, _BFLOAT16, _INT8 = map(tl.constexpr, range(len(FORMATS)))
_ALIGNMENT, _BLOCK, _GROUP, _ROWS = (tl.constexpr(n) for n in (ALIGNMENT, BLOCK, storage.BLOCK, BLOCK // storage.BLOCK))
_CHUNK, _CHUNKS, _TWO_LOG2E = map(tl.constexpr, (CHUNK, CHUNKS, 2 * LOG2E))
_BELOW_LEVELS = tl.constexpr(storage.LEVELS * (1 - 2**-20))  # by more than what an inverse is off by
_LEVELS, _ODD, _EVEN = tl.constexpr(storage.LEVELS), tl.constexpr(ODD), tl.constexpr(EVEN)
_RELATIVE_FLOOR, _ABSOLUTE_FLOOR = tl.constexpr(features.RELATIVE_FLOOR), tl.constexpr(features.ABSOLUTE_FLOOR)
_GRADIENT_BOUND, _SCALARS = tl.constexpr(features.GRADIENT_BOUND), tl.constexpr(SCALARS)


@triton.jit
def _at(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer of an address that is a multiple of ALIGN, which says how much a thread may load at once."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def gather(tensors, rows, count):
    """What each tensor has once into rows, (CONTROL, K)."""
    k, i = tl.program_id(0), tl.arange(0, _ROWS_OF_CONTROL)
    control = _at(tl.load(tensors + k * _COLUMNS + _CONTROL), tl.float32, 4)
    tl.store(rows + i * count + k, tl.load(control + i, mask=i < _CONTROLS), mask=i < _CONTROLS)


@triton.jit
def scatter(tensors, finite, rows, count):
    """The way back, of tensors that are not left out; those that `judge_again` did not know before are marked."""
    k, i = tl.program_id(0), tl.arange(0, _ROWS_OF_CONTROL)
    control = _at(tl.load(tensors + k * _COLUMNS + _CONTROL), tl.float32, 4)
    fine = tl.load(finite + k)
    if fine > 0:
        tl.store(control + i, tl.load(rows + i * count + k, mask=i < _CONTROLS), mask=i < _CONTROLS)
    elif fine < 0:
        tl.store(control + _CORRECTION, float("nan"))


@triton.jit
def judge(rows, means, finite, skipped, count):
    """Whether each tensor's means of the first pass are finite, and what it has once is sound, 1 or 0; what is not becomes zero, and the
    tensor is counted. A second moment that is negative shows in its mean, or in the direction of the second pass."""
    k, column, i = tl.program_id(0), tl.arange(0, 4), tl.arange(0, _ROWS_OF_CONTROL)
    found = tl.load(means + column * count + k)
    control = tl.load(rows + i * count + k, mask=i < _CONTROLS, other=0.0)
    sound = tl.min(tl.where((tl.abs(control) < _TOO_LARGE) & ((control >= 0) | (i > 0)), 1, 0), 0)
    fine = sound * tl.min(tl.where((tl.abs(found) < float("inf")) & ((found >= 0) | (column < 3)), 1, 0), 0)
    tl.store(means + column * count + k, tl.where(fine != 0, found, 0.0))
    tl.store(rows + i * count + k, tl.where(sound != 0, control, 0.0), mask=i < _CONTROLS)
    tl.store(finite + k, fine.to(tl.float32))
    if fine == 0:
        tl.atomic_add(skipped, 1)


@triton.jit
def judge_again(means, finite, skipped):
    """Makes -1 of a tensor whose mean of the second pass, (K,), is not finite, and zero of the mean, and counts the tensor."""
    k = tl.program_id(0)
    if not tl.abs(tl.load(means + k)) < float("inf"):
        tl.store(means + k, 0.0)
        tl.store(finite + k, -1.0)
        tl.atomic_add(skipped, 1)


@triton.jit
def add_up(tensors, chunks, sums, totals, COLUMNS: tl.constexpr):
    """Sums of the blocks' sums over each chunk, (B, COLUMNS) -> (C, COLUMNS), added in one order."""
    entry = chunks + 2 * tl.program_id(0)
    row = tensors + tl.load(entry) * _COLUMNS
    column, block = tl.arange(0, COLUMNS), tl.load(entry + 1).to(tl.int64) * _CHUNK + tl.arange(0, _CHUNK)[:, None]
    mask = block < tl.cdiv(tl.load(row + _SIZE), _BLOCK)
    each = tl.load(sums + (tl.load(row + _FIRST_BLOCK) + block) * COLUMNS + column[None, :], mask=mask, other=0.0)
    tl.store(totals + tl.program_id(0) * COLUMNS + column, tl.sum(each.to(tl.float64), 0))


@triton.jit
def means(tensors, totals, means, count, COLUMNS: tl.constexpr):
    """Means over each tensor, (C, COLUMNS) -> (COLUMNS, K), added in one order; of a part its share of the whole tensor's."""
    k = tl.program_id(0)
    row = tensors + k * _COLUMNS
    size, first = tl.load(row + _SIZE), tl.load(row + _FIRST_CHUNK).to(tl.int32)
    chunks, column = tl.cdiv(size, _BLOCK * _CHUNK).to(tl.int32), tl.arange(0, COLUMNS)
    inverse = 1.0 / tl.load(row + _COUNT).to(tl.float32)  # a division of fp64 would be a subroutine
    total = tl.zeros((_CHUNKS, COLUMNS), tl.float64)
    for begin in range(0, chunks, _CHUNKS):
        chunk = begin + tl.arange(0, _CHUNKS)[:, None]
        total += tl.load(totals + (first + chunk) * COLUMNS + column[None, :], mask=chunk < chunks, other=0.0)
    tl.store(means + column * count + k, (tl.sum(total, 0) * inverse.to(tl.float64)).to(tl.float32))


@triton.jit
def _block(tensors, blocks, begin):
    """This program's block, its tensor, the tensor's row in the table, and the block's first coordinate."""
    block = begin + tl.program_id(0)
    k = tl.load(blocks + 2 * block)
    return block, k, tensors + k * _COLUMNS, tl.load(blocks + 2 * block + 1).to(tl.int64) * _BLOCK


@triton.jit
def _places(row, first, ALIGN: tl.constexpr):
    """Where a block is: its tensor's size, its first coordinate, which of its coordinates there are, and their places in the block, the
    last two (ROWS, GROUP)."""
    size = tl.multiple_of(tl.load(row + _SIZE), ALIGN)
    places = tl.arange(0, _ROWS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    return size, first, places < tl.multiple_of(tl.minimum(size - first, _BLOCK).to(tl.int32), ALIGN), places


@triton.jit
def _whole(row, first, places, CUT: tl.constexpr):
    """Where a block's coordinates lie in the whole tensor, see `learned_optim.sharding.Run`."""
    begin = tl.load(row + _FIRST)
    if CUT:
        width, pitch = tl.load(row + _WIDTH), tl.load(row + _PITCH)
        column, short = (first % width).to(tl.uint32) + places.to(tl.uint32), width.to(tl.uint32)
        found = begin + (first // width + column // short) * pitch + column % short
    else:
        found = begin + first + places
    return found


@triton.jit
def _random_bits(places, step):
    """See `learned_optim.storage.random_bits`; the two integers are the lower and the upper half."""
    return _scatter_bits(places.to(tl.uint32) * 0x9E3779B1 + step.to(tl.int64).to(tl.uint32) * 0x85EBCA6B)


@triton.jit
def _scatter_bits(x):
    """See `learned_optim.storage.scatter_bits`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _inverse(x):
    """1 / x of a positive number that is not tiny, relative error 5e-7: one instruction and a product, where a division takes ten."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _load(values, scales, unit, where, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """State that is stored of a unit, in fp32.

    values, scales: addresses.
    where: see `_places`.
    """
    size, first, mask, places = where
    begin = unit * size + first
    if FORMAT == _FLOAT32:
        loaded = tl.load(_at(values, tl.float32, ALIGN) + begin + places, mask=mask, other=0.0)
    elif FORMAT == _BFLOAT16:
        loaded = tl.load(_at(values, tl.bfloat16, ALIGN) + begin + places, mask=mask, other=0.0).to(tl.float32)
    else:
        levels = tl.load(_at(values, tl.int8, ALIGN) + begin + places, mask=mask, other=0)
        scale, some = _scales(scales, unit, size, first)
        loaded = levels.to(tl.float32) * tl.load(scale, mask=some, other=0.0)
    return loaded


@triton.jit
def _scales(scales, unit, size, first):
    """Where the scales of the block's groups are, and which of them there are, (ROWS, 1)."""
    group, count = first // _GROUP + tl.arange(0, _ROWS)[:, None], tl.cdiv(size, _GROUP)
    return _at(scales, tl.float32, 4) + unit * count + group, group < count


@triton.jit
def _rounded(new, bits, FORMAT: tl.constexpr):
    """What is left of values once they are stored in fp32 or bfloat16, in fp32, rounded as in `_store`. They are finite: a tensor whose
    sums are not is left out."""
    if FORMAT == _BFLOAT16:
        new = ((new.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return new


@triton.jit
def _store(values, scales, unit, where, new, bits, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """Stores values, rounded stochastically by `bits`, integers below 2^16; see `learned_optim.storage.store`."""
    size, first, mask, places = where
    begin = unit * size + first
    if FORMAT == _FLOAT32:
        tl.store(_at(values, tl.float32, ALIGN) + begin + places, new, mask=mask)
    elif FORMAT == _BFLOAT16:
        rounded = (new.to(tl.uint32, bitcast=True) + bits) >> 16
        tl.store(_at(values, tl.uint16, ALIGN) + begin + places, rounded.to(tl.uint16), mask=mask)
    else:
        largest = tl.max(tl.abs(new), 1, keep_dims=True)  # what is masked is zero
        scale, some = _scales(scales, unit, size, first)
        tl.store(scale, largest / _LEVELS, mask=some)
        # Beside 768 the last bit of a number is worth 2^-14, so its bits are a level in fixed point, which is rounded by an integer sum. To
        # convert it would take instructions that a GPU has few units for.
        fixed = (new * (_BELOW_LEVELS * _inverse(tl.maximum(largest, 1e-30))) + 768.0).to(tl.uint32, bitcast=True)
        tl.store(_at(values, tl.int8, ALIGN) + begin + places, (((fixed << 2) + bits) >> 16).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["begin"])
def moments(tensors, blocks, begin, sums, decay2, FORMAT: tl.constexpr, GRAD: tl.constexpr, ALIGN: tl.constexpr):
    """Sums of step 1 of the rule: of squared gradients, of squared momenta before, of their products, and of new second moments. Nothing of
    a tensor is written yet."""
    block, _, row, first = _block(tensors, blocks, begin)
    where = _places(row, first, ALIGN)
    _, _, mask, places = where
    moments = tl.load(row + _MOMENTS)
    grad = tl.load(_at(tl.load(row + _GRAD), GRAD, ALIGN) + first + places, mask=mask, other=0.0).to(tl.float32)
    before = _load(moments, 0, 0, where, FORMAT, ALIGN)
    second_moment = _load(moments, 0, 1, where, FORMAT, ALIGN)
    second_moment += (1.0 - decay2) * (grad * grad - second_moment)
    sums += 4 * block  # what is masked is zero in all four
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
def _gate(weights, values):
    """What 1 / (1 + this) is a gate of; its weights have their bias first and are multiplied by -log2(e)."""
    total = tl.load(weights)
    for i in tl.static_range(len(values)):
        total += tl.load(weights + 1 + i) * values[i]
    return tl.exp2(total)


@triton.jit
def _tanh(x):
    """tanh(x / (2 log2(e))) as a numerator and a denominator, so that its division can be shared. Odd to the last bit, error 3e-7."""
    power = tl.exp2(-tl.abs(x))
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return ((1.0 - power).to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True), 1.0 + power


@triton.jit
def _log(x):
    """ln(x) / 8 of a normal number, error 1e-7 beside 1, as `coordinate.c` has it. `tl.log` looks after all others too, in twice as many
    instructions."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # times 2^23; the rest is between the roots of 1/2 and 2
    r = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    slope = ((-1.0102293e-1 / 8 * r + 1.6420090e-1 / 8) * r - 1.7333487e-1 / 8) * r + 1.9873035e-1 / 8
    slope = (((slope * r - 2.4959341e-1 / 8) * r + 3.3336183e-1 / 8) * r - 5.0000668e-1 / 8) * r + 9.9999982e-1 / 8
    return exponent.to(tl.float32) * (8.2629583e-8 / 8) + slope * r


@triton.jit(do_not_specialize=["begin"])
def directions(
    tensors,
    blocks,
    begin,
    clocks,
    finite,
    scalars,
    directions,
    sums,
    gates,
    candidates,
    skip,
    out,
    decay1,
    decay2,
    UNITS: tl.constexpr,
    MOMENTS: tl.constexpr,
    LSTM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    CUT: tl.constexpr,
):
    """Steps 1 and 3 of the rule, and the sum of squared directions, NaN where the LSTM's state is not finite; zeros for tensors that are
    left out.

    scalars: see `learned_optim.kernels.scalars`.
    """
    block, k, row, first = _block(tensors, blocks, begin)
    where = _places(row, first, ALIGN)
    _, _, mask, places = where
    directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT) + first
    sums += block
    if tl.load(finite + k) == 0:
        tl.store(directions + places, tl.zeros_like(places).to(tl.float32), mask=mask)
        tl.store(sums, 0.0)
    else:
        # All loads come first, so that a program waits once.
        scalars += _SCALARS * k
        moments, lstm, scales = tl.load(row + _MOMENTS), tl.load(row + _LSTM), tl.load(row + _LSTM_SCALE)
        grad = tl.load(_at(tl.load(row + _GRAD), GRAD, ALIGN) + first + places, mask=mask, other=0.0).to(tl.float32)
        momentum = _load(moments, 0, 0, where, MOMENTS, ALIGN)
        second_moment = _load(moments, 0, 1, where, MOMENTS, ALIGN)
        before = (_load(lstm, scales, 0, where, LSTM, ALIGN),)  # hidden units, then cells
        for h in tl.static_range(1, 2 * UNITS):
            before = before + (_load(lstm, scales, h, where, LSTM, ALIGN),)  # type: ignore[assignment]  # noqa: RUF005  Triton knows no unpacking

        bits = _random_bits(_whole(row, first, places, CUT), tl.load(clocks + k))
        low, high = bits & 0xFFFF, bits >> 16
        momentum += (1.0 - decay1) * (grad - momentum)
        second_moment += (1.0 - decay2) * (grad * grad - second_moment)
        _store(moments, 0, 0, where, momentum, low, MOMENTS, ALIGN)
        _store(moments, 0, 1, where, second_moment, high, MOMENTS, ALIGN)
        momentum = _rounded(momentum, low, MOMENTS) * tl.load(scalars)
        second_moment = _rounded(second_moment, high, MOMENTS) * tl.load(scalars + 1)
        mean = tl.load(scalars + 2)

        variance = second_moment + (_RELATIVE_FLOOR * mean + _ABSOLUTE_FLOOR)
        scale = tl.rsqrt(variance)
        slow, gradient = momentum * scale, grad * scale
        fast = gradient * tl.rsqrt(1.0 + gradient * gradient * (1.0 / (_GRADIENT_BOUND * _GRADIENT_BOUND)))
        of_tensor = _log(variance * (1.0 / (mean + _ABSOLUTE_FLOOR)))
        odd, even = (slow, fast), (tl.abs(slow), tl.abs(fast), of_tensor)
        for h in tl.static_range(UNITS):
            odd, even = odd + (before[h],), even + (tl.abs(before[h]),)  # type: ignore[assignment]  # noqa: RUF005

        direction = tl.load(skip) * slow + tl.load(skip + 1) * fast
        for h in tl.static_range(UNITS):
            into = _gate(gates + h * (1 + _EVEN + UNITS), even)
            forget = _gate(gates + (UNITS + h) * (1 + _EVEN + UNITS), even)
            out_of = _gate(gates + (2 * UNITS + h) * (1 + _EVEN + UNITS), even)
            above, below = _tanh(_dot(candidates + h * (_ODD + UNITS), odd))
            cell = before[UNITS + h] * _inverse(1.0 + forget) + above * _inverse(below + into * below)
            above, below = _tanh(cell * _TWO_LOG2E)
            hidden = above * _inverse(below + out_of * below)
            direction += tl.load(out + h) * hidden
            direction += 0.0 * (before[h] + cell)  # NaN of infinity, which the unit's bounds would hide
            _store(lstm, scales, h, where, hidden, low, LSTM, ALIGN)
            _store(lstm, scales, UNITS + h, where, cell, high, LSTM, ALIGN)
        tl.store(directions + places, direction, mask=mask)
        tl.store(sums, tl.sum(direction * direction))  # what is masked is zero, since all that it comes from is, and the network odd


@triton.jit(do_not_specialize=["begin"])
def apply(tensors, blocks, begin, finite, directions, factors, PARAM: tl.constexpr, ALIGN: tl.constexpr):
    """The rest of steps 4 and 5, and weight decay: parameters lose the share `shrink` and get `scale` times the direction.

    factors: each tensor's shrink and scale.
    """
    _, k, row, first = _block(tensors, blocks, begin)
    _, first, mask, places = _places(row, first, ALIGN)
    if tl.load(finite + k) > 0:
        directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT) + first
        param = _at(tl.load(row + _PARAM), PARAM, ALIGN) + first + places
        direction = tl.load(directions + places, mask=mask, other=0.0)
        value = tl.load(param, mask=mask, other=0.0).to(tl.float32)
        change = tl.load(factors + 2 * k + 1) * direction - tl.load(factors + 2 * k) * value
        tl.store(param, (value + change).to(PARAM), mask=mask)
