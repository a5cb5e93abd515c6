"""The update rule on a GPU, in place: passes over coordinates in Triton, all that tensors have once in torch.

As on a CPU (`learned_optim.kernels.cpu`), one pass adds up what the step sizes depend on, a second one updates the moments and runs the
LSTM, a third one changes the parameters. Each is one launch for all tensors of a device, however many: a table says where each tensor
lies, and a second one which stretch of which tensor a program does.

A tensor whose sums are not finite is *left out*: nothing of it is written, and in what all tensors have together it counts as one whose
gradient is zero. Where the second pass finds that its LSTM's state is not finite, its parameter stays as it is, and it is marked, as on a
CPU. The host does not know of either; a counter on the device does.

Of a sharded tensor the passes take this process's part. Between them sums are added up over the processes, see `learned_optim.sharding`.

Nothing here waits for the device or, once the tables are there, copies to it, so that steps can be captured in CUDA graphs.

Importing this module imports Triton. With TRITON_INTERPRET=1 set before that, Triton's interpreter runs the kernels, on a CPU's tensors
too.

Shapes: as in `learned_optim.rule`; `B` blocks. A block's coordinates are (ROWS, GROUP) in the kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import features, storage
from ..checks.state import Ledger
from ..config import FORMATS
from ..features import BUCKETS, EVEN, ODD, Layout
from ..network import OptimizerNetwork
from ..rule import (
    CONTROL,
    LEAST_SHRINKAGE,
    Control,
    State,
    is_orthogonal,
    orthogonalize_all,
)
from ..sharding import Run, ShardedLayout
from . import SCALARS, after_update, before_directions, before_update, read_once
from .gpu_replay import Program, upload
from .replay import Replay, run_once

BLOCK = 1024  # coordinates of a program
CHUNK, CHUNKS = 256, 64  # blocks whose sums a program adds up at once, and chunks of them
LOG2E = math.log2(math.e)
MAX_UNITS = 8  # as on a CPU; more would not fit into registers
ALIGNMENT = 16  # bytes that a thread loads at once
WARPS = {ALIGNMENT: 4, 1: 8}  # of a program; where a thread loads number by number, fewer of them leave more registers for addresses
KEPT_TABLES = 8  # of an optimizer, whose gradients may lie at a few places in turn
INTERPRETED = triton.knobs.runtime.interpret
REPLAYED = not INTERPRETED  # whether to run recordings, each of whose instructions takes the interpreter some hundredths of a second

# Of parameters and gradients that the kernels read.
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# How a part lies in its tensor: in one stretch, or several, of whole rows of a sketch; or in stretches that begin or end within such a row.
CUTS = ("stretch", "stretches", "odd stretches")
MATRIX_DTYPE = torch.bfloat16  # that matrices are orthogonalised in, as in Muon

# Columns of the table of tensors; the nth `order` is the tensor whose blocks come nth. Names in capitals with an underscore are constants
# that kernels see.
PLACES = ("moments", "lstm", "lstm_scale", "direction")
FIELDS = ("size", "count", *Run._fields, "orthogonal", "order", "first_block", "first_chunk", "control", "param", "grad", *PLACES)
_COLUMNS = tl.constexpr(len(FIELDS))
_CONTROLS, _BUCKETS = tl.constexpr(CONTROL), tl.constexpr(BUCKETS)
_CORRECTION = tl.constexpr(Control._fields.index("correction"))
_TOO_LARGE = tl.constexpr(2.0**64)  # the least number whose square is none
_SIZE, _COUNT, _FIRST, _WIDTH, _PITCH, _FIRST_BLOCK, _FIRST_CHUNK, _CONTROL, _PARAM, _GRAD = (
    tl.constexpr(FIELDS.index(name)) for name in ("size", "count", *Run._fields, "first_block", "first_chunk", "control", "param", "grad")
)
_MOMENTS, _LSTM, _LSTM_SCALE, _DIRECTION = (tl.constexpr(FIELDS.index(name)) for name in PLACES)

_FLOAT32, _BFLOAT16, _INT8 = map(tl.constexpr, range(len(FORMATS)))
_STRETCH, _STRETCHES, _ODD_STRETCHES = map(tl.constexpr, range(len(CUTS)))
_ALIGNMENT, _BLOCK, _GROUP, _ROWS = (tl.constexpr(n) for n in (ALIGNMENT, BLOCK, storage.BLOCK, BLOCK // storage.BLOCK))
_CHUNK, _CHUNKS, _TWO_LOG2E = map(tl.constexpr, (CHUNK, CHUNKS, 2 * LOG2E))
_BELOW_LEVELS = tl.constexpr(storage.LEVELS * (1 - 2**-20))  # by more than what an inverse is off by
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
    chunks: Tensor  # (C, 2): the same of chunks
    counts: Tensor  # coordinates of the whole tensors, (K,)
    orthogonal: Tensor  # 1 of those that are, else 0, (K,)
    roots: Tensor  # of the counts, (K,)

    @staticmethod
    def of(layout: Layout, numbers: tuple[int, ...], kept: dict[Any, Any]) -> Tables:
        """The tables of tensors with these entries, (K * FIELDS,): the same ones each time, so that a step uploads nothing; `kept` are the
        optimizer's last ones.

        A CUDA graph gets tables of its own, which it fills at each replay. So it needs none that may be dropped, and leaves none that are
        empty until then.
        """
        if capturing(layout.device):
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
        of = {name: column.contiguous() for name, column in zip(FIELDS, tensors.unbind(1), strict=True)}

        def parts(first: Tensor, length: int) -> Tensor:
            part = torch.arange(sum(-(-size // length) for size in layout.sizes), device=layout.device)
            tensor = of["order"][torch.searchsorted(first[of["order"]], part, right=True) - 1]
            return torch.stack([tensor, part - first[tensor]], -1).int()

        blocks, chunks = parts(of["first_block"], BLOCK), parts(of["first_chunk"], BLOCK * CHUNK)
        counts = of["count"].float()
        return Tables(tensors, blocks, chunks, counts, of["orthogonal"].float(), counts.sqrt())


class Launch(NamedTuple):
    """Neighbouring blocks that one program serves: what it is compiled for need not be looked at in each block."""

    begin: int
    blocks: int
    grad: Any  # the gradients' dtype in Triton
    param: Any  # the parameters' too; None where they are left to torch
    align: int  # how many bytes all addresses and sizes are multiples of
    cut: int  # how they lie in whole tensors, an index of CUTS


def upload_by_kernels(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers, (n,), as arguments of kernels: slower, but the host's memory need not outlive the call."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(numbers))
    return table


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replaying(network: OptimizerNetwork, memory: dict[str, Any], device: torch.device) -> Callable[..., Sequence[Tensor]]:
    """What runs functions of what tensors have once: by a recording, which a CUDA graph keeps, and does not make."""
    if not REPLAYED:
        return run_once
    read = [network, network.config, *read_once(network), *network.coordinate.parameters()]
    replay: Replay = memory.setdefault("replay", Replay(Program)).of(read)
    if not capturing(device):
        return replay
    memory.setdefault("captured", []).append(replay.programs)
    return replay.known


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
    orthogonal = is_orthogonal(layout, config)
    found, launches = table(layout, orthogonal, params, fused, flat, states, padded)
    numbers = tuple(found)
    directions = params[0].new_empty(sum(padded), dtype=torch.float32)
    moment_format, lstm_format = FORMATS.index(config.moment_format), FORMATS.index(config.lstm_format)

    with torch.cuda.device_of(directions):  # Triton launches on the current one
        tables = Tables.of(layout, numbers, ledger.memory.setdefault("tables", {}))
        once = replaying(network, ledger.memory, directions.device)
        every, chunks = (count,), (len(tables.chunks),)
        rows = directions.new_empty(CONTROL, count)
        means, sums = directions.new_empty(2 * BUCKETS, count), directions.new_empty(len(tables.blocks), 2 * BUCKETS)
        totals = directions.new_empty(len(tables.chunks), 2 * BUCKETS, dtype=torch.float64)
        finite = directions.new_empty(count)

        def mean(columns: int, used: int) -> Tensor:
            """Means over whole tensors of what the last pass added up, (used, K); the number of columns is a power of two."""
            _add_up[chunks](tables.tensors, tables.chunks, sums, totals, columns)
            _means[every](tables.tensors, totals, means, count, columns)
            return total(means[:used])

        def total(values: Tensor) -> Tensor:
            return layout.total(values) if isinstance(layout, ShardedLayout) else values

        _gather[every](tables.tensors, rows, count)
        for begin, blocks, grad, _, align, _ in launches:
            warps = WARPS[align]
            _moments[blocks,](tables.tensors, tables.blocks, begin, sums, config.second_moment, moment_format, grad, align, num_warps=warps)
        found_means = mean(4, 4)
        _judge[every](rows, found_means, finite, ledger.skipped, count)

        def before(*arguments: Tensor) -> Sequence[Tensor]:
            gates = -LOG2E * torch.cat([lstm.gate_bias[:, None], lstm.gate_weight], 1)
            return gates, 2 * LOG2E * lstm.candidate_weight, *before_directions(network, layout, *arguments)

        gates, candidates, step_size, constants, *clock_and_control = once("before directions", before, rows, found_means, total_steps)
        weights = gates, candidates, lstm.skip, lstm.out
        of_network = *weights, config.momentum, config.second_moment, config.hidden_units, moment_format, lstm_format
        of_tensors = rows, finite, constants  # the first row is the clocks
        for begin, blocks, grad, _, align, cut in launches:
            of_launch = *of_tensors, directions, sums, *of_network, grad, align, cut
            _directions[blocks,](tables.tensors, tables.blocks, begin, *of_launch, num_warps=WARPS[align])
        (mean_square,) = mean(1, 1)
        _judge_again[every](mean_square, finite, ledger.skipped)

        parts = [part[:size] for part, size in zip(directions.split(padded), layout.sizes, strict=True)]
        for k, matrix in orthogonalize_all(parts, layout, config, MATRIX_DTYPE):
            parts[k].copy_(matrix)
        if any(weight_decay) and any(orthogonal):
            mean_square = total(torch.stack(torch._foreach_norm(parts)).square()) / tables.counts
        kinds = tables.orthogonal, layout.is_table
        rates = layout.per_tensor(lr), layout.per_tensor(weight_decay)
        gain, factors = once("before update", partial(before_update, network), mean_square, *kinds, step_size, *rates)
        for begin, blocks, _, param, align, cut in launches:
            what = finite, directions, factors, sums, param, align, cut
            _apply[blocks,](tables.tensors, tables.blocks, begin, *what, num_warps=WARPS[align])
        moved = mean(2 * BUCKETS, BUCKETS + 1)
        (rows,) = once("after update", after_update, moved, gain, tables.roots, *clock_and_control)
        _scatter[every](tables.tensors, finite, rows, count)
    for k in itertools.compress(range(count), (not fuse for fuse in fused)):
        change = factors[k, 1] * parts[k].view(params[k].shape) - factors[k, 0] * params[k]
        params[k].add_(torch.where(finite[k] > 0, change, 0))


def table(
    layout: Layout,
    orthogonal: Sequence[bool],
    params: Sequence[Tensor],
    fused: Sequence[bool],
    grads: Sequence[Tensor],
    states: Sequence[State],
    padded: Sequence[int],
) -> tuple[list[int], list[Launch]]:
    """The tensors' entries, one after the other, and the launches of a pass; a parameter that the kernels leave to torch is at 0."""
    entries: list[list[int]] = []
    kinds: list[tuple[int, int, int, int]] = []  # of one kind tensors have neighbouring blocks
    types, direction = list(DTYPES), 0
    runs = layout.runs or [] if isinstance(layout, ShardedLayout) else [Run(0, size, size) for size in layout.sizes]
    for k, (param, grad, state, run) in enumerate(zip(params, grads, states, runs, strict=True)):
        size = layout.sizes[k]
        pointers = [param.data_ptr() if fused[k] else 0, grad.data_ptr()]
        stored = [state[key].data_ptr() for key in ("moments", "lstm")]
        aligned = not any(number % ALIGNMENT for number in (size, *pointers, *stored))
        scales = state["lstm_scale"].data_ptr() if "lstm_scale" in state else 0
        where = run if run.width < size else Run(run.first, BLOCK, BLOCK)  # a stretch is as good as several without gaps
        entry = {"size": size, "count": layout.counts[k], **where._asdict(), "orthogonal": orthogonal[k]}
        addresses = [state["control"].data_ptr(), *pointers, *stored, scales, direction]
        entries.append([*entry.values(), 0, 0, 0, *addresses])
        several = run.width < size
        cut = 2 if run.first % BUCKETS or (several and (run.width % BUCKETS or run.pitch % BUCKETS)) else int(several)
        kinds.append((ALIGNMENT if aligned else 1, types.index(grad.dtype), types.index(param.dtype) if fused[k] else len(types), cut))
        direction += padded[k]
    launches: list[Launch] = []
    begin, chunk = 0, 0
    order = sorted(range(len(params)), key=kinds.__getitem__)
    for nth, k in enumerate(order):
        entries[nth][FIELDS.index("order")] = k
        entries[k][FIELDS.index("first_block")], entries[k][FIELDS.index("first_chunk")] = begin, chunk
        begin += -(-layout.sizes[k] // BLOCK)
        chunk += -(-layout.sizes[k] // (BLOCK * CHUNK))
    for (align, grad_type, param_type, cut), members in itertools.groupby(order, kinds.__getitem__):
        if not (blocks := sum(-(-layout.sizes[k] // BLOCK) for k in members)):
            continue  # parts of tensors of which nothing is here
        first = launches[-1].begin + launches[-1].blocks if launches else 0
        names = list(DTYPES.values())
        launches.append(Launch(first, blocks, names[grad_type], [*names, None][param_type], align, cut))
    return list(itertools.chain.from_iterable(entries)), launches


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
    """The way back, of tensors that are not left out; those that `_judge_again` did not know before are marked."""
    k, i = tl.program_id(0), tl.arange(0, 2 * _BUCKETS)
    control = _at(tl.load(tensors + k * _COLUMNS + _CONTROL), tl.float32, 4)
    fine = tl.load(finite + k)
    if fine > 0:
        tl.store(control + i, tl.load(rows + i * count + k, mask=i < _CONTROLS), mask=i < _CONTROLS)
    elif fine < 0:
        tl.store(control + _CORRECTION, float("nan"))


@triton.jit
def _judge(rows, means, finite, skipped, count):
    """Whether each tensor's means of the first pass are finite, and what it has once is sound, 1 or 0; what is not becomes zero, and the
    tensor is counted. A second moment that is negative shows in its mean, or in the direction of the second pass."""
    k, column, i = tl.program_id(0), tl.arange(0, 4), tl.arange(0, 2 * _BUCKETS)
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
def _judge_again(means, finite, skipped):
    """Makes -1 of a tensor whose mean of the second pass, (K,), is not finite, and zero of the mean, and counts the tensor."""
    k = tl.program_id(0)
    if not tl.abs(tl.load(means + k)) < float("inf"):
        tl.store(means + k, 0.0)
        tl.store(finite + k, -1.0)
        tl.atomic_add(skipped, 1)


@triton.jit
def _add_up(tensors, chunks, sums, totals, COLUMNS: tl.constexpr):
    """Sums of the blocks' sums over each chunk, (B, COLUMNS) -> (C, COLUMNS), added in one order."""
    entry = chunks + 2 * tl.program_id(0)
    row = tensors + tl.load(entry) * _COLUMNS
    column, block = tl.arange(0, COLUMNS), tl.load(entry + 1).to(tl.int64) * _CHUNK + tl.arange(0, _CHUNK)[:, None]
    mask = block < tl.cdiv(tl.load(row + _SIZE), _BLOCK)
    each = tl.load(sums + (tl.load(row + _FIRST_BLOCK) + block) * COLUMNS + column[None, :], mask=mask, other=0.0)
    tl.store(totals + tl.program_id(0) * COLUMNS + column, tl.sum(each.to(tl.float64), 0))


@triton.jit
def _means(tensors, totals, means, count, COLUMNS: tl.constexpr):
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
    if CUT != _STRETCH:
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
def _moments(tensors, blocks, begin, sums, decay2, FORMAT: tl.constexpr, GRAD: tl.constexpr, ALIGN: tl.constexpr):
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
def _directions(
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
        before = (_load(lstm, scales, 0, where, LSTM, ALIGN),)  # hidden units, cells, drift
        for h in tl.static_range(1, 2 * UNITS + 1):
            before = before + (_load(lstm, scales, h, where, LSTM, ALIGN),)  # type: ignore[assignment]  # noqa: RUF005  Triton knows no unpacking

        bits = _random_bits(_whole(row, first, places, CUT), tl.load(clocks + k))
        low, high = bits & 0xFFFF, bits >> 16
        momentum += (1.0 - decay1) * (grad - momentum)
        second_moment += (1.0 - decay2) * (grad * grad - second_moment)
        _store(moments, 0, 0, where, momentum, low, MOMENTS, ALIGN)
        _store(moments, 0, 1, where, second_moment, high, MOMENTS, ALIGN)
        momentum = _rounded(momentum, low, MOMENTS) * tl.load(scalars)
        second_moment = _rounded(second_moment, high, MOMENTS) * tl.load(scalars + 1)
        mean, share, portion, kept = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
        steady, inertia = tl.load(scalars + 6), tl.load(scalars + 7)

        variance = second_moment + (_RELATIVE_FLOOR * mean + _ABSOLUTE_FLOOR)
        scale = tl.rsqrt(variance)
        slow, gradient = momentum * scale, grad * scale
        square = gradient * gradient
        fast = steady * gradient * tl.rsqrt(1.0 + square * (1.0 / (_GRADIENT_BOUND * _GRADIENT_BOUND)))
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
        left = tl.maximum(kept * kept - kept * kept * share * square, kept * kept * (_LEAST_SHRINKAGE * _LEAST_SHRINKAGE))
        drift = tl.sqrt(left) * before[2 * UNITS] + portion * gradient
        direction += inertia * drift
        _store(lstm, scales, 2 * UNITS, where, drift, low, LSTM, ALIGN)
        tl.store(directions + places, direction, mask=mask)
        tl.store(sums, tl.sum(direction * direction))  # what is masked is zero, since all that it comes from is, and the network odd


@triton.jit(do_not_specialize=["begin"])
def _apply(tensors, blocks, begin, finite, directions, factors, sums, PARAM: tl.constexpr, ALIGN: tl.constexpr, CUT: tl.constexpr):
    """The rest of steps 4 and 5, and weight decay: parameters lose the share `shrink` and get `scale` times the direction. Its sums are the
    direction's sketch, see `learned_optim.features.Layout.sketch`, and its square.

    factors: each tensor's shrink and scale.
    PARAM: the parameters' dtype; None where they are left to torch.
    """
    block, k, row, first = _block(tensors, blocks, begin)
    _, _, mask, places = _places(row, first, ALIGN)
    directions += tl.multiple_of(tl.load(row + _DIRECTION), _ALIGNMENT) + first
    direction = tl.load(directions + places, mask=mask, other=0.0)
    _sketch(direction, row, first, places, sums + 2 * _BUCKETS * block, CUT)
    if PARAM is not None:  # noqa: SIM102  this is what a kernel is compiled for, and that what it looks at
        if tl.load(finite + k) > 0:
            param = _at(tl.load(row + _PARAM), PARAM, ALIGN) + first + places
            value = tl.load(param, mask=mask, other=0.0).to(tl.float32)
            change = tl.load(factors + 2 * k + 1) * direction - tl.load(factors + 2 * k) * value
            tl.store(param, (value + change).to(PARAM), mask=mask)


@triton.jit
def _sketch(direction, row, first, places, sums, CUT: tl.constexpr):
    bucket = tl.arange(0, _BUCKETS)
    if CUT == _ODD_STRETCHES:
        whole = _whole(row, first, places, CUT)
        signed = _sign(whole // _BUCKETS) * direction
        for each in tl.static_range(_BUCKETS):
            tl.store(sums + each, tl.sum(tl.where(whole % _BUCKETS == each, signed, 0.0)))
    else:
        rows = _whole(row, first, tl.arange(0, _BLOCK // _BUCKETS)[:, None] * _BUCKETS, CUT) // _BUCKETS
        tl.store(sums + bucket, tl.sum(_sign(rows) * tl.reshape(direction, (_BLOCK // _BUCKETS, _BUCKETS)), 0))
    # The square has a row of zeros beside it.
    tl.store(sums + _BUCKETS + bucket, tl.where(bucket == 0, tl.sum(direction * direction), 0.0))


@triton.jit
def _sign(rows):
    """-1 or 1 for each row of a sketch, see `learned_optim.features.Layout.signs`."""
    return (_scatter_bits(rows.to(tl.uint32) * 0x9E3779B1) & 1).to(tl.float32) * 2.0 - 1.0
