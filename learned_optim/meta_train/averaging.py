"""From the estimates of a meta-step to one gradient: normalised by family, clipped, averaged over unrolls and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import distributed
from .config import MetaTrainConfig
from .estimators import Estimate, Weights, evolved_gradient

NORM_DECAY = 0.9  # per visit, of the running mean of a family's log meta-gradient norm


def average(
    estimates: Mapping[int, Estimate],
    families: Mapping[int, str],
    estimator: str,
    weights: Weights,
    log_norms: dict[str, float],
    config: MetaTrainConfig,
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """One gradient of an estimator's unrolls.

    Families differ in the size of their meta-gradients by orders of magnitude, so each is divided by its family's usual size and then
    clipped. Some unrolls are chaotic and their meta-gradients huge; hence the usual size is a geometric mean.

    Args:
        estimates: of this process's slots, by slot.
        families: of all slots, by slot.
        log_norms: logarithm of each family's usual norm; updated, in the same way on every process.

    Returns:
        the gradient by name, the same on every process, and the meta-losses of all processes' slots; NaN for those that were dropped
        because their meta-loss or meta-gradient is not finite.
    """
    evolved = estimator in ("pes", "es")
    if evolved:  # a few numbers travel, and every process makes all gradients again
        estimates = distributed.gather(dict(estimates))
    gradients = {slot: estimate.gradient or evolved_gradient(estimate, weights, config, estimator) for slot, estimate in estimates.items()}
    reports = {slot: (estimates[slot].meta_loss, norm(gradient)) for slot, gradient in gradients.items()}
    if not evolved:
        reports = distributed.gather(reports)

    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    meta_losses = {}
    for slot, (meta_loss, size) in reports.items():
        if not math.isfinite(meta_loss + size):
            meta_losses[slot] = math.nan
            continue
        meta_losses[slot] = meta_loss
        key, log_norm = f"{estimator}/{families[slot]}", math.log(size + 1e-12)
        log_usual = log_norms[key] = NORM_DECAY * log_norms.get(key, log_norm) + (1 - NORM_DECAY) * log_norm
        scale = min(math.exp(-log_usual), config.clip * math.exp(-log_norm)) / config.unrolls_per_step
        for name, part in gradients.get(slot, {}).items():
            total[name].add_(part, alpha=scale)
    if not evolved:
        distributed.sum_in_place(list(total.values()))
    return total, meta_losses


def norm(gradient: Mapping[str, Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([part.flatten() for part in gradient.values()])))
