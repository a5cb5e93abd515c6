"""Five estimators of the same meta-gradient, by how much of the training each one sees: bias, noise, memory, time, and what becomes of it.

    pip install ".[demo]" -c constraints.txt
    python examples/unrolls.py

A small net learns a noisy regression in HORIZON steps, and its loss on clean data, averaged over them, is differentiated by the optimizer
network's weights. The truth is back-propagation through all of it. Estimates of shorter stretches are summed up over the run:

- exact: back-propagation through the stretch; first-order: the same, with gradients as constants (Andrychowicz et al. 2016);
- ES and PES: antithetic perturbations of the optimizer network, begun anew each stretch, or persistent (Vicol et al. 2021);
- policy gradient: the reinforcement-learning view (Li & Malik 2017). The optimizer is a policy, its update with Gaussian noise the action,
  the loss that follows within the stretch the cost; REINFORCE (Williams 1992), with the cost before the action as the baseline.
"""

import functools
import time

import torch
from meta_gradients import HORIZON, Held, beginner, estimate, start
from reporting import COLOURS, Report, confidence, parser
from torch import nn

from learned_optim.meta_train import MetaTrainConfig
from learned_optim.rule import update

ESTIMATORS = ("exact", "first_order", "es", "pes", "policy gradient")
GROUPS = {"step size": "log_step_size", "LSTM": "coordinate."}


def options(truncation):
    return MetaTrainConfig(truncation=truncation, horizon_min=HORIZON, horizon_max=HORIZON, log_loss=False, pairs=4, sigma=0.02)


def whole_run(name, truncation, group, seed):
    """The sum over a run, (dimensions,)."""
    torch.manual_seed(seed)
    network = beginner().requires_grad_(True)
    weights = {key: weight for key, weight in network.named_parameters() if key.startswith(GROUPS[group])}
    unroll, total = start(seed, network), 0.0
    while unroll.step < HORIZON:
        unroll, gradient = estimate(name, unroll, network, weights, options(truncation))
        total = total + torch.cat([part.flatten() for part in gradient.values()]) * truncation / HORIZON
    return total


def cost(name, truncation):
    """Milliseconds a step of training, and the most MiB held for the way back."""
    network = beginner().requires_grad_(True)
    weights, unroll, Held.most = dict(network.named_parameters()), start(0, network), 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        estimate(name, unroll, network, weights, options(truncation))
    began = time.process_time()
    estimate(name, unroll, network, weights, options(truncation))
    return 1000 * (time.process_time() - began) / truncation, Held.most / 2**20


def result(name, truncation, meta_steps):
    """Meta-trains with one estimator. The mean loss over fresh runs, (runs,)."""
    torch.manual_seed(0)
    network = beginner().requires_grad_(True)
    weights = {key: weight for key, weight in network.named_parameters() if key.startswith(tuple(GROUPS.values()))}
    optimizer = torch.optim.Adam(weights.values(), 2e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, meta_steps)
    unroll = None
    for step in range(meta_steps):
        if unroll is None or unroll.step >= HORIZON:
            unroll = start(1000 + step, network)
        unroll, gradient = estimate(name, unroll, network, weights, options(truncation))
        for key, weight in weights.items():
            weight.grad = gradient[key]
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
    return judge(network)


@torch.no_grad()
def judge(network, runs=12):
    found = []
    for seed in range(10**6, 10**6 + runs):
        unroll = start(seed, network)
        now, losses = unroll.optimizees, []
        for t in range(HORIZON):
            loss, now = unroll.train_step(t, now, functools.partial(update, network))
            losses.append(loss)
        found.append(torch.stack(losses).mean())
    return torch.stack(found)


def main(argv=None):
    choices = parser(__doc__, "unrolls")
    choices.add_argument("--truncations", type=int, nargs="*", default=[4, 16, HORIZON])
    choices.add_argument("--runs", type=int, default=16, help="tasks that bias and noise are measured on")
    choices.add_argument("--meta-steps", type=int, default=60)
    arguments = choices.parse_args(argv)
    report, truncations = Report(arguments.out), arguments.truncations
    truth = {group: torch.stack([whole_run("exact", HORIZON, group, seed) for seed in range(arguments.runs)]) for group in GROUPS}
    rows, found = [["estimator", "steps seen", *(f"{group}: {what}" for group in GROUPS for what in ("bias", "noise")), "ms", "MiB"]], {}
    for name in ESTIMATORS:
        for truncation in truncations:
            figures = {}
            for group, true in truth.items():
                error = torch.stack([whole_run(name, truncation, group, seed) for seed in range(arguments.runs)]) - true
                scale = true.mean(0).norm()
                figures[f"{group}: bias"] = (error.mean(0).norm() / scale).item()
                figures[f"{group}: noise"] = (error.std(0).norm() / scale).item()
            figures["ms"], figures["MiB"] = cost(name, truncation)
            found[name, truncation] = figures
            rows.append([name, truncation, *figures.values()])
    title = f"In units of the length of the gradient of {HORIZON} steps: error of the mean of {arguments.runs} runs, deviation of one"
    report.table(f"{title}. Processor milliseconds a step, and MiB of saved tensors.", rows)

    untrained, pairs = judge(beginner()), [(name, seen) for name in ESTIMATORS for seen in (truncations[0], HORIZON)]
    ends = {(name, seen): confidence((result(name, seen, arguments.meta_steps) / untrained).log()) for name, seen in pairs}
    rows = [["estimator", "steps seen", "log of the loss"], *([*key, "{:.3f} ± {:.3f}".format(*each)] for key, each in ends.items())]
    report.table(f"Logarithm of fresh tasks' mean loss after {arguments.meta_steps} meta-steps, less the untrained network's.", rows)

    figure, axes = report.figure(3, 2)
    steps = [*map(str, truncations)]
    for one, key in zip(axes.flat, [*(f"{group}: {what}" for what in ("bias", "noise") for group in GROUPS), "MiB"], strict=False):
        for colour, name in zip(COLOURS, ESTIMATORS, strict=False):
            one.plot(steps, [max(found[name, seen][key], 1e-2) for seen in truncations], "o-", color=colour, label=name)
            if "bias" in key:  # what the mean of so many runs cannot tell from none
                floor = [found[name, seen][key.replace("bias", "noise")] / arguments.runs**0.5 for seen in truncations]
                one.plot(steps, [max(each, 1e-2) for each in floor], ":", color=colour)
        one.set(title=key + " (dotted: of it noise)" * ("bias" in key), xlabel="steps of training seen", yscale="log")
    means, errors = zip(*ends.values(), strict=True)
    axes[1, 2].barh([f"{name}, {seen}" for name, seen in ends], means, xerr=errors, color=COLOURS[0])
    axes[1, 2].set(title="log of the loss, less the untrained network's")
    results = {"estimates": {f"{name}, {seen}": each for (name, seen), each in found.items()}}
    report.save(results | {"loss": {f"{name}, {seen}": each for (name, seen), each in ends.items()}}, figure)


if __name__ == "__main__":
    main()
