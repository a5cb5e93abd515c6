"""What a `LearnedOptimizer` looks at before anything moves: hyperparameters, parameters, gradients, and state that others had in hand.

Kernels take addresses, so a tensor of another size, dtype or device would have them read and write where nothing of theirs is.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .config import NetworkConfig
from .features import Layout
from .storage import BLOCK, DTYPES, stored

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a group may say, and what it may carry for others: schedulers of torch and timm leave these there.
OPTIONS = ("lr", "weight_decay", "total_steps", "maximize", "matrices", "stacked", "weights")
CARRIED = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale")

LATER = ("maximize", "matrices", "stacked")  # options that checkpoints from before them lack

SMALL_LR = 0.01  # up to here an lr is more likely AdamW's than a multiplier


# Hyperparameters


def check_keys(group: dict[str, Any]) -> None:
    """Refuses a group with an option that would be ignored."""
    if unknown := sorted(str(key) for key in group if key not in OPTIONS + CARRIED):
        raise ValueError(
            f"LearnedOptimizer does not know the group option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, and would ignore what "
            f"is meant by it; leave it out. A group has {', '.join(OPTIONS[:-1])}."
        )


def check_caller(frame: FrameType, parts_group: object) -> None:
    """Refuses to be one of the parts of ZeroRedundancyOptimizer without knowing it: nothing else shows that the parameters of an optimizer
    are not the whole model, and steps would be longer without a word.

    Args:
        frame: of what builds the optimizer.
    """
    if parts_group is None and frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer gives each process a part of the model, and LearnedOptimizer must know of it: give it "
            "functools.partial(LearnedOptimizer, parts_group=torch.distributed.group.WORLD, ...) as optimizer_class, with all other "
            "arguments in there too, or shard the model with torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def check_group(group: dict[str, Any]) -> None:
    """Refuses numbers that are none or out of range, and puts Python's own in place of NumPy's, which checkpoints would not load with
    `weights_only=True`."""
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif isinstance(lr, numbers.Real):
        group["lr"] = lr = float(lr)
    else:
        raise ValueError(f"lr must be a number or a tensor with one element, got {lr!r}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr multiplies the learned update and must not be negative, got {lr}, and must be finite; 1.0 is the default")
    if not isinstance(weight_decay, numbers.Real) or not 0 <= float(weight_decay) < math.inf:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}, and must be finite")
    group["weight_decay"] = float(weight_decay)
    for key, what in (("total_steps", "optimizer steps"), ("matrices", "matrices in the whole model")):
        count = group[key]
        if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
            raise ValueError(f"{key} must be a positive number of {what}, or None where it is not known; got {count!r}")
        group[key] = count if count is None else int(count)
    for key in ("maximize", "stacked"):
        if group[key] not in (True, False):
            raise ValueError(f"{key} must be True or False, got {group[key]!r}")
        group[key] = bool(group[key])


# Parameters and gradients


def is_plain(tensor: Tensor) -> bool:
    """Whether the numbers lie in the tensor's own memory, rather than in other tensors that a subclass holds."""
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor).__torch_dispatch__ == Tensor.__torch_dispatch__


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses a parameter that cannot be trained in place.

    Raises:
        ValueError: with the parameter's name and the reason.
    """
    # FSDP1 marks its flat parameters, and with use_orig_params=True those that are views of one.
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), which lays the parameters of a layer end to end in one vector and cuts "
            "that up, and LearnedOptimizer needs to know which numbers are a matrix. Wrap the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead (in accelerate and Trainer: fsdp_version 2)."
        )
    if hasattr(param, "ds_id"):
        raise ValueError(
            f"{name} belongs to DeepSpeed's ZeRO, which lays parameters end to end in one vector and cuts that up, and LearnedOptimizer "
            "needs to know which numbers are a matrix. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    if sharding.is_sharded(param) and (problem := sharding.trouble(param)):
        raise ValueError(f"LearnedOptimizer cannot train {name} of shape {tuple(param.shape)}, a DTensor: it {problem}")
    if param.dtype not in PARAMETER_DTYPES:
        raise ValueError(
            f"LearnedOptimizer trains real floating-point parameters, got one of dtype {param.dtype} and shape {tuple(param.shape)}, "
            f"{name}. It takes float32, float64, bfloat16 and float16."
        )
    if param.layout is not torch.strided:
        raise ValueError(f"LearnedOptimizer trains dense parameters, and {name} has the layout {param.layout}")
    if param.is_neg():
        raise ValueError(f"{name} is a negated view, which cannot be changed in place; build it of tensor.resolve_neg()")
    if is_plain(param) and any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"several elements of {name} are one place in memory (an expanded tensor); build it of tensor.contiguous()")


def check_place(param: Tensor, name: str) -> None:
    """Refuses, at a step, what `check_parameter` lets pass as long as it is not trained.

    Raises:
        RuntimeError: with the parameter's name and the reason.
    """
    part = sharding.local(param)
    if not is_plain(part):
        raise RuntimeError(
            f"LearnedOptimizer trains plain tensors and DTensors of them, and {name} is a {type(part).__name__}, which keeps its numbers "
            "elsewhere"
        )
    try:
        check_parameter(param, name)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def check_format(param: Tensor, name: str, config: NetworkConfig) -> None:
    """Refuses a sharded parameter where the state's format does not shard.

    Raises:
        RuntimeError: with the parameter's name and the reason.
    """
    if sharding.is_sharded(param) and config.lstm_format == "int8":
        raise RuntimeError(
            f"{name} is sharded, and these weights keep their state in int8, of which {BLOCK} neighbours share a scale: parts would "
            "cut through them, and a checkpoint could not be cut in another way. Use pretrained='default', whose state is sharded with the "
            "model."
        )


def check_flattened(group: dict[str, Any], given: list[int], name: str) -> None:
    """Refuses a group whose parameters DeepSpeed's ZeRO has replaced by one vector since it was added.

    Args:
        given: how many dimensions each parameter had then.

    Raises:
        RuntimeError: with the reason.
    """
    params = group["params"]
    if len(params) == 1 and params[0].ndim == 1 and (len(given) > 1 or max(given, default=1) > 1):
        raise RuntimeError(
            f"{name} is one vector in place of the {len(given)} parameters that its group was given, as DeepSpeed's ZeRO makes them. "
            "LearnedOptimizer needs to know which numbers are a matrix. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def usable_gradient(grad: Tensor, param: Tensor, name: str) -> Tensor:
    """A gradient that is no plain dense tensor as one; of a sharded parameter this process's part, in fp32 or what else it is in.

    Raises:
        RuntimeError: it is sparse, of a class that keeps its numbers elsewhere, or sharded where the parameter is not.
    """
    check = f"and {name} of shape {tuple(grad.shape)} has one"
    if grad.is_sparse or grad.layout is not torch.strided:
        raise RuntimeError(
            f"LearnedOptimizer does not support sparse gradients, {check} of layout {grad.layout}. "
            "Build its embedding with sparse=False, or give it to torch.optim.SparseAdam."
        )
    if sharding.is_sharded(grad):
        if not sharding.is_sharded(param):
            raise RuntimeError(f"LearnedOptimizer takes sharded gradients of sharded parameters only, {check}")
        grad = sharding.gradient_of(grad, param)
    if not is_plain(grad):
        raise RuntimeError(f"LearnedOptimizer reads plain gradients, {check} of class {type(grad).__name__}")
    grad = grad.detach().as_subclass(Tensor).resolve_neg()
    return grad.clone() if grad._is_zerotensor() else grad  # which has no memory


def is_finite(grad: Tensor) -> bool:
    """Whether a step can be made of a gradient: whether its square is a number in fp32."""
    return bool(grad.detach().float().square().sum().isfinite())


# State


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
    if tuple(value.shape) != shape:
        return f"{what} has the shape {tuple(value.shape)}, and the parameter as it is now needs {shape}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"{what} is no dense tensor but one of layout {value.layout}"
    return None


def fitted(param: Tensor, name: str, state: Any, config: NetworkConfig, controls: int) -> dict[str, Tensor]:
    """A parameter's state from a checkpoint as copies that belong to the parameter: on its device, without gaps, and in the configuration's
    dtypes again, where a file holds another precision.

    Raises:
        ValueError: it is not the state of this parameter; the message names the parameter, the tensor and what does not fit.
    """
    if not isinstance(state, dict):
        raise ValueError(f"the state of {name} is no dictionary but {state!r:.80}")
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
            levels = value.double().round()
            if not (levels == value).all() or (levels.abs() > -torch.iinfo(dtype).min).any():
                raise ValueError(f"{what} was kept in {value.dtype} and holds numbers that are no levels of int8")
            value = levels
        copied = value.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
        if dtype.is_floating_point and not copied.isfinite().all():
            raise ValueError(f"{what} holds numbers that are not finite in {dtype}, of {value.dtype} in the checkpoint")
        found[key] = copied
    if (found["control"][:1] < 0).any() or (found["moments"][1:] < 0).any():
        raise ValueError(f"the state of {name} holds a negative clock or second moment, which none ever is")
    if sharded:
        return {key: value if key == "control" else sharding.like(param, value, len(value)) for key, value in found.items()}
    return found


class Ledger:
    """What an optimizer knows of a device: how often tensors were left out of a step, and which tensors its kernels may take addresses of.

    To look at the state of each parameter anew at each step would take a share of small models' steps that shows. So what was found to fit
    is kept, and looked at again only where a tensor, its address or the parameter's shape is another one.
    """

    def __init__(self, device: torch.device, config: NetworkConfig, controls: int, name: Callable[[Tensor], str]) -> None:
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.config, self.controls, self.name = config, controls, name
        self.keys = tuple(expected(torch.empty(0), config, controls))
        self.kept = itemgetter(*self.keys)
        self.memory: dict[Any, Any] = {}  # what kernels want to find again at the next step
        self._layout: Layout | None = None
        self._tensors: list[Tensor] = []
        self._places: list[int] = []

    def check(self, layout: Layout, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """Refuses parameters and states that do not fit each other.

        Args:
            layout: of the parameters' shapes.

        Raises:
            RuntimeError: with the parameter's name and what does not fit.
        """
        try:
            tensors = [*params, *itertools.chain.from_iterable(map(self.kept, states))]
        except KeyError:
            tensors = []
        same = layout is self._layout and len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        if not same:
            self._layout, self._places = None, []
            self._look(params, states)
            self._layout, self._tensors = layout, tensors

    def check_places(self, places: list[int], params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """The same, for a kernel that has found these addresses: of the same tensors they change where somebody swapped their memory."""
        if places != self._places:
            self._look(params, states)
            self._places = places

    def _look(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
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
                if problem is None and not (is_plain(value) and value.is_contiguous() and not value.is_neg() and _has_memory(value)):
                    problem = f"the state {key!r} of {name} is no plain tensor without gaps that has memory of its own"
                if problem is not None:
                    raise RuntimeError(
                        f"{problem}. Where a parameter was replaced or grew, delete its optimizer.state entry to start anew."
                    )


def _has_memory(tensor: Tensor) -> bool:
    size = tensor.element_size() * (tensor.storage_offset() + tensor.numel())
    return tensor.is_meta or (not tensor._is_zerotensor() and tensor.untyped_storage().nbytes() >= size)
