"""The update rule by PyTorch operations, in place, on any device: what the kernels are compared with, and what runs where none can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks.state import Ledger
from ..config import NetworkConfig
from ..features import Layout
from ..network import OptimizerNetwork
from ..rule import ADAMW_UPDATE_RMS, Control, State, sit_out, update
from ..storage import load, random_bits, store, stored

CORRECTION = Control._fields.index("correction")


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
    """One step by `rule.update`, for `K` parameters on any device.

    Tensors whose gradients or moments are not finite are left out: on a CPU as if they had none; elsewhere, where nobody knows which these
    are, they count as tensors that have not begun yet, and are put back to what they were. So are those whose LSTM's state is not finite,
    which kernels see only after it was decided how long steps are.

    Args:
        params: changed in place.
        grads: each parameter's gradient.
        states: each parameter's state, see `learned_optim.optimizer.init_state`; changed in place.
        total_steps: (K,).
        lr, weight_decay: each parameter's.
        ledger: counts the tensors that are left out.
    """
    tensors = stored(network.config)
    joined = {"control": torch.stack([state["control"] for state in states], -1)}
    for key, tensor in tensors.items():
        rows = [load(state[key].view(sum(tensor.counts), -1), state.get(f"{key}_scale")) for state in states]
        joined |= tensor.split(torch.cat(rows, -1))
    grad = torch.cat([grad.reshape(-1).float() for grad in grads])
    finite, whole = _are_finite(layout, grad, joined, network.config)
    if may_wait(layout.device) and not finite.all():
        ledger.skipped += len(params) - finite.sum()
        if chosen := finite.nonzero().flatten().tolist():
            some: Any = ([each[k] for k in chosen] for each in (params, grads, states, lr, weight_decay))
            params, grads, states, lr, weight_decay = some
            step(network, layout.of_some(chosen), params, grads, states, total_steps[chosen], lr, weight_decay, ledger)
        else:
            sit_out(layout)
        return
    fine = finite & whole
    ledger.skipped += len(params) - fine.sum()
    undo: list[tuple[Tensor, Tensor, Tensor]] = []
    if not may_wait(layout.device):
        joined = {key: torch.where(finite if key == "control" else layout.spread(finite), value, 0) for key, value in joined.items()}
        grad = torch.where(layout.spread(finite), grad, 0)
    if not (may_wait(layout.device) and fine.all()):
        for each, param, state in zip(fine, params, states, strict=True):
            undo += [(each, value, value.clone()) for value in (param, *(state[key] for key in ledger.keys))]
        # The next step leaves them out from the beginning, as kernels do.
        undo += [
            (known, state["control"][CORRECTION], torch.full_like(known, torch.nan, dtype=torch.float32))
            for known, state in zip(whole | ~finite, states, strict=True)
        ]
    with layout.device:  # whatever the default device: torch.where makes tensors of numbers there
        change, new = update(network, layout, grad, joined, total_steps)

    bits = [random_bits(layout.places(k), state["control"][0]) for k, state in enumerate(states)]
    for key, tensor in tensors.items():
        half = [place % 2 for place, count in enumerate(tensor.counts) for _ in range(count)]  # of the bits that round each number
        for rows, state, halves in zip(tensor.join(new).split(layout.sizes, -1), states, bits, strict=True):
            store(rows, halves[half], state[key].view(len(half), -1), state.get(f"{key}_scale"))
    for control, state in zip(new["control"].unbind(-1), states, strict=True):
        state["control"].copy_(control)
    parts = list(change.split(layout.sizes))
    if decayed := [k for k, decay in enumerate(weight_decay) if decay != 0]:
        for k, square in zip(decayed, layout.mean_squares(parts, decayed), strict=True):
            parts[k] = parts[k] - weight_decay[k] * (square.sqrt() / ADAMW_UPDATE_RMS) * params[k].reshape(-1)
    for param, part, rate in zip(params, parts, lr, strict=True):
        param.add_((part * rate).view(param.shape))
    for each, value, before in undo:
        value.copy_(torch.where(each, value, before))


def _are_finite(layout: Layout, grad: Tensor, state: State, config: NetworkConfig) -> Tensor:
    """Whether steps can be made of tensors, (2, K): of their gradient, moments and control, and of their LSTM's state. That is where the
    squares of all that are numbers in fp32, and neither the new second moment nor the clock is negative.

    Args:
        grad: (N,).
        state: by its parts, see `storage.Stored`.
    """
    second_moment = torch.lerp(state["second_moment"], grad.square(), 1 - config.second_moment)
    of_lstm = torch.cat([state["hidden"], state["cell"]])
    sound = state["control"].square().isfinite().all(0) & (state["control"][0] >= 0)
    second_moment = torch.where(layout.spread(sound) & (second_moment >= 0), second_moment, torch.nan)
    lstm = torch.where(of_lstm.square().isfinite().all(0), 0.0, torch.nan)
    found = layout.means([grad.square(), state["momentum"].square(), second_moment, lstm]).isfinite()  # of all processes' parts
    return torch.stack([found[:3].all(0), found[3]])


def may_wait(device: torch.device) -> bool:
    """Whether the host may look at numbers on a device without waiting for it."""
    return device.type == "cpu"
