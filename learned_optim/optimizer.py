"""`LearnedOptimizer`: a `torch.optim.Optimizer` that drives the update rule in place."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .config import NetworkConfig
from .features import Layout
from .kernels import cpu
from .network import OptimizerNetwork
from .rule import ADAMW_UPDATE_RMS, CONTROL, State, update
from .storage import load, random_bits, store, stored, zeros
from .weights import fingerprint, load_network

KERNELS = ("auto", "reference", "compiled", "triton")


class LearnedOptimizer(torch.optim.Optimizer):
    r"""A pretrained LSTM in place of AdamW. It needs no learning rate.

        optimizer = LearnedOptimizer(model.parameters())

    The rule is described in `learned_optim.rule`. The state of a parameter is made at its first gradient: for each of its coordinates two
    moments, the hidden units and cells of the LSTM, and the drift, in the formats of the weights' configuration, whatever the parameter's
    dtype.

    Args:
        params: parameters, named parameters or groups of them, as for every torch optimizer.
        pretrained: which weights to use: the name of a bundled set, a local folder, an id on the Hugging Face Hub ("user/name"), or an
            `OptimizerNetwork`, which is copied.
        lr: multiplier of the whole update, dimensionless. 1.0 is what the weights were meta-trained for; a scheduler may change it.
        weight_decay: decoupled weight decay. Each step shrinks a parameter by the share `lr * weight_decay * a`, where `a` is the learned
            step size expressed as the learning rate that gives AdamW steps of that size; so values that suit AdamW suit here.
        total_steps: the number of optimizer steps that the parameters will be trained for, where it is known: the rule then anneals its
            step size towards the end. None, the default, works without that knowledge. A group that is added later counts from its own
            first step.
        revision: branch, tag or commit of a Hub repository.
        kernel: what runs the rule: "reference", PyTorch operations on any device; "compiled", the C code that comes with the package, on a
            CPU, and PyTorch operations elsewhere; "triton", Triton kernels on CUDA devices, which orthogonalise matrices in bfloat16; or
            "auto", the fastest that can run: C code on a CPU, Triton on CUDA devices.

    Raises:
        ValueError: a hyperparameter is out of range, or the weights cannot be used as asked; the message names the file and the reason.
        RuntimeError: a kernel was asked for by name and cannot run.
    """

    def __init__(
        self,
        params: ParamsT,
        pretrained: str | os.PathLike[str] | OptimizerNetwork = "default",
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        revision: str | None = None,
        kernel: str = "auto",
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {list(KERNELS)}, got {kernel!r}")
        self.kernel = kernel
        network = copy.deepcopy(pretrained) if isinstance(pretrained, OptimizerNetwork) else load_network(pretrained, revision=revision)
        self.network = network.float().requires_grad_(False)
        self.kernels: dict[str, str] = {}  # what runs on each type of device
        defaults = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "weights": fingerprint(self.network)}
        super().__init__(params, defaults)
        for device in {param.device: None for group in self.param_groups for param in group["params"]}:
            self._choose_kernel(device, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; optional, and called once.

        Raises:
            RuntimeError: a gradient is sparse or sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # Each parameter with its gradient and group; a dict, so that a parameter named twice moves once.
        by_device: dict[torch.device, dict[int, tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(dict)
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        f"LearnedOptimizer does not support sparse gradients, and a parameter of shape {tuple(param.shape)} has one. "
                        "Build its embedding with sparse=False, or give it to torch.optim.SparseAdam."
                    )
                if type(grad) is not Tensor and hasattr(
                    grad, "device_mesh"
                ):  # a DTensor; importing its class would cost more than the whole package
                    raise RuntimeError(
                        "LearnedOptimizer does not support sharded parameters (DTensor, FSDP2) yet, and got one of shape "
                        f"{tuple(param.shape)}. Train with DistributedDataParallel instead."
                    )
                by_device[param.device][id(param)] = param, grad, group
        if not by_device:
            warnings.warn(
                "LearnedOptimizer.step() found no gradient on any of its parameters, so it changed nothing. Call loss.backward() first, "
                "and check that the optimizer was built from the parameters of the model that is being trained.",
                stacklevel=4,  # the caller of `step`, behind two wrappers of torch
            )
        for device, members in by_device.items():
            self._step_device(device, members.values())
        return loss

    def _step_device(self, device: torch.device, members: Iterable[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        """Runs the rule for all parameters of a device at once and writes the results back in place."""
        network = self.network
        if network.log_step_size.device != device:  # `to` walks through all of it, which is a sixth of a small model's step
            network.to(device)
        params, grads, states, groups = [], [], [], []
        for param, grad, group in members:
            state = self.state[param]  # looking a tensor up is slow enough to be done once
            if not state:
                state = self.state[param] = init_state(param, network.config)
            if param.numel():
                params.append(param)
                grads.append(grad)
                states.append(state)
                groups.append(group)
        if not params:
            return
        layout = Layout.of(tuple(param.shape for param in params), device)
        horizons = layout.per_tensor([group["total_steps"] or math.inf for group in groups])
        rates, decays = ([group[key] for group in groups] for key in ("lr", "weight_decay"))
        step = _step_function(self._choose_kernel(device, stacklevel=6))
        with torch.autocast(device.type, enabled=False):
            step(network, layout, params, grads, states, horizons, rates, decays)

    def _choose_kernel(self, device: torch.device, stacklevel: int) -> str:
        """What runs the rule on a device; where that is not what one would expect, the first call for its type warns or raises."""
        if device.type not in self.kernels:
            fastest = {"cpu": "compiled", "cuda": "triton"}.get(device.type, "reference")
            chosen = fastest if self.kernel == "auto" else self.kernel
            if chosen == "compiled" and device.type != "cpu":
                chosen = "reference"
            if trouble := _trouble(chosen, self.network, device):
                if self.kernel == chosen:
                    raise RuntimeError(trouble)
                place = "a CPU" if device.type == "cpu" else "CUDA devices"
                message = f"{trouble} Steps on {place} take PyTorch operations instead, and several times as long."
                warnings.warn(message, stacklevel=stacklevel)
                chosen = "reference"
            self.kernels[device.type] = chosen
        return self.kernels[device.type]

    def __getstate__(self) -> dict[str, Any]:
        # Where a copy wakes up, other kernels may run.
        return {**super().__getstate__(), "network": self.network, "kernel": self.kernel, "kernels": {}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the optimizer must run the same weights.

        Torch casts floating-point state to the parameter's dtype here, which would round the LSTM's state of a bf16 parameter. This
        restores each tensor as it was saved.

        Raises:
            ValueError: the groups do not match, or the state belongs to other weights.
        """
        saved: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            _check_weights(state_dict, fingerprint(self.network))
            saved.update(state_dict)

        def restore(_: torch.optim.Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            indices = [index for group in saved["param_groups"] for index in group["params"]]
            for param, index in zip(params, indices, strict=True):
                for key, value in saved["state"].get(index, {}).items():
                    self.state[param][key] = value.to(param.device, copy=True, memory_format=torch.contiguous_format)

        # Between the user's hooks: one of theirs may replace the dict before, and those after find the state as it was saved.
        hooks = [self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def init_state(param: Tensor, config: NetworkConfig) -> State:
    """The state of a parameter that has seen no gradient.

    What belongs to coordinates is made by `zeros_like`, so that it is placed and sharded like the parameter, in the formats of the
    configuration: `moments`, momentum and second moment, (2, *shape), and `lstm`, hidden units, then cells and the drift,
    (2 H + 1, *shape), to which "int8" adds `lstm_scale`, (2 H + 1, blocks). `control`, see `rule.Control`, is (CONTROL,) and fp32; its
    first number is the parameter's steps.
    """
    state = {"control": torch.zeros(CONTROL, dtype=torch.float32, device=param.device)}
    for key, tensor in stored(config).items():
        state[key], scales = zeros(param, sum(tensor.counts), tensor.fmt)
        if scales is not None:
            state[f"{key}_scale"] = scales
    return state


def reference_step(
    network: OptimizerNetwork,
    layout: Layout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    total_steps: Tensor,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
) -> None:
    """One step by `rule.update`, for `K` parameters on any device.

    Args:
        params: changed in place.
        grads: each parameter's gradient.
        states: each parameter's state, see `init_state`; changed in place.
        total_steps: (K,).
        lr, weight_decay: each parameter's.
    """
    tensors = stored(network.config)
    joined = {"control": torch.stack([state["control"] for state in states], -1)}
    for key, tensor in tensors.items():
        rows = [load(state[key].view(sum(tensor.counts), -1), state.get(f"{key}_scale")) for state in states]
        joined |= tensor.split(torch.cat(rows, -1))
    change, new = update(network, layout, torch.cat([grad.reshape(-1).float() for grad in grads]), joined, total_steps)

    bits = [random_bits(size, state["control"][0]) for size, state in zip(layout.sizes, states, strict=True)]
    for key, tensor in tensors.items():
        half = [place % 2 for place, count in enumerate(tensor.counts) for _ in range(count)]  # of the bits that round each number
        for rows, state, halves in zip(tensor.join(new).split(layout.sizes, -1), states, bits, strict=True):
            store(rows, halves[half], state[key].view(len(half), -1), state.get(f"{key}_scale"))
    for control, state in zip(new["control"].unbind(-1), states, strict=True):
        state["control"].copy_(control)
    for param, part, rate, decay in zip(params, change.split(layout.sizes), lr, weight_decay, strict=True):
        if decay != 0:
            part = part - decay * (part.square().mean().sqrt() / ADAMW_UPDATE_RMS) * param.reshape(-1)
        param.add_((part * rate).view(param.shape))


def _trouble(kernel: str, network: OptimizerNetwork, device: torch.device) -> str | None:
    """Why a kernel cannot run a network on a device, or None."""
    if kernel == "compiled":
        return cpu.trouble(network)
    if kernel == "reference":
        return None
    try:
        from .kernels import gpu  # imports Triton, which takes longer than the whole package
    except ImportError as error:
        return f"the Triton kernel needs Triton, and it cannot be imported ({error}). Install it with: pip install triton."
    return gpu.trouble(network, device)


def _step_function(kernel: str) -> Callable[..., None]:
    if kernel == "triton":
        from .kernels import gpu

        return gpu.step
    return cpu.step if kernel == "compiled" else reference_step


def _check_weights(state_dict: dict[str, Any], mine: str) -> None:
    for group in state_dict["param_groups"]:
        if "weights" not in group:
            raise ValueError("this state was not saved by a LearnedOptimizer; go on with the optimizer that saved it, or start without it")
        if group["weights"] != mine:
            raise ValueError(
                f"this state was made with optimizer weights {group['weights']}, but the optimizer runs {mine}; its hidden state would "
                "mean something else. Build LearnedOptimizer with the weights (and the revision) that the checkpoint was made with."
            )


def _check_group(group: dict[str, Any]) -> None:
    lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not lr >= 0:
        raise ValueError(f"lr multiplies the learned update and must not be negative, got {lr}; 1.0 is the default")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
        raise ValueError(f"total_steps must be a positive number of optimizer steps, or None where it is not known; got {total_steps!r}")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(
                f"LearnedOptimizer trains real floating-point parameters, got one of dtype {param.dtype} and shape {tuple(param.shape)}"
            )
