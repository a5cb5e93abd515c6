"""The configuration of a meta-training run: everything that its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import NetworkConfig, Ranges, check_ranges

Value = TypeVar("Value")

ESTIMATORS = ("exact", "first_order", "pes", "es", "reptile", "frozen")
META_LOSSES = ("mean", "ramp", "tail", "final")
SCHEDULES = ("cosine", "constant")

# What lies outside is a slip of the pen or a damaged file; a least value of LEAST stands for any that is positive.
LEAST = 1e-12
RANGES: Ranges = {
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("meta_steps", "truncation", "horizon_min", "horizon_max", "checkpoint_every"), (1, 10**8)),
    **dict.fromkeys(("pairs", "unrolls_per_step", "unrolls_per_family", "replicas", "held_out_tasks"), (1, 10**5)),
    **dict.fromkeys(("warmup", "evaluate_every"), (0, 10**8)),
    **dict.fromkeys(("sigma", "learning_rate"), (LEAST, 1e4)),
    **dict.fromkeys(("clip", "divergence"), (LEAST, 1e9)),
    **dict.fromkeys(("reparametrize", "loss_scale", "gradient_noise"), (0, 100)),
    **dict.fromkeys(("horizon_known", "warm_restart", "curriculum", "subbatch", "bfloat16"), (0, 1)),  # shares
}
HELD = SCALED = 1e4  # the greatest absolute values


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTrainConfig:
    """How to meta-train an optimizer network.

    Args:
        network: shape of the network and constants of the rule.
        families: names of the families to train on; none means all that are handed over. One that is named twice has twice the unrolls.
        seed: seed of everything random: the network's initialisation, the tasks, their batches, perturbations.
        meta_steps: updates of the meta-parameters.

        estimators: which estimator serves which meta-parameters: prefix of their names -> estimator; the longest prefix counts. The names
            are those of `OptimizerNetwork` and, for learned initial parameters, "initial". See `learned_optim.meta_train.estimators`:
            "exact" and "first_order" backprop, "pes", "es", "reptile" (initial parameters only), and "frozen" for what stays as it is.
        scales: factors of the learning rate and of `sigma`, by prefix in the same way; 1 elsewhere. Weights of the LSTM are smaller than
            what the controller counts in logarithms.
        held: values at which frozen scalars of the network are held during the run, by name; at its end they get their own back. A
            "controller.log_rate" of -30 and a "controller.shrink" of 0, say, keep the hypergradient out of it.
        truncation: optimizee steps that one meta-gradient sees at most. Backprop makes step sizes too small where this is less than the
            horizon (Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization"); PES does not.
        recompute: keep the optimizees at every sqrt(truncation)-th step only and compute the steps between once more on the way back. The
            same gradient to the last bit, in memory that grows with the root of the truncation. Large optimizees (above 2 million
            coordinates) are kept in temporary files, in TMPDIR.
        pairs: antithetic pairs of perturbed networks in an unroll of PES or ES.
        sigma: standard deviation of their perturbations.

        unrolls_per_step: unrolls of each estimator whose meta-gradients are averaged in one meta-step, each of another family while there
            are enough.
        unrolls_per_family: unrolls kept going for each family, at different phases of training.
        replicas: optimizees of one task that are trained side by side in an unroll.
        horizon_min, horizon_max: optimizee steps of a whole training run, drawn log-uniformly.
        curriculum: share of the meta-steps over which the longest horizon grows from the one to the other; 0 draws from the whole range
            from the start.
        horizon_known: share of the unrolls in which the network is told the horizon.
        warm_restart: share of the unrolls that go on with the optimizees of the unroll before, with fresh optimizer state, as fine-tuning
            does.

        meta_loss: how much the loss after step t of a run of T steps counts: "mean", all alike; "ramp", in proportion to t / T; "tail", the
            last tenth alone; "final", the last one alone.
        log_loss: the logarithm of a loss over the first one counts, so that relative progress counts alike in all tasks; False counts the
            loss itself.
        validation: losses are measured on data that the optimizees are not trained on.

        reparametrize: standard deviation of the natural logarithm of each tensor's random scale. This and the augmentations that follow
            change half of the tasks.
        loss_scale: standard deviation of the natural logarithm of a random factor of the loss.
        gradient_noise: largest standard deviation of the noise that is added to gradients, in units of each tensor's gradient RMS.
        subbatch: smallest share of a task's batch size that is trained on.
        bfloat16: share of the tasks whose optimizees compute in bfloat16.

        optimizer: the meta-optimizer's class, by its full name; `learned_optim.LearnedOptimizer` is one.
        optimizer_options: its arguments beside the learning rate.
        learning_rate: its peak learning rate.
        schedule: "cosine", half a cosine to zero, or "constant".
        warmup: meta-steps of linear warm-up.
        clip: bound of the norm of one unroll's meta-gradient, in units of its family's usual norm.

        evaluate_every: meta-steps between evaluations on held-out tasks, of which the first is before all; 0 never evaluates.
        held_out_tasks: held-out tasks of each family.
        divergence: the run stops where the mean meta-loss of the last 50 meta-steps is this far above its lowest.
        checkpoint_every: meta-steps between checkpoints.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    families: tuple[str, ...] = ()
    seed: int = 0
    meta_steps: int = 1000

    estimators: dict[str, str] = field(default_factory=lambda: {"": "exact"})
    scales: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    truncation: int = 200
    recompute: bool = False
    pairs: int = 4
    sigma: float = 0.01

    unrolls_per_step: int = 3
    unrolls_per_family: int = 3
    replicas: int = 4
    horizon_min: int = 40
    horizon_max: int = 200
    curriculum: float = 0.5
    horizon_known: float = 0.5
    warm_restart: float = 0.25

    meta_loss: str = "mean"
    log_loss: bool = True
    validation: bool = False

    reparametrize: float = 0.5
    loss_scale: float = 0.0
    gradient_noise: float = 0.0
    subbatch: float = 1.0
    bfloat16: float = 0.0

    optimizer: str = "torch.optim.Adam"
    optimizer_options: dict[str, Any] = field(default_factory=lambda: {"betas": [0.9, 0.99]})
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 2.0

    evaluate_every: int = 0
    held_out_tasks: int = 1
    divergence: float = 1.0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name, value in self.scales.items():
            if not LEAST <= value <= SCALED:
                raise ValueError(f"scales[{name!r}] must lie in [{LEAST}, {SCALED:,}], got {value}")
        for name, value in self.held.items():
            if not abs(value) <= HELD:
                raise ValueError(f"held[{name!r}] must lie in [-{HELD:,}, {HELD:,}], got {value}")
        for name, options in (("meta_loss", META_LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {list(options)}, got {getattr(self, name)!r}")
        if self.horizon_max < self.horizon_min:
            raise ValueError(f"horizon_max must not be below horizon_min, got {self.horizon_max} < {self.horizon_min}")
        unknown = sorted(set(self.estimators.values()) - set(ESTIMATORS))
        if unknown:
            raise ValueError(f"estimators must be among {list(ESTIMATORS)}, got {unknown}")
        backprop = {"exact", "first_order"} & set(self.estimators.values())
        if self.meta_loss in ("tail", "final") and self.truncation < self.horizon_max and backprop:
            raise ValueError(
                f'meta_loss "{self.meta_loss}" needs a truncation of at least horizon_max: backprop does not see the end through a shorter '
                f'one. Got {self.truncation} < {self.horizon_max}; raise it (and set recompute), or take the "pes" estimator.'
            )

    def estimator_of(self, name: str) -> str:
        """The estimator that serves a meta-parameter."""
        return by_prefix(self.estimators, name, "frozen")

    def scale_of(self, name: str) -> float:
        """The factor of a meta-parameter's learning rate and perturbations."""
        return by_prefix(self.scales, name, 1.0)


def by_prefix(values: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """The value of the longest key that a name begins with."""
    return values[max(found, key=len)] if (found := [prefix for prefix in values if name.startswith(prefix)]) else otherwise
