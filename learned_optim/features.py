"""What the optimizer network sees of a gradient: numbers without units.

Every feature is unchanged when the loss is multiplied by a constant, so one network serves all losses.

Shapes: `N` coordinates of one tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Floors of the second moment. The relative one is a share of the tensor's own mean, which keeps the rule scale-free; a coordinate whose
# gradient is 1e-4 of its tensor's is damped, not amplified. The absolute one serves tensors that have seen no gradient at all, and is large
# enough that the derivative of x ** -0.5 there stays finite in fp32.
RELATIVE_FLOOR = 1e-8
ABSOLUTE_FLOOR = 1e-20

# Bound of the normalised gradient: one outlier batch must not drive the LSTM into saturation.
GRADIENT_BOUND = 3.0


class CoordinateFeatures(NamedTuple):
    """Inputs of the coordinate-wise LSTM, split by what a flip of the gradient's sign does to them."""

    odd: Tensor  # (2, N): normalised momentum, normalised gradient; they change sign
    even: Tensor  # (3, N): their sizes, and the coordinate's share of its tensor's second moment; they do not


def coordinate_features(grad: Tensor, momentum: Tensor, second_moment: Tensor) -> CoordinateFeatures:
    """Features of each coordinate.

    Args:
        grad: gradient, shape (N,).
        momentum: bias-corrected running mean of the gradient, shape (N,).
        second_moment: bias-corrected running mean of the squared gradient, shape (N,).
    """
    mean = second_moment.mean()
    variance = second_moment + RELATIVE_FLOOR * mean + ABSOLUTE_FLOOR
    scale = variance.rsqrt()
    slow = momentum * scale
    fast = grad * scale
    fast = fast * (1 + (fast / GRADIENT_BOUND).square()).rsqrt()
    share = (variance / (mean + ABSOLUTE_FLOOR)).log() / 8
    return CoordinateFeatures(torch.stack([slow, fast]), torch.stack([slow.abs(), fast.abs(), share]))


STATISTICS = 11


def tensor_statistics(
    grad: Tensor,
    previous_momentum: Tensor,
    features: CoordinateFeatures,
    second_moment: Tensor,
    param: Tensor,
    step: Tensor,
    progress: Tensor,
    horizon_known: Tensor,
    fans: tuple[int, int],
    is_matrix: bool,
) -> Tensor:
    """What the controller sees of one tensor, shape (STATISTICS,).

    Args:
        grad: gradient, shape (N,).
        previous_momentum: running mean of the gradients before this one, shape (N,). Its cosine with `grad` is the hypergradient of the step
            size up to scale (Baydin et al. 2018, "Online Learning Rate Adaptation with Hypergradient Descent"): positive while the steps are
            too short, negative once they overshoot.
        second_moment: bias-corrected running mean of the squared gradient, shape (N,).
        param: the tensor, shape (N,).
        step: steps with a gradient so far, this one included, shape ().
        progress: step / horizon in [0, 1], 0 where no horizon is known, shape ().
        horizon_known: 1 or 0, shape ().
        fans: fan-out and fan-in.
    """
    grad_square = grad.square().mean()
    mean = second_moment.mean()
    momentum_square = previous_momentum.square().mean()
    cosine = (grad * previous_momentum).mean() * ((grad_square + ABSOLUTE_FLOOR) * (momentum_square + ABSOLUTE_FLOOR)).rsqrt()
    surprise = 0.5 * ((grad_square + ABSOLUTE_FLOOR) / (mean + ABSOLUTE_FLOOR)).log()
    signal = 0.5 * (features.odd[0].square().mean() + 1e-4).log()
    fan_out, fan_in = fans
    size = 0.5 * (param.square().mean() * fan_in + 1e-6).log()
    one = torch.ones_like(step)
    return torch.stack(
        [
            cosine,
            surprise.clamp(-3, 3),
            signal,
            size / 4,
            torch.log1p(step) / 8,
            torch.exp(-step / 10),
            progress,
            horizon_known,
            one * (math.log(fan_out) / 8),
            one * (math.log(fan_in) / 8),
            one * float(is_matrix),
        ]
    )
