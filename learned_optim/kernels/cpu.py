"""The update rule on a CPU, in place: passes over coordinates in C, all that tensors have once in torch.

An LSTM step in plain torch makes some forty trips through memory. Here one pass updates the moments and adds up what the step sizes depend
on, a second one runs the LSTM, and what lies between stays in registers and the L1 cache. The compiled file depends on nothing but the
processor.

Shapes: as in `learned_optim.rule`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..config import FORMATS
from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import Clock, State, is_orthogonal, orthogonalize_all, step_sizes, vector_scale

BLOCK = 2**14  # coordinates that a thread takes at once
MAX_UNITS = 8  # as in the C file


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
    """The compiled passes, or None where the package was installed without them."""
    found = importlib.util.find_spec(f"{__package__}.coordinate")
    if found is None or found.origin is None:
        return None
    loaded, job = ctypes.CDLL(found.origin), ctypes.POINTER(Job)
    loaded.moments.argtypes = [job, ctypes.c_float, ctypes.c_float]
    loaded.directions.argtypes = [job, ctypes.POINTER(Network), ctypes.c_void_p]
    return loaded


def trouble(network: OptimizerNetwork) -> str | None:
    """Why the compiled passes cannot run this network, or None."""
    if library() is None:
        return (
            "learned_optim was installed without its compiled kernel: there was no C compiler, or it failed. Install gcc or clang, and "
            "then the package again, with pip's options --force-reinstall --no-deps."
        )
    if network.config.hidden_units > MAX_UNITS:
        return f"the compiled kernel runs networks of up to {MAX_UNITS} hidden units, and this one has {network.config.hidden_units}."
    return None


@functools.lru_cache(maxsize=1)
def pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


@functools.lru_cache(maxsize=4)
def blocks(layout: Layout) -> Tensor:
    """(tensor, begin, end) of each block, (count, 3)."""
    table = [(k, begin, min(begin + BLOCK, size)) for k, size in enumerate(layout.sizes) for begin in range(0, size, BLOCK)]
    return torch.tensor(table)


class Passes:
    """Passes over the same tensors.

    Args:
        table: the tensors, a row each, as the C file describes them.
        formats: of the moments and of the LSTM's state, as numbers.
    """

    def __init__(self, layout: Layout, table: Sequence[Sequence[int]], formats: Sequence[int]) -> None:
        self.tensors, self.sizes, self.formats = torch.tensor(table), layout.sizes, formats
        self.blocks = blocks(layout)
        # A thread needs some 30 microseconds to wake up, in which another has done four blocks.
        self.workers = min(torch.get_num_threads(), len(self.blocks) // 4) - 1

    def run(self, name: str, columns: int, *arguments: object) -> Tensor:
        """Runs a pass. Returns means of its sums over each tensor, (columns, K)."""
        sums = torch.zeros(len(self.blocks), columns, dtype=torch.float64)
        job = Job(self.tensors.data_ptr(), self.blocks.data_ptr(), len(self.blocks), 0, sums.data_ptr(), *self.formats)
        function = getattr(library(), name)
        others = [pool(self.workers).submit(function, ctypes.byref(job), *arguments) for _ in range(self.workers)]
        function(ctypes.byref(job), *arguments)
        for other in others:
            other.result()
        totals = torch.zeros(len(self.tensors), columns, dtype=torch.float64).index_add_(0, self.blocks[:, 0], sums)
        return (totals / self.tensors[:, :1]).float().T


def scales_of(state: State) -> list[int]:
    return [state[key].data_ptr() for key in ("hidden_scale", "cell_scale")] if "cell_scale" in state else [0, 0]


def update(
    network: OptimizerNetwork, layout: Layout, grads: Sequence[Tensor], states: Sequence[State], total_steps: Tensor
) -> list[Tensor]:
    """One step of the rule.

    Args:
        grads: each tensor's gradient.
        states: each tensor's state, see `learned_optim.optimizer.init_state`; changed in place.
        total_steps: (K,).

    Returns:
        what to add to each parameter, (n,).
    """
    config, lstm = network.config, network.coordinate
    flat = [grad.float().contiguous() for grad in grads]
    direction = torch.empty(sum(layout.sizes), dtype=torch.float32).split(layout.sizes)
    steps, corrections = [state["step"] for state in states], [state["correction"] for state in states]
    step = torch.stack(steps)
    keys = ["momentum", "second_moment", "hidden", "cell"]
    table = [
        [size, clock, grad.data_ptr(), *(state[key].data_ptr() for key in keys), *scales_of(state), out.data_ptr()]
        for size, clock, grad, state, out in zip(layout.sizes, step.int().tolist(), flat, states, direction, strict=True)
    ]
    passes = Passes(layout, table, [FORMATS.index(config.moment_format), FORMATS.index(config.lstm_format)])

    *products, second_moment = passes.run("moments", 4, config.momentum, config.second_moment)
    clock = Clock.after(step, second_moment, config)
    step_size, correction = step_sizes(network, clock, torch.stack(products), torch.stack(corrections), total_steps)
    scalars = torch.stack([1 / clock.correction1, 1 / clock.correction2, clock.mean], -1)
    weights = [weight.data_ptr() for weight in (lstm.gate_weight, lstm.gate_bias, lstm.candidate_weight, lstm.skip, lstm.out)]
    (mean_square,) = passes.run("directions", 1, ctypes.byref(Network(config.hidden_units, *weights)), scalars.data_ptr())

    orthogonal = torch.tensor(is_orthogonal(layout, config))
    scale = -step_size * torch.where(orthogonal, 1.0, vector_scale(network, mean_square))
    changes = orthogonalize_all(direction, layout, config)
    torch._foreach_mul_(changes, scale.tolist())
    torch._foreach_copy_(steps, clock.step.unbind())
    torch._foreach_copy_(corrections, correction.unbind())
    return changes
