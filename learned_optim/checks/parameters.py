"""Parameters, gradients and optimizer weights: what a step can be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import sharding
from ..config import NetworkConfig
from ..network import OptimizerNetwork
from ..storage import BLOCK

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        raise ValueError(f"LearnedOptimizer trains dense parameters, and {name} {kind_of(param)}")
    if param.is_neg():
        raise ValueError(f"{name} is a negated view, which cannot be changed in place; build it of tensor.resolve_neg()")
    if param.is_inference():
        raise ValueError(f"{name} was made in inference mode, and cannot be changed in place outside; build it of tensor.clone()")
    if is_plain(param) and _overlaps(param):
        raise ValueError(f"several elements of {name} are one place in memory (an expanded tensor); build it of tensor.contiguous()")


def is_lazy(param: Tensor) -> bool:
    """Whether a parameter of a lazy module has no shape yet."""
    return isinstance(param, UninitializedParameter)


def kind_of(tensor: Tensor) -> str:
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
    if not has_memory(part):
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


def has_memory(tensor: Tensor) -> bool:
    """Whether memory was allotted to all of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = tensor.element_size() * (tensor.storage_offset() + last + 1) if tensor.numel() else 0
    return tensor.is_meta or (not tensor._is_zerotensor() and tensor.untyped_storage().nbytes() >= needed)


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
