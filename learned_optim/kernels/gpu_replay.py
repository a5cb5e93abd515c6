"""Recorded arithmetic (`learned_optim.kernels.replay`) on a GPU: one kernel of one program, in place of some two hundred small ones.

Its threads take the numbers of an instruction side by side, and wait for each other before the next one. Importing this module imports
Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import replay

WIDTH = 256  # numbers of an instruction that are computed at once
_WIDTH, _LN2 = tl.constexpr(WIDTH), tl.constexpr(math.log(2))
# As in `replay.OPERATIONS`.
_LOAD, _COPY, _ADD, _SUB, _MUL, _DIV, _POW, _MAXIMUM, _MINIMUM, _GREATER, _LESS, _EQUAL, _UNEQUAL = map(tl.constexpr, range(13))
_ABS, _NEG, _EXP, _LOG, _SQRT, _RSQRT, _RECIPROCAL, _WHERE, _CLAMP, _LERP, _SUM = map(tl.constexpr, range(13, len(replay.OPERATIONS)))


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers, (n,), by a copy that nobody waits for."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Program(replay.Program):
    """Arguments and what lives on are copied into the arena by one operation for all; the kernel does the rest."""

    def upload(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        return upload(numbers, device)

    def prepare(self, recorder: replay.Recorder) -> None:
        places = zip(recorder.loaded, recorder.outside, strict=True)
        self.inputs = [self.arena[first : first + value.numel()].view(value.shape) for first, value in places]

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, [*arguments, *self.outside])
        _replay[1,](self.instructions, len(self.instructions), self.arena)
        return self.results


@triton.jit(do_not_specialize=["count"])
def _replay(instructions, count, arena):
    """See `arithmetic.c`."""
    place = tl.arange(0, _WIDTH)
    for n in range(count):
        one = instructions + 15 * n
        operation, rows, columns = tl.load(one), tl.load(one + 1), tl.load(one + 2)
        out, out_row, out_column = arena + tl.load(one + 3), tl.load(one + 4), tl.load(one + 5)
        of_x, x_row, x_column = arena + tl.load(one + 6), tl.load(one + 7), tl.load(one + 8)
        of_y, y_row, y_column = arena + tl.load(one + 9), tl.load(one + 10), tl.load(one + 11)
        of_z, z_row, z_column = arena + tl.load(one + 12), tl.load(one + 13), tl.load(one + 14)
        if operation == _SUM:  # over columns: side by side of one row, else one column after the other
            if rows == 1:
                total = tl.zeros((_WIDTH,), tl.float64)
                for begin in range(0, columns, _WIDTH):
                    j = begin + place
                    total += tl.load(of_x + j * x_column, mask=j < columns, other=0.0).to(tl.float64)
                tl.store(out, tl.sum(total).to(tl.float32))
            else:
                for begin in range(0, rows, _WIDTH):
                    i = begin + place
                    total = tl.zeros((_WIDTH,), tl.float64)
                    for j in range(columns):
                        total += tl.load(of_x + i * x_row + j * x_column, mask=i < rows, other=0.0).to(tl.float64)
                    tl.store(out + i * out_row, total.to(tl.float32), mask=i < rows)
        elif operation != _LOAD:
            for begin in range(0, rows * columns, _WIDTH):
                i, j, mask = (begin + place) // columns, (begin + place) % columns, begin + place < rows * columns
                x = tl.load(of_x + i * x_row + j * x_column, mask=mask, other=1.0)
                y = tl.load(of_y + i * y_row + j * y_column, mask=mask, other=1.0)
                z = tl.load(of_z + i * z_row + j * z_column, mask=mask, other=1.0)
                value = x
                if operation == _ADD:
                    value = x + y
                elif operation == _SUB:
                    value = x - y
                elif operation == _MUL:
                    value = x * y
                elif operation == _DIV:
                    value = x / y
                elif operation == _POW:  # one may be subtracted from it, so the last bits count: exp2 is off by two of them
                    power = y * tl.log2(x)
                    rough = tl.exp2(power)
                    value = rough + rough * (power - tl.log2(rough)) * _LN2
                    value = tl.where(y == 0, 1.0, tl.where((rough > 0) & (rough < float("inf")), value, rough))
                elif operation == _MAXIMUM:
                    value = tl.where((x > y) | (x != x), x, y)
                elif operation == _MINIMUM:
                    value = tl.where((x < y) | (x != x), x, y)
                elif operation == _GREATER:
                    value = (x > y).to(tl.float32)
                elif operation == _LESS:
                    value = (x < y).to(tl.float32)
                elif operation == _EQUAL:
                    value = (x == y).to(tl.float32)
                elif operation == _UNEQUAL:
                    value = (x != y).to(tl.float32)
                elif operation == _ABS:
                    value = tl.abs(x)
                elif operation == _NEG:
                    value = -x
                elif operation == _EXP:
                    value = tl.exp(x)
                elif operation == _LOG:
                    value = tl.log(x)
                elif operation == _SQRT:
                    value = tl.sqrt_rn(x)
                elif operation == _RSQRT:
                    value = 1.0 / tl.sqrt_rn(x)
                elif operation == _RECIPROCAL:
                    value = 1.0 / x
                elif operation == _WHERE:
                    value = tl.where(x != 0, y, z)
                elif operation == _CLAMP:
                    value = tl.where(x < y, y, tl.where(x > z, z, x))  # NaN stays
                elif operation == _LERP:
                    value = tl.where(tl.abs(z) < 0.5, x + z * (y - x), y - (y - x) * (1.0 - z))
                tl.store(out + i * out_row + j * out_column, value, mask=mask)
        tl.debug_barrier()
