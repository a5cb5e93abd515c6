"""The update rule on a CPU, in place: passes over coordinates in C, all that tensors have once in torch.

An LSTM step in plain torch makes some forty trips through memory. Here one pass adds up what the step sizes depend on, a second one updates
the moments and runs the LSTM, and what lies between stays in registers and the L1 cache. The compiled file depends on nothing but the
processor.

The first pass only reads. So a tensor with a gradient that is not finite is found before anything was written, and left out. The LSTM's
state is read in the second pass. Where that is not finite, because something has written to it, the tensor keeps its parameter, and is
marked: the first pass of the next step finds it.

Shapes: as in `learned_optim.rule`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import operator
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..checks.parameters import check_weights
from ..checks.state import DTYPE, Ledger, Places, addresses
from ..config import FORMATS
from ..features import LAYOUTS, Layout
from ..network import OptimizerNetwork
from ..rule import CONTROL, Control, State, orthogonalize_all, sit_out
from ..sharding import Run, ShardedLayout
from . import before_directions, before_update, read_once, replay
from .matrices import Matrices
from .matrices import library as matrix_library
from .native import load, together
from .replay import Replay, run_once

BLOCK = 2**14  # coordinates that a thread takes at once
KEPT = 2**20  # coordinates at most whose directions keep their memory between steps
SUMS = 4  # of a pass, at most
CORRECTION = Control._fields.index("correction")
INTERFACE, MAX_UNITS = 15, 8  # as in the C file

# A row of the table of tensors has the size, three numbers of where its coordinates lie in the whole tensor, the parameter, the gradient,
# the direction and these pieces of state, the last one of int8.
KEYS = ("control", "moments", "lstm", "lstm_scale")
PARAMETER, COLUMNS = 4, 7 + len(KEYS)


class Job(ctypes.Structure):
    """See the C file."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("tensors", "blocks")]
    _fields_ += [("count", ctypes.c_int64), ("next", ctypes.c_int64), ("sums", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("moment_format", "lstm_format")]


class Network(ctypes.Structure):
    _fields_ = [("units", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("gate_weight", "gate_bias", "candidate_weight", "skip", "out")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes, or None where one of the compiled files is missing, as in `load`."""
    loaded, job = load("coordinate", INTERFACE), ctypes.POINTER(Job)
    if loaded is None or replay.library() is None or matrix_library() is None:
        return None
    loaded.moments.argtypes = [job, ctypes.c_float]
    loaded.directions.argtypes = [job, ctypes.POINTER(Network), ctypes.c_float, ctypes.c_float, ctypes.c_void_p]
    loaded.apply.argtypes = [job, ctypes.c_void_p]
    for function in (loaded.gather, loaded.scatter):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return loaded


def trouble(network: OptimizerNetwork) -> str | None:
    """Why the compiled passes cannot run this network, or None."""
    if library() is None:
        return (
            "learned_optim was installed without its compiled kernel, or with that of another version: there was no C compiler, or the "
            "code has changed since. Install gcc or clang, and then the package again, with pip's options --force-reinstall --no-deps."
        )
    if network.config.hidden_units > MAX_UNITS:
        return f"the compiled kernel runs networks of up to {MAX_UNITS} hidden units, and this one has {network.config.hidden_units}."
    return None


@functools.cache
def matrix_dtype() -> torch.dtype | None:
    """What matrices are orthogonalised in: bfloat16, as in Muon, where the processor multiplies it at twice the speed of fp32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None


class Blocks:
    """What passes over tensors of a layout need to know of it."""

    def __init__(self, layout: Layout) -> None:
        table = [(k, begin, min(begin + BLOCK, size)) for k, size in enumerate(layout.sizes) for begin in range(0, size, BLOCK)]
        self.table = torch.tensor(table, dtype=torch.int64, device="cpu").view(-1, 3)  # (tensor, begin, end) of each block, (count, 3)
        runs = layout.runs or [] if isinstance(layout, ShardedLayout) else [Run(0, size, size) for size in layout.sizes]
        self.places = list(zip(*runs, strict=True))  # where the tensors' coordinates lie in whole ones
        self.counts = torch.tensor(layout.counts, device="cpu")  # sizes of the whole tensors, (K,)
        starts = itertools.accumulate(layout.sizes, initial=0)
        self.starts = [4 * start for start in starts][:-1]  # of the tensors among the directions, in bytes

    @staticmethod
    @functools.lru_cache(maxsize=LAYOUTS)
    def of(layout: Layout) -> Blocks:
        return Blocks(layout)


class Passes:
    """Passes over the same tensors.

    Args:
        places: of parameters that have no gaps and are fp32, gradients that are so, and the state.
        fused: which parameters are to be changed.
        formats: of the moments and of the LSTM's state.
    """

    def __init__(self, layout: Layout, places: Places, fused: Sequence[bool], formats: Sequence[str]) -> None:
        self.layout, self.blocks, self.count = layout, Blocks.of(layout), len(fused)
        self.directions = torch.empty(sum(layout.sizes), dtype=torch.float32, device="cpu")  # what one pass writes and the next reads, (N,)
        first, width = self.directions.data_ptr(), len(places.states) // self.count
        columns: list[Iterable[int]] = [layout.sizes, *self.blocks.places, map(operator.mul, places.params, fused), places.grads]
        columns += [[first + start for start in self.blocks.starts], *(places.states[column::width] for column in range(width))]
        columns += [[0] * self.count] * (COLUMNS - len(columns))
        self.table = array("q", itertools.chain.from_iterable(zip(*columns, strict=True)))
        rows = len(self.blocks.table) + self.count  # of blocks, then of tensors
        self.sums = torch.empty(rows, SUMS, dtype=torch.float64, device="cpu")
        self.totals = self.sums.view(-1)[SUMS * len(self.blocks.table) :]
        tables = self.table.buffer_info()[0], self.blocks.table.data_ptr()
        self.job = Job(*tables, len(self.blocks.table), 0, self.sums.data_ptr(), *(FORMATS.index(fmt) for fmt in formats))
        # A thread needs some 30 microseconds to wake up, in which another has done four blocks.
        self.threads = max(1, min(torch.get_num_threads(), len(self.blocks.table) // 4))
        self.finite = True  # whether all that the last pass returned is

    @staticmethod
    def of(memory: dict[Any, Any], layout: Layout, places: Places, fused: Sequence[bool], formats: Sequence[str]) -> Passes:
        """Those of the last step, where nothing has moved since. Large models have new ones at each step: directions would take memory
        meanwhile."""
        key = layout, places, fused, formats, torch.get_num_threads()
        if memory.get("passes", (None,))[0] == key:
            passes: Passes = memory["passes"][1]
            return passes
        passes = Passes(layout, places, fused, formats)
        memory["passes"] = (key, passes) if sum(layout.sizes) <= KEPT else (None,)
        return passes

    def run(self, name: str, *arguments: object) -> None:
        """Runs a pass."""
        self.job.next = 0
        together(getattr(library(), name), [(ctypes.byref(self.job), *arguments)] * self.threads)

    def means(self, name: str, columns: int, *arguments: object) -> Tensor:
        """Runs a pass. Returns means of its sums over each tensor, (columns, K)."""
        self.run(name, *arguments)
        means, blocks = torch.empty(columns, self.count, dtype=torch.float32, device="cpu"), self.job.count
        of_blocks = self.job.sums, self.job.blocks, blocks, columns
        numbers = self.blocks.counts.data_ptr(), self.count, self.totals.data_ptr(), means.data_ptr()
        self.finite = getattr(replay.library(), "means")(*of_blocks, *numbers) != 0  # noqa: B009
        if isinstance(self.layout, ShardedLayout):
            mine = self.totals[: columns * self.count].view(self.count, columns)
            means = (self.layout.total(mine.T) / self.blocks.counts).float()
            self.finite = bool(means.isfinite().all())
        return means

    def forget(self, k: int) -> None:
        """Leaves a parameter as it is in the passes to come."""
        self.table[COLUMNS * k + PARAMETER] = 0

    def control(self, name: str, rows: Tensor) -> None:
        """Runs "gather" or "scatter" on what tensors have once, (CONTROL, K)."""
        getattr(library(), name)(self.job.tensors, self.count, rows.data_ptr())


def read_directly(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors are fp32 and without gaps. Mostly all are, which is quick to see."""
    if set(map(DTYPE, tensors)) == {torch.float32} and all(map(Tensor.is_contiguous, tensors)):
        return [True] * len(tensors)
    return [tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors]


def step(
    network: OptimizerNetwork,
    layout: Layout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    total_steps: Tensor,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    ledger: Ledger | None = None,
) -> None:
    """One step of the rule, see `learned_optim.kernels.reference.step`."""
    config, lstm = network.config, network.coordinate
    once_read = read_once(network)
    weights = addresses([lstm.gate_weight, lstm.gate_bias, lstm.candidate_weight, lstm.skip, lstm.out])
    if ledger is not None and (read := [*weights, *addresses(once_read)]) != ledger.memory.get("weights"):
        check_weights([*lstm.parameters(), *once_read])
        ledger.memory["weights"] = read
    direct = read_directly(grads)
    flat = grads if all(direct) else [grad if plain else grad.float().contiguous() for grad, plain in zip(grads, direct, strict=True)]
    formats = [config.moment_format, config.lstm_format]
    if ledger is not None and ledger.states is states:
        places = ledger.places if flat is grads else ledger.places._replace(grads=addresses(flat))
    else:
        kept = itemgetter(*(KEYS if "int8" in formats else KEYS[:-1]))
        places = Places.of(params, flat, itertools.chain.from_iterable(map(kept, states)))
    fused = read_directly(params)
    passes = Passes.of({} if ledger is None else ledger.memory, layout, places, fused, formats)
    directions, matrices = passes.directions, Matrices.of(layout, config, torch.get_num_threads())

    rows = torch.empty(CONTROL, len(params), dtype=torch.float32, device="cpu")
    passes.control("gather", rows)
    means = passes.means("moments", SUMS, config.second_moment)
    if not passes.finite:
        finite = means.isfinite().all(0)
        if not finite.all():
            chosen = [k for k, fine in enumerate(finite.tolist()) if fine]
            if ledger is not None:
                ledger.skipped += len(params) - len(chosen)
            if chosen:
                some: Any = ([each[k] for k in chosen] for each in (params, flat, states, lr, weight_decay))
                params, flat, states, lr, weight_decay = some
                step(network, layout.of_some(chosen), params, flat, states, total_steps[chosen], lr, weight_decay, ledger)
            else:
                sit_out(layout)
            return

    # What tensors have once is computed by way of a recording, where there is somewhere to keep it.
    once = run_once if ledger is None else ledger.memory.setdefault("replay", Replay()).of([network, network.config, *once_read])
    step_size, constants, rows = once("before directions", partial(before_directions, network, layout), rows, means, total_steps)
    decays = config.momentum, config.second_moment
    mean_square = passes.means("directions", 1, ctypes.byref(Network(config.hidden_units, *weights)), *decays, constants.data_ptr())[0]
    broken: list[int] = []
    if not passes.finite:
        broken = mean_square.isfinite().logical_not().nonzero().flatten().tolist()
        if ledger is not None:
            ledger.skipped += len(broken)
        for k in broken:
            fused[k], mean_square[k] = False, 0  # these passes are known by `fused`, too, and so are not found again
            directions.split(layout.sizes)[k].zero_()
            passes.forget(k)
        rows[CORRECTION, broken] = math.nan
    passes.control("scatter", rows)

    if any(matrices.orthogonal):
        parts = directions.split(layout.sizes)
        matrices.orthogonalize(directions)
        if matrices.others:
            for k, matrix in orthogonalize_all(parts, layout, config, matrix_dtype(), matrices.others):
                parts[k].copy_(matrix)
        if decayed := [k for k, chosen in enumerate(matrices.orthogonal) if chosen and weight_decay[k]]:
            mean_square[decayed] = torch.cat(layout.mean_squares(parts, decayed))
    rates, decays_of = layout.per_tensor(lr), layout.per_tensor(weight_decay)
    kinds = matrices.is_orthogonal, layout.is_plain
    (factors,) = once("before update", partial(before_update, network), mean_square, *kinds, step_size, rates, decays_of)
    passes.run("apply", factors.data_ptr())
    if not all(fused):
        parts = directions.split(layout.sizes)
        for k, (param, fuse, part, (share, factor)) in enumerate(zip(params, fused, parts, factors.tolist(), strict=True)):
            if not fuse and k not in broken:
                param.add_(factor * part.view(param.shape) - share * param)
