"""The update rule on a GPU, in place: passes over coordinates in Triton (`gpu_passes`), all that tensors have once in torch.

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

Shapes: as in `learned_optim.rule`; `B` blocks, `C` chunks of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks.state import Ledger
from ..config import FORMATS
from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import CONTROL, State, is_orthogonal, orthogonalize_all
from ..sharding import Run, ShardedLayout
from . import before_directions, before_update, read_once
from . import gpu_passes as passes
from .gpu_passes import ALIGNMENT, BLOCK, CHUNK, FIELDS, LOG2E, SUMS
from .gpu_replay import Program, upload
from .replay import Replay, run_once

MAX_UNITS = 8  # as on a CPU; more would not fit into registers
WARPS = {ALIGNMENT: 4, 1: 8}  # of a program; where a thread loads number by number, fewer of them leave more registers for addresses
KEPT_TABLES = 8  # of an optimizer, whose gradients may lie at a few places in turn
INTERPRETED = triton.knobs.runtime.interpret
REPLAYED = not INTERPRETED  # whether to run recordings, each of whose instructions takes the interpreter some hundredths of a second

# Of parameters and gradients that the kernels read.
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MATRIX_DTYPE = torch.bfloat16  # that matrices are orthogonalised in, as in Muon


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
        return Tables(tensors, blocks, chunks, counts, of["orthogonal"].float())


class Launch(NamedTuple):
    """Neighbouring blocks that one program serves: what it is compiled for need not be looked at in each block."""

    begin: int
    blocks: int
    grad: Any  # the gradients' dtype in Triton
    param: Any  # the parameters' too; None where they are left to torch
    align: int  # how many bytes all addresses and sizes are multiples of
    cut: bool  # whether some of them lie in several stretches of a whole tensor


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
    """One step of the rule, see `learned_optim.kernels.reference.step`."""
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
        means, sums = directions.new_empty(SUMS, count), directions.new_empty(len(tables.blocks), SUMS)
        totals = directions.new_empty(len(tables.chunks), SUMS, dtype=torch.float64)
        finite = directions.new_empty(count)

        def mean(columns: int) -> Tensor:
            """Means over whole tensors of what the last pass added up, (columns, K)."""
            passes.add_up[chunks](tables.tensors, tables.chunks, sums, totals, columns)
            passes.means[every](tables.tensors, totals, means, count, columns)
            return total(means[:columns])

        def total(values: Tensor) -> Tensor:
            return layout.total(values) if isinstance(layout, ShardedLayout) else values

        passes.gather[every](tables.tensors, rows, count)
        for begin, blocks, grad, _, align, _ in launches:
            of_pass = sums, config.second_moment, moment_format, grad, align
            passes.moments[blocks,](tables.tensors, tables.blocks, begin, *of_pass, num_warps=WARPS[align])
        found_means = mean(SUMS)
        passes.judge[every](rows, found_means, finite, ledger.skipped, count)

        def before(*arguments: Tensor) -> Sequence[Tensor]:
            gates = -LOG2E * torch.cat([lstm.gate_bias[:, None], lstm.gate_weight], 1)
            return gates, 2 * LOG2E * lstm.candidate_weight, *before_directions(network, layout, *arguments)

        gates, candidates, step_size, constants, new_rows = once("before directions", before, rows, found_means, total_steps)
        weights = gates, candidates, lstm.skip, lstm.out
        of_network = *weights, config.momentum, config.second_moment, config.hidden_units, moment_format, lstm_format
        of_tensors = rows, finite, constants  # the first row is the clocks
        for begin, blocks, grad, _, align, cut in launches:
            of_launch = *of_tensors, directions, sums, *of_network, grad, align, cut
            passes.directions[blocks,](tables.tensors, tables.blocks, begin, *of_launch, num_warps=WARPS[align])
        (mean_square,) = mean(1)
        passes.judge_again[every](mean_square, finite, ledger.skipped)

        parts = [part[:size] for part, size in zip(directions.split(padded), layout.sizes, strict=True)]
        for k, matrix in orthogonalize_all(parts, layout, config, MATRIX_DTYPE):
            parts[k].copy_(matrix)
        if any(weight_decay) and any(orthogonal):
            mean_square = total(torch.stack(torch._foreach_norm(parts)).square()) / tables.counts
        kinds = tables.orthogonal, layout.is_plain
        rates = layout.per_tensor(lr), layout.per_tensor(weight_decay)
        (factors,) = once("before update", partial(before_update, network), mean_square, *kinds, step_size, *rates)
        for begin, blocks, _, param, align, _ in launches:
            if param is not None:
                what = finite, directions, factors, param, align
                passes.apply[blocks,](tables.tensors, tables.blocks, begin, *what, num_warps=WARPS[align])
        passes.scatter[every](tables.tensors, finite, new_rows, count)
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
    kinds: list[tuple[int, int, int, bool]] = []  # of one kind tensors have neighbouring blocks
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
        of_types = types.index(grad.dtype), types.index(param.dtype) if fused[k] else len(types)
        kinds.append((ALIGNMENT if aligned else 1, *of_types, run.width < size))
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
