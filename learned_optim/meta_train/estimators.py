r"""Estimators of the meta-gradient, behind one interface.

The meta-loss of a stretch of training, from step `s` to step `s + length` of an unroll, is :math:`L(\phi) = \sum_t w_t \ell(\theta_t)`,
with :math:`\theta_{t+1} = \theta_t + \text{rule}(\nabla \ell(\theta_t), \text{state}_t; \phi)`. Each estimator advances an unroll by one
stretch and estimates :math:`dL/d\phi`:

- **exact**: back-propagation, through the optimizees' own gradients too (second derivatives).
- **first_order**: back-propagation with the optimizees' gradients as constants (Andrychowicz et al. 2016, section 2).
- **pes**: persistent evolution strategies (Vicol et al. 2021, algorithm 2). Antithetic pairs of perturbed networks train optimizees of
  their own, and each pair's difference counts for all perturbations since its unroll began. Unbiased, however short the stretches (for
  the smoothed meta-loss); its variance grows with the number of stretches.
- **es**: antithetic evolution strategies. All pairs begin each stretch at the same optimizees, so it has the truncation bias of
  backprop, but no use for gradients, and chaotic stretches are smoothed out.
- **reptile**: for learned initial parameters alone; the way that training moved them (Nichol et al. 2018).

Backprop over a stretch keeps its whole graph, or, with `recompute`, that of sqrt(length) / 2 steps at a time.

Shapes: `T` steps of the stretch, `R` replicas, `P` particles (perturbed networks; the first half are the mirror images of the second).
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap

from ..features import Layout
from ..kernels import cpu
from ..network import OptimizerNetwork
from ..rule import State, update
from . import in_place, process, twice
from .config import MetaTrainConfig
from .unroll import VMAP_LIMIT, Optimizees, Rule, Unroll, derive_seed, is_large

# The meta-loss is log(FLOOR + loss / first loss): relative progress counts alike in all tasks, and a task that is all but solved stops
# counting.
FLOOR = 0.02

INITIAL = "initial"  # the name of learned initial parameters among the meta-parameters

Weights = Mapping[str, nn.Parameter]  # meta-parameters by name


@dataclass(frozen=True)
class Estimate:
    """What an estimator has found out.

    Backprop returns its gradient. Evolution strategies return one number a pair: whoever knows the unroll's seed makes the perturbations,
    and hence the gradient, again (`evolved_gradient`), so that only these numbers travel between processes.
    """

    meta_loss: float
    gradient: dict[str, Tensor] | None = None
    differences: list[float] | None = None
    seed: int = 0
    step: int = 0


Estimator = Callable[[Unroll, OptimizerNetwork, Weights, MetaTrainConfig], tuple[Unroll, Estimate]]


def meta_loss(losses: Tensor, unroll: Unroll, config: MetaTrainConfig) -> Tensor:
    """The meta-loss of a stretch that begins where the unroll stands.

    Args:
        losses: after each of its steps, (T, ..., R).

    Returns:
        (...), the mean over replicas.
    """
    measured = (FLOOR + losses / (unroll.first_loss.abs() + 1e-8)).log() if config.log_loss else losses
    done = torch.arange(unroll.step + 1, unroll.step + len(losses) + 1, device=losses.device, dtype=losses.dtype)
    if config.meta_loss == "ramp":
        weight = 2 * done / unroll.horizon
    elif config.meta_loss in ("tail", "final"):
        last = max(1, unroll.horizon // 10) if config.meta_loss == "tail" else 1
        weight = (done > unroll.horizon - last).to(done) * min(config.truncation, unroll.horizon) / last
    else:
        weight = torch.ones_like(done)
    # A stretch that the horizon cuts short counts for as many steps as it has.
    total: Tensor = torch.tensordot(weight, measured.mean(-1), 1) / min(config.truncation, unroll.horizon)
    return total


# Backprop


def backprop(
    unroll: Unroll, network: OptimizerNetwork, weights: Weights, config: MetaTrainConfig, *, exact: bool
) -> tuple[Unroll, Estimate]:
    """The estimators "exact" and "first_order".

    The way back goes step by step, whether the graph of all steps was kept or is made again segment by segment, so that both sum up the
    same numbers in the same order.
    """
    length = min(config.truncation, unroll.horizon - unroll.step)
    # A step's graph takes several times the memory of what is kept between segments, so segments are shorter than there are of them; the
    # more so where what is kept takes none.
    segment = math.ceil(math.sqrt(length) / (4 if is_large(unroll.optimizees) else 2)) if config.recompute else length
    mine = {name: weight for name, weight in weights.items() if name != INITIAL}

    rule = functools.partial(update, network, matrix_dtype=matrix_dtype(unroll.optimizees))

    def record(first: int, last: int, now: Optimizees) -> tuple[list[tuple[list[Tensor], Tensor, list[Tensor]]], Optimizees]:
        """Steps with their graphs, each cut off from the one before: inputs, loss, outputs."""
        tape = []
        for t in range(first, last):
            now = now.map(Tensor.detach)
            inputs = [tensor.requires_grad_() for tensor in now.differentiable()]
            loss, now = unroll.train_step(unroll.step + t, now, rule, create_graph=exact)
            tape.append((inputs, loss, now.differentiable()))
        return tape, now

    # Forth
    borders, losses, now = [], [], unroll.optimizees
    for first in range(0, length, segment):
        if first + segment < length:
            borders.append(park(now))
            with torch.no_grad():
                for t in range(first, first + segment):
                    loss, now = unroll.train_step(unroll.step + t, now, rule)
                    losses.append(loss.detach())
        else:
            tape, now = record(first, length, now)
            losses += [loss.detach() for _, loss, _ in tape]
    end = now.map(Tensor.detach)
    end.params.requires_grad_()
    with torch.enable_grad():
        last_loss = unroll.measure(unroll.step + length, end)
    measured = torch.stack([*losses[1:], last_loss.detach()]).requires_grad_()
    total = meta_loss(measured, unroll, config)
    (pull,) = torch.autograd.grad(total, measured)
    pull = torch.cat([torch.zeros_like(pull[:1]), pull])  # (T + 1, R): the loss before the first step counts in the stretch before

    # And back
    (at_end,) = torch.autograd.grad(last_loss, end.params, pull[length])
    cotangents = [at_end, *(torch.zeros_like(value) for value in end.state.values())]
    gradient = [torch.zeros_like(weight) for weight in mine.values()]
    for first in reversed(range(0, length, segment)):
        if not tape:
            tape, _ = record(first, first + segment, borders.pop()())
        for t in reversed(range(first, min(first + segment, length))):
            inputs, loss, outputs = tape.pop()
            shares = torch.autograd.grad([loss, *outputs], [*mine.values(), *inputs], [pull[t], *cotangents], materialize_grads=True)
            gradient = [part + share for part, share in zip(gradient, shares, strict=False)]
            cotangents = list(shares[len(gradient) :])
    found = dict(zip(mine, gradient, strict=True))
    if INITIAL in weights:
        found[INITIAL] = cotangents[0].sum(0) if unroll.step == 0 else torch.zeros_like(weights[INITIAL])
    return unroll.advanced(end, length), Estimate(total.item(), found)


def exact(*arguments: Any) -> tuple[Unroll, Estimate]:
    """The estimator "exact"; says what to do where there are no second derivatives."""
    try:
        return backprop(*arguments, exact=True)
    except RuntimeError as error:
        if (advice := twice.missing(error)) is None:
            raise
        raise ValueError(advice) from error


def matrix_dtype(optimizees: Optimizees) -> torch.dtype | None:
    """What matrices are orthogonalised in: as in the kernels where that is half of the time, and as finely as the rest elsewhere."""
    params = optimizees.params
    if params.dtype != torch.float32 or not is_large(optimizees):
        return None
    return torch.bfloat16 if params.is_cuda else cpu.matrix_dtype()


def park(optimizees: Optimizees) -> Callable[[], Optimizees]:
    """Returns a function that gives the optimizees back, once. Large ones wait in a temporary file meanwhile (in TMPDIR): a state of many
    times their size, at each of the segments' borders, would fill the memory."""
    if not is_large(optimizees):
        return lambda: optimizees
    file = tempfile.TemporaryFile()  # noqa: SIM115, it is closed on the way back
    torch.save(tuple(optimizees), file)

    def fetch() -> Optimizees:
        with file:
            file.seek(0)
            return Optimizees(*torch.load(file, weights_only=True))

    return fetch


def reptile(unroll: Unroll, network: OptimizerNetwork, weights: Weights, config: MetaTrainConfig) -> tuple[Unroll, Estimate]:
    """The estimator "reptile": trains for a stretch; the negative of the optimizees' mean movement stands for the gradient."""
    length = min(config.truncation, unroll.horizon - unroll.step)
    with torch.no_grad():
        losses, end = _run(unroll, unroll.optimizees, length, functools.partial(update, network))
        movement = (unroll.optimizees.params - end.params).mean(0)
        total = meta_loss(losses, unroll, config)
    return unroll.advanced(end, length), Estimate(total.item(), {INITIAL: movement})


# Evolution strategies


def evolve(
    unroll: Unroll, network: OptimizerNetwork, weights: Weights, config: MetaTrainConfig, *, persistent: bool
) -> tuple[Unroll, Estimate]:
    """The estimators "pes" (persistent) and "es". An unroll of PES holds the optimizees of all particles, (P, R), one of ES (R,)."""
    length = min(config.truncation, unroll.horizon - unroll.step)
    drawn = perturbations(weights, unroll.seed, unroll.step, config.pairs)
    noise = {name: config.sigma * config.scale_of(name) * part for name, part in drawn.items()}
    signs = (-1.0, 1.0) if persistent else (-1.0, 1.0, 0.0)  # ES goes on from where the unperturbed network gets
    shifts = {name: torch.cat([sign * part[: config.pairs if sign else 1] for sign in signs]) for name, part in noise.items()}
    count = len(next(iter(shifts.values())))
    now = unroll.optimizees
    if now.params.ndim == 2:
        now = now.map(lambda tensor: tensor.expand(count, *tensor.shape))
    perturbed = {name: weights[name].detach() + shift for name, shift in shifts.items()}
    with torch.no_grad():
        if in_place.serves(network, now):
            losses, end = apart(unroll, now, networks(network, perturbed), length)
        else:
            losses, end = _run(unroll, now, length, perturbed_rule(network, perturbed))
        each = meta_loss(losses, unroll, config)
    lower, upper = each[: 2 * config.pairs].chunk(2)
    if not persistent:
        end = end.map(lambda tensor: tensor[-1])
    return unroll.advanced(end, length), Estimate(
        each.mean().item(), differences=(upper - lower).tolist(), seed=unroll.seed, step=unroll.step
    )


def perturbations(weights: Weights, seed: int, step: int, pairs: int) -> dict[str, Tensor]:
    """Standard normal perturbations of the stretch that begins at a step, (pairs, *shape)."""
    generator = Generator().manual_seed(derive_seed(seed, "perturbation", step))
    return {name: torch.randn(pairs, *weight.shape, generator=generator).to(weight) for name, weight in sorted(weights.items())}


def evolved_gradient(estimate: Estimate, weights: Weights, config: MetaTrainConfig, estimator: str) -> dict[str, Tensor]:
    """The gradient that an estimate of `evolve` stands for; PES counts all perturbations since the unroll began."""
    begins = range(0, estimate.step + 1, config.truncation) if estimator == "pes" else [estimate.step]
    differences = torch.tensor(estimate.differences)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for begin in begins:
        for name, part in perturbations(weights, estimate.seed, begin, config.pairs).items():
            deviation = config.sigma * config.scale_of(name)
            total[name] += torch.tensordot(differences.to(part), part, 1) / (2 * deviation * config.pairs)
    return total


class _RuleModule(nn.Module):
    """The rule as a module, so that `functional_call` can swap its weights."""

    def __init__(self, network: OptimizerNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, layout: Layout, grad: Tensor, state: State, total_steps: Tensor) -> tuple[Tensor, State]:
        return update(self.network, layout, grad, state, total_steps)


def perturbed_rule(network: OptimizerNetwork, weights: Mapping[str, Tensor]) -> Rule:
    """The rule of several networks at once: weights (P, *shape); gradients and state (P, ...)."""
    module = _RuleModule(network)
    stacked = {f"network.{name}": weight for name, weight in weights.items()}

    def rule(layout: Layout, grad: Tensor, state: State, total_steps: Tensor) -> tuple[Tensor, State]:
        def one(weights: dict[str, Tensor], *inputs: Tensor | State) -> tuple[Tensor, State]:
            result: tuple[Tensor, State] = functional_call(module, weights, (layout, *inputs))
            return result

        chunk = max(1, VMAP_LIMIT // grad[0].numel())
        result: tuple[Tensor, State] = vmap(one, chunk_size=chunk)(stacked, grad, state, total_steps)
        return result

    return rule


def networks(network: OptimizerNetwork, weights: Mapping[str, Tensor]) -> list[OptimizerNetwork]:
    """The networks with weights (P, *shape), one by one."""
    made = [copy.deepcopy(network) for _ in range(len(next(iter(weights.values()))))]
    for p, one in enumerate(made):
        for name, weight in weights.items():
            one.get_parameter(name).copy_(weight[p])
    return made


def apart(unroll: Unroll, now: Optimizees, networks: Sequence[OptimizerNetwork], length: int) -> tuple[Tensor, Optimizees]:
    """`_run` for large optimizees (P, R), one particle after the other, so that only one of them takes the memory of training."""
    everyones, end = [], now.map(torch.empty_like)
    for p, network in enumerate(networks):
        mine, place = (whole.map(itemgetter(slice(p, p + 1))) for whole in (now, end))
        with process.thrifty():
            rule = in_place.InPlaceRule(network, unroll.layout, mine.state)
            losses, mine = _run(unroll, mine._replace(state={}), length, rule)
        everyones.append(losses)
        place.params.copy_(mine.params)
        for key, buffer in mine.buffers.items():
            place.buffers[key].copy_(buffer)
        rule.hand_over(place.state)
    return torch.cat(everyones, 1), end


def _run(unroll: Unroll, now: Optimizees, length: int, rule: Rule) -> tuple[Tensor, Optimizees]:
    """Trains for a stretch without a graph: the losses after each step, (T, ...), and the optimizees."""
    losses = []
    for t in range(unroll.step, unroll.step + length):
        loss, now = unroll.train_step(t, now, rule)
        losses.append(loss.detach())
    losses.append(unroll.measure(unroll.step + length, now))
    return torch.stack(losses[1:]), now


def estimator(name: str) -> Estimator:
    """The estimator of this name."""
    if name == "exact":
        return exact
    if name == "first_order":
        return functools.partial(backprop, exact=False)
    if name in ("pes", "es"):
        return lambda *arguments: evolve(*arguments, persistent=name == "pes")
    return reptile
