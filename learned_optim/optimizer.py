"""`LearnedOptimizer`: a `torch.optim.Optimizer` that drives the update rule in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .network import OptimizerNetwork
from .rule import init_state, update
from .weights import fingerprint, load_network

# AdamW's updates have a root mean square of 0.2 to 0.4 times its learning rate (Liu et al. 2025, "Muon is scalable for LLM training",
# section 2.2), so this turns the size of our update into the learning rate that AdamW's weight decay would be multiplied by.
ADAMW_UPDATE_RMS = 0.2


class LearnedOptimizer(torch.optim.Optimizer):
    r"""A pretrained LSTM in place of AdamW. It needs no learning rate.

        optimizer = LearnedOptimizer(model.parameters())

    The rule is described in `learned_optim.rule`. The state of a parameter is made at its first gradient: fp32 tensors of the parameter's
    shape (two for the moments, and twice the hidden units of the LSTM), whatever the parameter's dtype.

    Args:
        params: parameters, named parameters or groups of them, as for every torch optimizer.
        pretrained: which weights to use: the name of a bundled set, a local folder, an id on the Hugging Face Hub ("user/name"), or an
            `OptimizerNetwork`.
        lr: multiplier of the whole update, dimensionless. 1.0 is what the weights were meta-trained for; a scheduler may change it.
        weight_decay: decoupled weight decay. Each step shrinks a parameter by the share `lr * weight_decay * a`, where `a` is the learned step
            size expressed as the learning rate that gives AdamW steps of that size; so values that suit AdamW suit here.
        total_steps: the number of optimizer steps that the parameters will be trained for, where it is known: the rule then anneals its step
            size towards the end. None, the default, works without that knowledge. A group that is added later counts from its own first step.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ValueError: a hyperparameter is out of range, or the weights cannot be used as asked; the message names the file and the reason.
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
    ) -> None:
        network = pretrained if isinstance(pretrained, OptimizerNetwork) else load_network(pretrained, revision=revision)
        self.network = network.requires_grad_(False)
        defaults = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "weights": fingerprint(network)}
        super().__init__(params, defaults)

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
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        by_device: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        found = False
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(
                        f"LearnedOptimizer does not support sparse gradients, and a parameter of shape {tuple(param.shape)} has one. "
                        "Build its embedding with sparse=False, or give it to torch.optim.SparseAdam."
                    )
                found = True
                if param.numel():
                    by_device.setdefault(param.device, []).append((param, group))
        if not found:
            warnings.warn(
                "LearnedOptimizer.step() found no gradient on any of its parameters, so it changed nothing. Call loss.backward() first, and check "
                "that the optimizer was built from the parameters of the model that is being trained.",
                stacklevel=2,
            )
        for device, members in by_device.items():
            self._step_device(device, members)
        return loss

    def _step_device(self, device: torch.device, members: list[tuple[Tensor, dict[str, Any]]]) -> None:
        network = self.network.to(device)
        params = [param for param, _ in members]
        states = []
        for param in params:
            if not self.state[param]:
                self.state[param] = init_state(param, network.config)
            states.append(self.state[param])
        horizons = [group["total_steps"] for _, group in members]
        updates, new_states = update(network, [param.grad for param in params], params, states, horizons)
        for (param, group), change, state, new_state in zip(members, updates, states, new_states, strict=True):
            if group["weight_decay"] != 0:
                rate = change.square().mean().sqrt() / ADAMW_UPDATE_RMS
                param.mul_(1 - group["lr"] * group["weight_decay"] * rate)
            param.add_((group["lr"] * change).to(param.dtype))
            for key, value in new_state.items():
                state[key].copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "network": self.network}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the optimizer must run the same weights.

        Torch casts floating-point state to the parameter's dtype here, which would round the LSTM's state of a bf16 parameter. This restores
        each tensor as it was saved.

        Raises:
            ValueError: the groups do not match, or the state belongs to other weights.
        """
        mine = fingerprint(self.network)
        for group in state_dict["param_groups"]:
            theirs = group.get("weights", mine)
            if theirs != mine:
                raise ValueError(
                    f"this state was made with optimizer weights {theirs}, but the optimizer runs {mine}; its hidden state would mean something "
                    "else. Build LearnedOptimizer with the weights (and the revision) that the checkpoint was made with."
                )
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for param, index in zip(params, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[param][key] = value.to(param.device, copy=True)


def _check_group(group: dict[str, Any]) -> None:
    lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have 1 element, got shape {tuple(lr.shape)}")
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
