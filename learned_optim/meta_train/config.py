"""The configuration of a meta-training run: everything that its result depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import NetworkConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTrainConfig:
    """How to meta-train an optimizer network.

    Args:
        network: shape of the network and constants of the rule.
        seed: seed of everything random: the network's initialisation, the tasks, their batches.
        meta_steps: updates of the network.
        families_per_step: unrolls whose meta-gradients are averaged in one meta-step, each of another family while there are enough.
        unrolls_per_family: unrolls kept going for each family, at different phases of training.
        replicas: optimizees of one task that are trained side by side in an unroll.
        truncation: optimizee steps that one meta-gradient sees at most. The controller learns to make steps too small where this is less
            than the horizon (Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization"); freeze it then.
        horizon_min, horizon_max: optimizee steps of a whole training run, drawn log-uniformly. The longest grows from the one to the other
            over the first half of the meta-steps.
        meta_loss: how much the loss after step t of a run of T steps counts: "mean", all alike; "ramp", in proportion to t / T.
        horizon_known: share of the unrolls in which the network is told the horizon.
        warm_restart: share of the unrolls that go on with the optimizees of the unroll before, with fresh optimizer state, as fine-tuning
            does.
        reparametrize: standard deviation of the natural logarithm of each tensor's random scale (task augmentation); half of the tasks are
            left as they are.
        first_order: take the optimizees' gradients as constants; False keeps second derivatives, which gives better rules.
        learning_rate: peak learning rate of the meta-optimizer, Adam; it falls to zero along half a cosine.
        clip: bound of the norm of one unroll's meta-gradient, in units of its family's usual norm.
        frozen: prefixes of the network's parameters that stay at their initial values.
        checkpoint_every: meta-steps between checkpoints.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    meta_steps: int = 1000
    families_per_step: int = 3
    unrolls_per_family: int = 3
    replicas: int = 4
    truncation: int = 200
    horizon_min: int = 40
    horizon_max: int = 200
    meta_loss: str = "mean"
    horizon_known: float = 0.5
    warm_restart: float = 0.25
    reparametrize: float = 0.5
    first_order: bool = False
    learning_rate: float = 2e-3
    clip: float = 2.0
    frozen: tuple[str, ...] = ()
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in (
            "meta_steps",
            "families_per_step",
            "unrolls_per_family",
            "replicas",
            "truncation",
            "horizon_min",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.meta_loss not in ("mean", "ramp"):
            raise ValueError(f'meta_loss must be "mean" or "ramp", got {self.meta_loss!r}')
        if self.horizon_max < self.horizon_min:
            raise ValueError(f"horizon_max must not be below horizon_min, got {self.horizon_max} < {self.horizon_min}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("horizon_known", "warm_restart"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share in [0, 1], got {getattr(self, name)}")
        if self.reparametrize < 0:
            raise ValueError(f"reparametrize must not be negative, got {self.reparametrize}")
