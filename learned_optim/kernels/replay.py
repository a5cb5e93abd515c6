"""Arithmetic on a few numbers, recorded of PyTorch operations and replayed in C, or on a GPU (`learned_optim.kernels.gpu_replay`).

What tensors have once takes some two hundred PyTorch operations a step, each of which costs a microsecond before it has computed
anything: for a small model that would be most of its step. So functions of the rule are called with a recorder around them, which notes
the operations that they are made of, and from then on one loop runs these. The rule stays the only definition.

Only what has no side effects, depends on nothing but its arguments and tensors that live on, and branches on no number can be recorded.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .native import load

INTERFACE = 1  # as in the C file

# As in the C file; then which of ATen's operations have the same arguments.
OPERATIONS = (
    *("load", "copy", "add", "sub", "mul", "div", "pow", "maximum", "minimum", "greater", "less", "equal", "unequal"),
    *("abs", "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "where", "clamp", "lerp", "sum"),
)
aten = torch.ops.aten
PLAIN = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.pow.Tensor_Tensor: "pow",
    aten.pow.Scalar: "pow",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.gt.Scalar: "greater",
    aten.lt.Scalar: "less",
    aten.eq.Tensor: "equal",
    aten.ne.Scalar: "unequal",
    aten.abs.default: "abs",
    aten.neg.default: "neg",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.where.self: "where",
    aten.lerp.Tensor: "lerp",
    aten.lerp.Scalar: "lerp",
}
CONSTANT = (aten.scalar_tensor.default, aten.full.default)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loop, or None as in `load`."""
    loaded = load("arithmetic", INTERFACE)
    if loaded is None:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.replay.argtypes = [pointer, integer, pointer, pointer]
    loaded.means.argtypes = [pointer, pointer, integer, integer, pointer, integer, pointer, pointer]
    return loaded


class Unrecordable(Exception):
    """Something that this file does not know; the function runs as it is."""


class Recorder(TorchDispatchMode):
    """Notes operations on tensors of up to two dimensions, in the order in which they are called."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.trouble: str | None = None
        self.instructions: list[int] = []
        self.constants: list[tuple[int, Tensor | float]] = []
        self.outside: list[Tensor] = []  # what is loaded, each time anew
        self.loaded: list[int] = []  # where it goes
        self.size = 0  # of the arena
        # Of each piece of memory: where its first number would be in the arena, and which of its numbers are there. Tensors are kept, so
        # that no other one gets their memory.
        self.places: dict[int, tuple[int, range]] = {}
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.trouble is None:
            try:
                self.note(func, args, kwargs or {}, out)
            except Unrecordable as error:
                self.trouble = str(error)
        return out

    def load(self, tensor: Tensor) -> None:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != self.device:
            raise Unrecordable(f"a tensor of {tensor.dtype} with strides {tensor.stride()} on {tensor.device}")
        self.loaded.append(self.room(tensor))
        self.emit("load", tensor, [])
        self.instructions[-9] = len(self.outside)  # in place of its first argument's place
        self.outside.append(tensor)

    def room(self, tensor: Tensor) -> int:
        """Where a new tensor begins in the arena."""
        self.alive.append(tensor)
        begin = int(tensor.storage_offset())
        self.places[tensor.untyped_storage().data_ptr()] = self.size - begin, range(begin, begin + tensor.numel())
        return self.reserve(tensor.numel())

    def reserve(self, count: int) -> int:
        self.size += count
        return self.size - count

    def first(self, tensor: Tensor) -> int:
        """Where a tensor's first number is in the arena; one from outside is loaded."""
        memory, begin = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
        if memory not in self.places:
            self.load(tensor)
        zero, known = self.places[memory]
        last = begin + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if begin not in known or last not in known:  # tensors from outside that lie side by side, or in one another
            raise Unrecordable("memory of which something else was loaded")
        return zero + begin

    def place(self, value: Any, shape: Sequence[int]) -> list[int]:
        """Where an argument's numbers are once it is broadcast to a shape: the first one, and strides."""
        if not isinstance(value, Tensor):
            self.constants.append((self.reserve(1), float(value)))
            return [self.constants[-1][0], 0, 0]
        strides = [0, 0, *value.expand(tuple(shape)).stride()][-2:]
        return [self.first(value), *strides]

    def emit(self, operation: str, out: Tensor, args: Sequence[Any], shape: Sequence[int] | None = None) -> None:
        shape = out.shape if shape is None else shape  # that is gone through
        if len(shape) > 2:
            raise Unrecordable(f"a tensor of shape {tuple(shape)}")
        inputs = [self.place(value, shape) for value in args]
        rows, columns = [1, 1, *shape][-2:]
        places = [self.place(out, out.shape), *inputs, *[[0, 0, 0]] * (3 - len(inputs))]
        self.instructions += [OPERATIONS.index(operation), rows, columns, *(number for place in places for number in place)]

    def note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        outputs: list[Any] = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else [None]
        if func._schema.is_mutable or not all(isinstance(one, Tensor) for one in outputs):
            raise Unrecordable(f"{func}, which changes something or returns numbers")
        if func.is_view:
            self.first(args[0])
            return
        if any(one.untyped_storage().data_ptr() in self.places for one in outputs) or not out.is_contiguous():
            raise Unrecordable(f"{func}, whose result has gaps or is an argument")
        place = self.room(out)
        if func in CONSTANT:
            self.constants.append((place, out))
        elif func in PLAIN and not kwargs:
            self.emit(PLAIN[func], out, args)
        elif func == aten._to_copy.default and out.dtype == torch.float32 and kwargs.keys() == {"dtype"}:
            self.emit("copy", out, args)
        elif func == aten.rsub.Scalar and len(args) == 2 and not kwargs:
            self.emit("sub", out, args[::-1])
        elif func == aten.pow.Tensor_Scalar and args[1] == 2:
            self.emit("mul", out, [args[0], args[0]])
        elif func == aten.clamp.default:
            value, low, high = [*args, None][:3]
            self.emit("clamp", out, [value, -math.inf if low is None else low, math.inf if high is None else high])
        elif func == aten.stack.default:
            for part, target in zip(args[0], out.unbind(*args[1:]), strict=True):
                self.emit("copy", target, [part])
        elif func == aten.cat.default:
            dimension = [*args, 0][1]
            for part, target in zip(args[0], out.split([part.shape[dimension] for part in args[0]], dimension), strict=True):
                self.emit("copy", target, [part])
        elif func in (aten.sum.dim_IntList, aten.mean.dim) and len(args[1]) == 1 and not kwargs:
            moved = args[0].movedim(args[1][0], -1)
            self.emit("sum", out.reshape(moved.shape[:-1]).unsqueeze(-1), [moved], moved.shape)
            if func == aten.mean.dim:
                self.emit("div", out, [out, moved.shape[-1]])
        else:
            raise Unrecordable(f"{func} with {kwargs}")


class Program:
    """A recorded function, for arguments of the same shapes. What `run` returns is overwritten by the next call."""

    def __init__(self, recorder: Recorder, arguments: int, results: Sequence[Tensor]) -> None:
        firsts = [recorder.place(value, value.shape)[0] for value in results]
        self.instructions = self.upload(recorder.instructions, recorder.device).view(-1, 15)
        self.arena = torch.zeros(recorder.size, dtype=torch.float32, device=recorder.device)
        for place, constant in recorder.constants:
            if isinstance(constant, Tensor):
                self.arena[place : place + constant.numel()] = constant.flatten()
            else:
                self.arena[place].fill_(constant)
        self.outside = recorder.outside[arguments:]
        self.results = [self.arena.as_strided(value.shape, value.stride(), first) for value, first in zip(results, firsts, strict=True)]
        self.prepare(recorder)

    def upload(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def prepare(self, recorder: Recorder) -> None:
        addresses = self.instructions.data_ptr(), len(self.instructions), self.arena.data_ptr()
        self.call = functools.partial(getattr(library(), "replay"), *addresses)  # noqa: B009  it may be None for all that mypy knows

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        sources = [value.contiguous() for value in arguments]
        addresses = array("q", [value.data_ptr() for value in (*sources, *self.outside)])
        self.call(addresses.buffer_info()[0])
        return self.results


class Replay:
    """Runs functions of the rule for one optimizer; a function is known by its name and the last dimension of its first argument.

    Args:
        make: of a recording what runs it.
    """

    def __init__(self, make: type[Program] = Program) -> None:
        self.make = make
        self.programs: dict[Any, Program | str] = {}
        self.read: list[Any] = []

    def of(self, read: list[Any]) -> Replay:
        """Itself; where what functions read besides their arguments is not what it was, without what was recorded."""
        if len(read) != len(self.read) or any(one is not other for one, other in zip(read, self.read, strict=True)):
            self.programs, self.read = {}, read
        return self

    def known(self, name: str, function: Callable[..., Sequence[Tensor]], *arguments: Tensor) -> Sequence[Tensor]:
        """Without making a recording."""
        program = self.programs.get((name, arguments[0].shape[-1]))
        return program.run(arguments) if isinstance(program, Program) else function(*arguments)

    def __call__(self, name: str, function: Callable[..., Sequence[Tensor]], *arguments: Tensor) -> Sequence[Tensor]:
        key = name, arguments[0].shape[-1]
        if key not in self.programs:
            self.programs[key], results = record(function, arguments, self.make)
            if isinstance(self.programs[key], str):
                return results
        return self.known(name, function, *arguments)


def record(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], make: type[Program]
) -> tuple[Program | str, Sequence[Tensor]]:
    """A function's program, or why it has none; and what it returned."""
    device = arguments[0].device
    recorder, copies = Recorder(device), [value.clone(memory_format=torch.contiguous_format) for value in arguments]
    try:
        for value in copies:
            recorder.load(value)
    except Unrecordable as error:
        return str(error), function(*arguments)
    with device, recorder:  # whatever the default device
        results = function(*copies)
    try:
        return recorder.trouble or make(recorder, len(arguments), results), results
    except Unrecordable as error:  # of a result
        return str(error), results


def run_once(name: str, function: Callable[..., Sequence[Tensor]], *arguments: Tensor) -> Sequence[Tensor]:
    """Called like a `Replay`; records nothing."""
    return function(*arguments)
