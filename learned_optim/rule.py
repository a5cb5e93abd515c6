r"""The update rule: gradient -> features -> LSTM -> direction -> update.

This file is the only definition of the rule. It is pure (it changes none of its arguments) and differentiable; the optimizer runs it without
gradients, meta-training differentiates it, and every kernel is compared with it.

Method
------
For each tensor :math:`\theta` with `N` coordinates and gradient :math:`g_t`, at its step `t`:

1. Moments (Adam, Kingma & Ba 2015): :math:`m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t` and :math:`v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2`,
   used bias-corrected.
2. Statistics of the tensor (`features.tensor_statistics`) go to the controller, which returns a step-size correction
   :math:`e^{\kappa_t}` and a bias for the LSTM's gates.
3. Features of each coordinate (`features.coordinate_features`), normalised by :math:`\sqrt{v_t}`, go to the coordinate-wise LSTM, which
   returns a direction :math:`d_t`. Untrained, :math:`d_t = m_t / \sqrt{v_t}`.
4. The direction loses its length, so that the LSTM cannot change the step size by accident. A matrix (of shape fan_out x fan_in;
   convolution kernels flattened) is orthogonalised by Newton-Schulz (Muon, Jordan et al. 2024) and scaled to a spectral norm of
   :math:`\sqrt{fan_{out}/fan_{in}}` (Bernstein & Newhouse 2024, "Modular duality"; that size transfers over widths). Any other tensor is
   divided by its root mean square and scaled by a learned constant.
5. The update is :math:`-\eta_0 \, s(t) \, e^{\kappa_t} \, d_t`, with :math:`s` half a cosine where the horizon `T` is known and
   :math:`1/\sqrt{1 + t/100}` where it is not.

A tensor's clock `t` starts with its first non-zero gradient: until then its state stays as it was made and its update is zero.

Shapes: `K` tensors, `N` coordinates of one tensor, `H` hidden units, `C` control units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import NetworkConfig
from .features import coordinate_features, tensor_statistics
from .network import OptimizerNetwork

State = dict[str, Tensor]

# Newton-Schulz coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): singular values end within about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

DECAY_STEPS = 100.0  # time constant of the step size's decay without a horizon, in steps
EPSILON = 1e-12


def init_state(param: Tensor, config: NetworkConfig) -> State:
    """The state of a tensor that has seen no gradient.

    Every per-coordinate entry is made from `param` by `zeros_like`, so that it is placed and sharded like it: `momentum` and `second_moment`
    have its shape, `hidden` and `cell` (H, *shape). `control` is (2, C) and `step`, the tensor's clock in steps, is ().
    """
    zeros = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
    units = torch.stack([zeros] * config.hidden_units)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "momentum": zeros,
        "second_moment": zeros.clone(),
        "hidden": units,
        "cell": units.clone(),
        "control": torch.zeros(2, config.control_units, dtype=torch.float32, device=param.device),
    }


def update(
    network: OptimizerNetwork,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    states: Sequence[State],
    total_steps: Sequence[float | Tensor | None],
) -> tuple[list[Tensor], list[State]]:
    """One step of the rule for `K` tensors on one device, in the network's dtype.

    Args:
        grads: gradients, each of its parameter's shape.
        params: the optimizee's parameters.
        states: the tensors' states, see `init_state`.
        total_steps: each tensor's horizon in steps; None where it is not known.

    Returns:
        updates to add to the parameters, of their shapes, and the new states.
    """
    config = network.config
    dtype = network.log_step_size.dtype
    clocks, moments, features, statistics = [], [], [], []
    for grad, param, state, horizon in zip(grads, params, states, total_steps, strict=True):
        grad = grad.reshape(-1).to(dtype)
        previous = state["momentum"].reshape(-1)
        momentum = torch.lerp(grad, previous, config.momentum)
        second_moment = torch.lerp(grad.square(), state["second_moment"].reshape(-1), config.second_moment)
        step = state["step"] + (second_moment.amax() > 0).to(dtype)
        age = step.clamp(min=1)
        second_hat = second_moment / (1 - config.second_moment**age)
        seen = coordinate_features(grad, momentum / (1 - config.momentum**age), second_hat)
        progress, known = _progress(step, horizon)
        clocks.append((step, progress, known))
        moments.append((momentum, second_moment))
        features.append(seen)
        statistics.append(
            tensor_statistics(
                grad,
                previous,
                seen,
                second_hat,
                param.reshape(-1).to(dtype),
                step,
                progress,
                known,
                fans(param.shape),
                is_matrix(param.shape),
            )
        )

    correction, context, control = network.controller(torch.stack(statistics), torch.stack([state["control"] for state in states]))

    updates, new_states = [], []
    for k, (param, state) in enumerate(zip(params, states, strict=True)):
        step, progress, known = clocks[k]
        units = (config.hidden_units, -1)
        direction, hidden, cell = network.coordinate(features[k], context[k], state["hidden"].reshape(units), state["cell"].reshape(units))
        direction = normalize(direction.reshape(param.shape), network)
        started = (step > 0).to(dtype)
        updates.append(direction * (-started * _step_size(network, step, progress, known) * correction[k].exp()))
        new_states.append(
            {
                "step": step,
                "momentum": moments[k][0].reshape(param.shape),
                "second_moment": moments[k][1].reshape(param.shape),
                "hidden": hidden.reshape(state["hidden"].shape),
                "cell": cell.reshape(state["cell"].shape),
                "control": control[k] * started,
            }
        )
    return updates, new_states


def _progress(step: Tensor, horizon: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """Share of the horizon that lies behind, in [0, 1], and whether there is one."""
    if horizon is None:
        return torch.zeros_like(step), torch.zeros_like(step)
    return ((step - 1).clamp(min=0) / horizon).clamp(max=1), torch.ones_like(step)


def _step_size(network: OptimizerNetwork, step: Tensor, progress: Tensor, known: Tensor) -> Tensor:
    """The prior step size: what the controller corrects."""
    with_horizon = network.log_step_size[0].exp() * (0.5 + 0.5 * torch.cos(math.pi * progress))
    without = network.log_step_size[1].exp() * (1 + step / DECAY_STEPS).rsqrt()
    return torch.where(known > 0, with_horizon, without)


def normalize(direction: Tensor, network: OptimizerNetwork) -> Tensor:
    """The direction with the length that its shape calls for (step 4 of the method)."""
    if is_matrix(direction.shape) and network.config.orthogonalize_steps > 0:
        fan_out, fan_in = fans(direction.shape)
        matrix = orthogonalize(direction.reshape(fan_out, fan_in), network.config.orthogonalize_steps)
        return matrix.reshape(direction.shape) * math.sqrt(fan_out / fan_in)
    return direction * ((direction.square().mean() + EPSILON).rsqrt() * network.log_vector_gain.exp())


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately: Newton-Schulz iteration on the singular values.

    Args:
        matrix: shape (fan_out, fan_in).
        steps: iterations; 5 bring singular values above 1e-3 of the Frobenius norm to within about [0.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide * (wide.square().sum() + EPSILON).rsqrt()
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.mT


def fans(shape: torch.Size) -> tuple[int, int]:
    """Fan-out and fan-in of a tensor: torch keeps outputs in the first dimension. A vector or scalar has a fan-in of 1."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)


def is_matrix(shape: torch.Size) -> bool:
    """Whether the tensor maps vectors to vectors, so that its update should be orthogonal."""
    return min(fans(shape)) > 1
