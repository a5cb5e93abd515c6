"""The update rule on a CPU, in place: passes over coordinates in C, all that tensors have once in torch.

An LSTM step in plain torch makes some forty trips through memory. Here one pass adds up what the step sizes depend on, a second one updates
the moments and runs the LSTM, and what lies between stays in registers and the L1 cache. The compiled file depends on nothing but the
processor.

The first pass only reads. So a tensor with a gradient that is not finite is found before anything was written, and left out.

Shapes: as in `learned_optim.rule`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..checks import Ledger
from ..config import FORMATS
from ..features import BUCKETS, Layout
from ..network import OptimizerNetwork
from ..rule import ADAMW_UPDATE_RMS, CONTROL, Control, State, decide, follow, is_orthogonal, orthogonalize_all, sit_out, vector_scale
from ..sharding import Run, ShardedLayout
from . import scalars

BLOCK = 2**14  # coordinates that a thread takes at once
INTERFACE, MAX_UNITS = 13, 8  # as in the C file

# A row of the table of tensors has the size, three numbers of where its coordinates lie in the whole tensor, the parameter, the gradient,
# the direction and these pieces of state, the last one of int8.
KEYS = ("control", "moments", "lstm", "lstm_scale")
COLUMNS = 7 + len(KEYS)


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
    """The compiled passes, or None where the package was installed without them, or with those of another version."""
    found = importlib.util.find_spec(f"{__package__}.coordinate")
    if found is None or found.origin is None:
        return None
    loaded, job = ctypes.CDLL(found.origin), ctypes.POINTER(Job)
    if not hasattr(loaded, "interface") or loaded.interface() != INTERFACE:  # a clone that was updated and not installed again
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


@functools.lru_cache(maxsize=1)
def pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


@functools.lru_cache(maxsize=4)
def blocks(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(tensor, begin, end) of each block, (count, 3); the tensors' sizes and where they lie in whole ones, (K, 4); sizes of those, (K,)."""
    table = [(k, begin, min(begin + BLOCK, size)) for k, size in enumerate(layout.sizes) for begin in range(0, size, BLOCK)]
    runs = layout.runs or [] if isinstance(layout, ShardedLayout) else [Run(0, size, size) for size in layout.sizes]
    places = [(size, *run) for size, run in zip(layout.sizes, runs, strict=True)]
    return torch.tensor(table, dtype=torch.int64).view(-1, 3), torch.tensor(places), torch.tensor(layout.counts)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def column(places: list[int]) -> Tensor:
    return torch.frombuffer(array("q", places), dtype=torch.int64)


class Passes:
    """Passes over the same tensors.

    Args:
        fused: which parameters are to be changed.
        grads: fp32 without gaps.
        directions: what the second pass writes and the third one reads, (N,).
        formats: of the moments and of the LSTM's state.
        ledger: looks at the state where its addresses are other ones than before; None where the caller has made it itself.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[Tensor],
        fused: Sequence[bool],
        grads: Sequence[Tensor],
        directions: Tensor,
        states: Sequence[State],
        formats: Sequence[str],
        ledger: Ledger | None,
    ) -> None:
        self.layout = layout
        self.blocks, places, self.counts = blocks(layout)
        sizes = places[:, 0]
        self.formats = [FORMATS.index(fmt) for fmt in formats]
        kept = itemgetter(*(KEYS if "int8" in formats else KEYS[:-1]))
        found = addresses(itertools.chain.from_iterable(map(kept, states)))
        if ledger is not None:
            ledger.check_places(found, params, states)
        stored = column(found).view(len(states), -1)
        self.table = torch.zeros(len(states), COLUMNS, dtype=torch.int64)
        self.table[:, :4] = places
        self.table[:, 4] = column(addresses(params)) * torch.frombuffer(bytearray(fused), dtype=torch.uint8)
        self.table[:, 5] = column(addresses(grads))
        self.table[:, 6] = directions.data_ptr() + 4 * (sizes.cumsum(0) - sizes)
        self.table[:, 7 : 7 + stored.shape[1]] = stored
        # A thread needs some 30 microseconds to wake up, in which another has done four blocks.
        self.workers = min(torch.get_num_threads(), len(self.blocks) // 4) - 1

    def run(self, name: str, columns: int, *arguments: object) -> Tensor:
        """Runs a pass. Returns means of its sums over each tensor, (columns, K)."""
        sums = torch.zeros(len(self.blocks), columns, dtype=torch.float64)
        job = Job(self.table.data_ptr(), self.blocks.data_ptr(), len(self.blocks), 0, sums.data_ptr(), *self.formats)
        function = getattr(library(), name)
        others = [pool(self.workers).submit(function, ctypes.byref(job), *arguments) for _ in range(self.workers)]
        function(ctypes.byref(job), *arguments)
        for other in others:
            other.result()
        totals = torch.zeros(len(self.table), columns, dtype=torch.float64).index_add_(0, self.blocks[:, 0], sums)
        if isinstance(self.layout, ShardedLayout):
            totals = self.layout.total(totals.T).T
        return (totals / self.counts[:, None]).float().T

    def control(self, name: str, rows: Tensor) -> None:
        """Runs "gather" or "scatter" on what tensors have once, (CONTROL, K)."""
        getattr(library(), name)(self.table.data_ptr(), len(self.table), rows.data_ptr())


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
    """One step of the rule, see `learned_optim.optimizer.reference_step`."""
    config, lstm = network.config, network.coordinate
    flat = [grad if grad.dtype == torch.float32 and grad.is_contiguous() else grad.float().contiguous() for grad in grads]
    directions = torch.empty(sum(layout.sizes), dtype=torch.float32)
    fused = [param.dtype == torch.float32 and param.is_contiguous() for param in params]
    passes = Passes(layout, params, fused, flat, directions, states, [config.moment_format, config.lstm_format], ledger)

    rows = torch.empty(CONTROL, len(params), dtype=torch.float32)
    passes.control("gather", rows)
    control = Control.of(rows)
    means = passes.run("moments", 4, config.second_moment)
    if not math.isfinite(means.sum()):
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
    clock, step_size, steady, inertia, control = decide(network, layout, means, control, total_steps)
    constants = scalars(clock, steady, inertia)
    decays = config.momentum, config.second_moment
    weights = [weight.data_ptr() for weight in (lstm.gate_weight, lstm.gate_bias, lstm.candidate_weight, lstm.skip, lstm.out)]
    (mean_square,) = passes.run("directions", 1, ctypes.byref(Network(config.hidden_units, *weights)), *decays, constants.data_ptr())

    orthogonal, gain = is_orthogonal(layout, config), vector_scale(network, mean_square, layout.is_table)
    if any(orthogonal):
        parts = directions.split(layout.sizes)
        for k, matrix in orthogonalize_all(parts, layout, config, matrix_dtype()).items():
            parts[k].copy_(matrix)
            gain[k], mean_square[k] = 1.0, 0.0
        if decayed := [k for k, matrix in enumerate(orthogonal) if matrix and weight_decay[k]]:
            mean_square[decayed] = torch.cat(layout.mean_squares(parts, decayed))
    scale, rate = step_size * gain, layout.per_tensor(lr)
    shrink = rate * layout.per_tensor(weight_decay) * scale * mean_square.sqrt() / ADAMW_UPDATE_RMS
    factors = torch.stack([shrink, -rate * scale], -1)
    *sketch, mean_square = passes.run("apply", BUCKETS + 1, factors.data_ptr())
    control = follow(control, clock, torch.stack(sketch) * gain * passes.counts.float().sqrt(), mean_square * gain.square())
    passes.control("scatter", control.rows())
    if not all(fused):
        for param, fuse, part, (share, factor) in zip(params, fused, directions.split(layout.sizes), factors.tolist(), strict=True):
            if not fuse:
                param.add_(factor * part.view(param.shape) - share * param)
