"""What a `LearnedOptimizer` looks at before anything moves: hyperparameters, parameters, gradients, and state that others had in hand.

Kernels take addresses, so a tensor of another size, dtype or device would have them read and write where nothing of theirs is.
"""

from __future__ import annotations

import itertools
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import sharding
from .config import NetworkConfig
from .features import Layout
from .network import OptimizerNetwork
from .storage import BLOCK, DTYPES, stored

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a group may say, and what it may carry for others: schedulers of torch and timm leave these there.
OPTIONS = ("lr", "weight_decay", "total_steps", "maximize", "matrices", "stacked", "weights")
CARRIED = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale")

DTYPE = operator.attrgetter("dtype")
SAID = itemgetter(*OPTIONS)

LATER = ("maximize", "matrices", "stacked")  # options that checkpoints from before them lack

LARGEST = torch.finfo(torch.float32).max  # of an lr or a weight decay

NO_LR = "lr multiplies the learned update and must not be negative, got {}, and must be finite; 1.0 is the default"
SMALL_LR = 0.01  # up to here an lr is more likely AdamW's than a multiplier


# Groups


def check_keys(group: dict[str, Any]) -> None:
    """Refuses a group with an option that would be ignored."""
    if unknown := sorted(str(key) for key in group if key not in OPTIONS + CARRIED):
        raise ValueError(
            f"LearnedOptimizer does not know the group option{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, and would ignore what "
            f"is meant by it; leave it out. A group has {', '.join(OPTIONS[:-1])}."
        )


def ignored_options(group: dict[str, Any]) -> list[str]:
    """What somebody wrote into a group since it was added, and nothing reads."""
    cycled = ("momentum",) if "base_momentum" in group or "max_momentum" in group else ()
    return sorted(str(key) for key in group if key not in OPTIONS + CARRIED + cycled)


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
    `weights_only=True`.

    Raises:
        ValueError: with the option's name and the reason.
    """
    if missing := [key for key in OPTIONS if key not in group]:
        raise ValueError(f"a parameter group lacks {', '.join(missing)}")
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        check_tensor_lr(lr, may_wait=True)
    elif not _is_number(lr):
        raise ValueError(f"lr must be a number or a tensor with one element, got {lr!r:.80}")
    elif not 0 <= lr <= LARGEST:
        raise ValueError(NO_LR.format(f"{lr!s:.80}"))
    else:
        group["lr"] = float(lr)
    if not _is_number(weight_decay) or not 0 <= weight_decay <= LARGEST:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!s:.80}, and must be a finite number")
    group["weight_decay"] = float(weight_decay)
    for key, what in (("total_steps", "optimizer steps"), ("matrices", "matrices in the whole model")):
        count = group[key]
        if count is None:
            continue
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or not 1 <= int(count) < 2**63:
            raise ValueError(f"{key} must be a positive number of {what}, or None where it is not known; got {count!r:.80}")
        group[key] = int(count)
    for key in ("maximize", "stacked"):
        if isinstance(group[key], Tensor) or group[key] not in (True, False):
            raise ValueError(f"{key} must be True or False, got {group[key]!r:.80}")
        group[key] = bool(group[key])


def check_tensor_lr(lr: Tensor, *, may_wait: bool) -> None:
    """Refuses an lr that is a tensor and no number of the kind that an lr is.

    Args:
        may_wait: whether to look at the number where that waits for a GPU.
    """
    if lr.numel() != 1 or lr.is_complex() or lr.is_meta:
        raise ValueError(f"Tensor lr must be 1-element, real and no meta tensor, got shape {tuple(lr.shape)}, {lr.dtype} on {lr.device}")
    if (may_wait or lr.device.type == "cpu") and not 0 <= lr.item() <= LARGEST:
        raise ValueError(NO_LR.format(lr))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def warn_of_lr(groups: Sequence[dict[str, Any]], stacklevel: int) -> None:
    """Says so where an lr is of the size of AdamW's."""
    small = {lr for group in groups if not isinstance(lr := group["lr"], Tensor) and 0 < lr <= SMALL_LR}
    if small:
        warnings.warn(
            f"lr={max(small):g} multiplies the learned update, so training will be about {1 / max(small):.0f} times as slow as it was "
            "meta-trained to be. It is no learning rate: 1.0 is the default, and what to use unless you mean this.",
            stacklevel=stacklevel,
        )


def changed_options(groups: Sequence[dict[str, Any]], known: Sequence[tuple[Any, ...]], stacklevel: int) -> list[tuple[Any, ...]]:
    """Looks at what groups say where that has changed since the last step.

    Args:
        known: what this returned then.

    Returns:
        what they say now.

    Raises:
        ValueError: a number is out of range.
    """
    found = []
    for k, group in enumerate(groups):
        try:
            options = (*SAID(group), len(group))
        except KeyError:
            options = ()
        if k >= len(known) or len(options) != len(known[k]) or not all(map(operator.is_, options, known[k])):
            check_group(group)
            if ignored := ignored_options(group):
                names = ", ".join(ignored)
                warnings.warn(
                    f"parameter group {k} was given {names}, which LearnedOptimizer does not know and ignores", stacklevel=stacklevel
                )
            options = (*SAID(group), len(group))
        elif isinstance(group["lr"], Tensor):
            check_tensor_lr(group["lr"], may_wait=False)
        found.append(options)
    return found


def match(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], defaults: dict[str, Any], weights: str) -> dict[Any, Tensor]:
    """The parameter of each index in a state dict whose groups and numbers fit.

    Args:
        groups: the optimizer's.
        defaults: of options.
        weights: the fingerprint of the optimizer's.

    Raises:
        ValueError: they do not.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"this is no state of an optimizer: it lacks {key!r}")
    _check_fingerprint(state_dict, weights)
    saved = state_dict["param_groups"]
    for k, group in enumerate(saved):
        if missing := [key for key in ("params", "lr", "weight_decay", "total_steps") if key not in group]:
            raise ValueError(f"parameter group {k} of the state lacks {', '.join(missing)}")
    counts, mine = ([len(group["params"]) for group in each] for each in (saved, groups))
    if counts != mine:
        raise ValueError(f"the state has parameter groups of {counts} parameters, and the optimizer of {mine}")
    for group in saved:
        check_group({key: defaults[key] for key in LATER} | group)
    indices = [index for group in saved for index in group["params"]]
    params = [param for group in groups for param in group["params"]]
    if len(set(indices)) < len(set(map(id, params))):
        raise ValueError("parameter groups of the state name a parameter twice")
    ours = [key for key, entry in state_dict["state"].items() if isinstance(entry, dict) and "control" in entry]
    numbered = [key for key in state_dict["state"] if isinstance(key, int)]
    if strays := [key for key in dict.fromkeys([*numbered, *ours]) if key not in indices]:
        raise ValueError(f"the state has entries {strays} of parameters that none of its groups names")
    for theirs, group in zip(saved, groups, strict=True):
        names, others = group.get("param_names") or [], theirs.get("param_names") or []
        if moved := [one for one, other in zip(names, others, strict=False) if one != other and one in others]:
            raise ValueError(
                f"the state has the parameters in another order: {', '.join(moved)} stand elsewhere in it. Give the optimizer "
                "model.named_parameters() in the order in which the checkpoint was made."
            )
    return dict(zip(indices, params, strict=True))


def _check_fingerprint(state_dict: dict[str, Any], mine: str) -> None:
    for group in state_dict["param_groups"]:
        if "weights" not in group:
            raise ValueError("this state was not saved by a LearnedOptimizer; go on with the optimizer that saved it, or start without it")
        if group["weights"] != mine:
            raise ValueError(
                f"this state was made with optimizer weights {group['weights']}, but the optimizer runs {mine}; its hidden state would "
                "mean something else. Build LearnedOptimizer with the weights (and the revision) that the checkpoint was made with."
            )


# Parameters and gradients


def name_of(param: Tensor, groups: Sequence[dict[str, Any]]) -> str:
    """How messages call a parameter of these groups."""
    for i, group in enumerate(groups):
        for k, member in enumerate(group["params"]):
            if member is param or sharding.local(member) is param:
                names = group.get("param_names")
                return f"parameter {names[k]!r}" if names and k < len(names) else f"parameter {k} of group {i}"
    return "a parameter"


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
    if param.layout is not torch.strided or param.is_nested:
        raise ValueError(f"LearnedOptimizer trains dense parameters, and {name} {_kind(param)}")
    if param.is_neg():
        raise ValueError(f"{name} is a negated view, which cannot be changed in place; build it of tensor.resolve_neg()")
    if param.is_inference():
        raise ValueError(f"{name} was made in inference mode, and cannot be changed in place outside; build it of tensor.clone()")
    if is_plain(param) and _overlaps(param):
        raise ValueError(f"several elements of {name} are one place in memory (an expanded tensor); build it of tensor.contiguous()")


def is_lazy(param: Tensor) -> bool:
    """Whether a parameter of a lazy module has no shape yet."""
    return isinstance(param, UninitializedParameter)


def _kind(tensor: Tensor) -> str:
    return "is a nested tensor" if tensor.is_nested else f"has the layout {tensor.layout}"


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory: each stride must reach beyond all that smaller ones span."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride < reach:
            return True
        reach += (size - 1) * stride
    return False


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
    if part.is_meta:
        raise RuntimeError(f"{name} is on the device meta, which holds no numbers; build the optimizer after the model has some")
    if not _has_memory(part):
        raise RuntimeError(f"{name} has lost its memory: something that shards or offloads models has freed it, or never gave it any")
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


def check_mode() -> None:
    """Refuses to step where tensors are made without numbers.

    Raises:
        RuntimeError: under FakeTensorMode or the like.
    """
    if is_in_torch_dispatch_mode() and type(made := torch.empty(0, device="cpu")) is not Tensor:
        raise RuntimeError(f"LearnedOptimizer changes numbers in memory, and inside this mode tensors are made as {type(made).__name__}")


def is_finite(grad: Tensor) -> bool:
    """Whether a step can be made of a gradient: whether its square is a number in fp32."""
    return bool(grad.detach().float().square().sum().isfinite())


# Optimizer weights


def usable_network(network: OptimizerNetwork) -> OptimizerNetwork:
    """The network in fp32 and without gaps, which kernels read by address.

    Raises:
        ValueError: a weight is NaN or infinite, or on the device meta.
    """
    network.float()
    for name, weight in network.named_parameters():
        if weight.is_meta or not weight.isfinite().all():
            problem = "on the device meta" if weight.is_meta else "not finite"
            raise ValueError(f"the optimizer weights {name} are {problem}; load them again")
        weight.data = weight.data.contiguous()
    return network


def check_weights(weights: Sequence[Tensor]) -> None:
    """Refuses optimizer weights that a kernel on a CPU would read as something else.

    Raises:
        RuntimeError: somebody has changed the optimizer's network.
    """
    if any(weight.dtype != torch.float32 or not weight.is_contiguous() or weight.device.type != "cpu" for weight in weights):
        raise RuntimeError("the weights of LearnedOptimizer.network were moved or cast, and are read as they were made: in float32")


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
    if value.is_nested:
        return f"{what} {_kind(value)}"
    if tuple(value.shape) != shape:
        return f"{what} has the shape {tuple(value.shape)}, and the parameter as it is now needs {shape}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"{what} is no dense tensor but one of layout {value.layout}"
    if is_plain(value) and not value._is_zerotensor() and not _has_memory(value):
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
    members: Iterable[tuple[Tensor, Tensor, Any]], states: Mapping[Tensor, dict[str, Tensor]], name: Callable[[Tensor], str]
) -> str:
    """What to say of tensors that a step has left out.

    Args:
        members: each parameter with its gradient, and what else there is.
    """
    members = list(members)
    counted = "the others move on; the optimizer's attribute `skipped` counts them, and this is said once."
    broken = [name(param) for param, grad, _ in members if not is_finite(grad)]
    poisoned = [
        name(param) for param, *_ in members if impossible({key: sharding.local(states[param][key]) for key in ("control", "moments")})
    ]
    if poisoned and not broken:
        return (
            f"the state of {', '.join(poisoned[:5])} is not finite: something has written to it. Such parameters stay as they are until "
            f"their entry of optimizer.state is deleted, and then begin anew; {counted}"
        )
    return (
        f"the gradient of {', '.join(broken[:5]) or 'a parameter'} is not finite, or its square is not. Such parameters and their "
        f"state stay as they are in that step, and {counted} With error_if_nonfinite=True the step raises instead."
    )


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

    def check(self, layout: Layout, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """Refuses parameters, gradients and states that do not fit each other.

        Args:
            layout: of the parameters' shapes.

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
            for param, grad in zip(params, grads, strict=True):
                if not _has_memory(grad):
                    raise RuntimeError(f"the gradient of {self.name(param)} has lost its memory; call zero_grad() where that was freed")
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
                if problem is None and not (is_plain(value) and value.is_contiguous() and not value.is_neg() and _has_memory(value)):
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


def _has_memory(tensor: Tensor) -> bool:
    """Whether memory was allotted to all of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = tensor.element_size() * (tensor.storage_offset() + last + 1) if tensor.numel() else 0
    return tensor.is_meta or (not tensor._is_zerotensor() and tensor.untyped_storage().nbytes() >= needed)
