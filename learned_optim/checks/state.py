"""State: what belongs to a parameter, whether a checkpoint's fits, and what kernels may take addresses of."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sharding
from ..config import NetworkConfig
from ..features import Layout
from ..storage import BLOCK, DTYPES, stored
from .parameters import check_place, has_memory, is_finite, is_plain, kind_of

DTYPE = operator.attrgetter("dtype")


def expected(param: Tensor, config: NetworkConfig, controls: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a parameter's state, see `optimizer.init_state`."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"control": ((controls,), torch.float32)}
    for key, tensor in stored(config).items():
        count = sum(tensor.counts)
        found[key] = (count, *param.shape), DTYPES[tensor.fmt]
        if tensor.fmt == "int8":
            found[f"{key}_scale"] = (count, -(-param.numel() // BLOCK)), torch.float32
    return found


def trouble(value: Any, shape: tuple[int, ...], name: str, key: str) -> str | None:
    """Why something is no piece of state of that shape, whatever its dtype; or None."""
    what = f"the state {key!r} of {name}"
    if not isinstance(value, Tensor):
        return f"{what} is no tensor but {value!r:.80}"
    if value.is_nested:
        return f"{what} {kind_of(value)}"
    if tuple(value.shape) != shape:
        return f"{what} has the shape {tuple(value.shape)}, and the parameter as it is now needs {shape}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"{what} is no dense tensor but one of layout {value.layout}"
    if is_plain(value) and not value._is_zerotensor() and not has_memory(value):
        return f"{what} has lost its memory"
    return None


def fitted(param: Tensor, name: str, state: Any, config: NetworkConfig, controls: int) -> dict[str, Tensor]:
    """A parameter's state from a checkpoint as copies that belong to the parameter: on its device, without gaps, and in the configuration's
    dtypes again, where a file holds another precision.

    Raises:
        ValueError: it is not the state of this parameter; the message names the parameter, the tensor and what does not fit.
    """
    if not isinstance(state, dict):
        raise ValueError(f"the state of {name} is no dictionary but {state!r:.80}")
    if param.is_meta:
        raise ValueError(f"{name} is on the device meta, which holds no numbers; load the state after the model has some")
    pieces = expected(param, config, controls)
    sharded = sharding.is_sharded(param)
    if missing := [key for key in pieces if key not in state]:
        raise ValueError(f"the state of {name} lacks {', '.join(missing)}; it has {', '.join(map(str, state)) or 'nothing'}")
    found = {}
    for key, (shape, dtype) in pieces.items():
        value, what = state[key], f"the state {key!r} of {name}"
        problem = trouble(value, shape, name, key)
        if problem is None and value.is_meta:
            problem = f"{what} is on the device meta, which holds no numbers"
        if problem is None and not is_plain(value):
            if not sharded or not sharding.is_sharded(value):
                kind = "sharded" if sharded else "a plain tensor"
                problem = f"{what} is a {type(value).__name__}, and the parameter {kind}"
            elif key == "control" or not sharding.is_behind(value, param):
                problem = f"{what} is sharded otherwise than the parameter"
        if problem is None and (value.is_complex() or value.dtype == torch.bool or (dtype.is_floating_point > value.is_floating_point())):
            problem = f"{what} has the dtype {value.dtype}, which {dtype} cannot be restored from"
        if problem is not None:
            raise ValueError(f"{problem}. Load the checkpoint of this model, or start without its optimizer state.")
        value = value.detach()
        if sharded and key != "control":
            value = sharding.part_of(value, param)
        value = value.resolve_neg()
        if dtype == torch.int8 and value.dtype != dtype:
            levels = value.double()
            if not (levels.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max) == levels).all():
                raise ValueError(f"{what} was kept in {value.dtype} and holds numbers that are no levels of int8")
            value = levels
        copied = value.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
        if dtype.is_floating_point and not copied.isfinite().all():
            raise ValueError(f"{what} holds numbers that are not finite in {dtype}, of {value.dtype} in the checkpoint")
        found[key] = copied
    if problem := impossible(found):
        raise ValueError(f"the state of {name} holds {problem}")
    if sharded:
        return {key: value if key == "control" else sharding.like(param, value, len(value)) for key, value in found.items()}
    return found


def impossible(state: dict[str, Tensor]) -> str | None:
    """Numbers that no step leaves in a state, or None: steps would make NaN of them."""
    for key, value in state.items():
        numbers = value[:1] if key == "moments" else value  # a second moment is a square already
        if value.is_floating_point() and not (value.isfinite().all() and numbers.float().square().isfinite().all()):
            return f"numbers in {key!r} that are not finite, or whose squares are not"
    negative = (state["control"][:1] < 0).any() or (state["moments"][1:] < 0).any()
    return "a negative clock or second moment" if negative else None


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def left_out(
    members: Iterable[tuple[Tensor, Tensor, Any]],
    states: Mapping[Tensor, dict[str, Tensor]],
    keys: Sequence[str],
    name: Callable[[Tensor], str],
) -> str:
    """What to say of tensors that a step has left out.

    Args:
        members: each parameter with its gradient, and what else there is.
        keys: of the states.
    """
    members = list(members)
    broken = [name(param) for param, grad, _ in members if not is_finite(grad)]
    poisoned = [name(param) for param, *_ in members if impossible({key: sharding.local(states[param][key]) for key in keys})]
    said = []
    if broken or not poisoned:
        said.append(
            f"the gradient of {', '.join(broken[:5]) or 'a parameter'} is not finite, or its square is not. Such parameters and their "
            "state stay as they are in that step; with error_if_nonfinite=True the step raises instead."
        )
    if poisoned:
        said.append(
            f"the state of {', '.join(poisoned[:5])} is not finite: something has written to it. Such parameters stay as they are until "
            "their entry of optimizer.state is deleted, and then begin anew."
        )
    return f"{' '.join(said)} The others move on; the optimizer's attribute `skipped` counts them, and this is said once."


class Places(NamedTuple):
    """Addresses of parameters, gradients and state, of which each tensor's pieces come one after the other."""

    params: list[int]
    grads: list[int]
    states: list[int]

    @staticmethod
    def of(params: Iterable[Tensor], grads: Iterable[Tensor], pieces: Iterable[Tensor]) -> Places:
        return Places(addresses(params), addresses(grads), addresses(pieces))


class Ledger:
    """What an optimizer knows of a device: how often tensors were left out of a step, and which tensors its kernels may take addresses of.

    To look at each parameter and its state anew at each step would take a share of small models' steps that shows. So what was found to fit
    is kept, and looked at again only where a tensor, its address, dtype or shape is another one.
    """

    def __init__(self, device: torch.device, config: NetworkConfig, controls: int, name: Callable[[Tensor], str]) -> None:
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.config, self.controls, self.name = config, controls, name
        self.keys = tuple(expected(torch.empty(0), config, controls))
        self.kept = itemgetter(*self.keys)
        self.memory: dict[Any, Any] = {}  # what kernels want to find again at the next step
        self.places = Places([], [], [])  # of what was looked at last
        self.states: Sequence[dict[str, Any]] = []
        self._layout: Layout | None = None
        self._tensors: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []

    def check(self, layout: Layout, params: Sequence[Tensor], grads: list[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """Refuses parameters, gradients and states that do not fit each other.

        Args:
            layout: of the parameters' shapes.
            grads: those that are zeros without memory are replaced by zeros.

        Raises:
            RuntimeError: with the parameter's name and what does not fit.
        """
        try:
            pieces = list(itertools.chain.from_iterable(map(self.kept, states)))
            places = Places.of(params, grads, pieces)
        except (KeyError, TypeError, RuntimeError):  # a piece is missing, no tensor, or one that has no address
            self._look(params, states)
            raise
        if 0 in places.grads:
            for k, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad._is_zerotensor():
                    grads[k] = grad.clone()
                elif not has_memory(grad):
                    raise RuntimeError(f"the gradient of {self.name(param)} has lost its memory; call zero_grad() where that was freed")
            places = places._replace(grads=addresses(grads))
        tensors, dtypes = [*params, *pieces], list(map(DTYPE, params))
        same = layout is self._layout and len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        # Of the same tensors addresses change where somebody swapped their memory.
        if not same or places.params != self.places.params or places.states != self.places.states or dtypes != self._dtypes:
            self._look(params, states)
            # Parts of sharded tensors are others at each step, and a GPU would have to be waited for.
            if layout.device.type == "cpu" and not isinstance(layout, sharding.ShardedLayout):
                self._look_at_numbers(params, states)
            self._layout, self._tensors, self._dtypes = layout, tensors, dtypes
        self.places, self.states = places, states

    def _look(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        seen: set[int] = set()
        for param, state in zip(params, states, strict=True):
            name = self.name(param)
            check_place(param, name)
            for key, (shape, dtype) in expected(param, self.config, self.controls).items():
                if key not in state:
                    raise RuntimeError(f"the state of {name} lacks {key!r}; it has {', '.join(map(str, state)) or 'nothing'}")
                value = state[key]
                problem = trouble(value, shape, name, key)
                if problem is None and (value.dtype != dtype or value.device != param.device):
                    problem = f"the state {key!r} of {name} is {value.dtype} on {value.device}, and must be {dtype} on {param.device}"
                if problem is None and not (is_plain(value) and value.is_contiguous() and not value.is_neg() and has_memory(value)):
                    problem = f"the state {key!r} of {name} is no plain tensor without gaps that has memory of its own"
                if problem is None and value.is_inference():
                    problem = f"the state {key!r} of {name} was made in inference mode, and cannot be changed in place outside"
                if problem is None and value.numel() and value.data_ptr() in seen:
                    problem = f"the state {key!r} of {name} is in the memory of other state"
                if problem is not None:
                    raise RuntimeError(
                        f"{problem}. Where a parameter was replaced or grew, delete its optimizer.state entry to start anew."
                    )
                seen.add(value.data_ptr())

    def _look_at_numbers(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        for param, state in zip(params, states, strict=True):
            if state["control"][0] == 0:  # not begun
                continue
            if problem := impossible(dict(zip(self.keys, self.kept(state), strict=True))):
                raise RuntimeError(f"the state of {self.name(param)} holds {problem}; delete its optimizer.state entry to start anew")
