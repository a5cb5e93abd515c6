"""Learning to learn from a handful of examples: a learned initialization, a learned optimizer, both together, and a net that reads them.

    pip install ".[demo]" -c constraints.txt
    python examples/few_shot.py

Sinusoids by ten points, and five digits, or letters of a made-up alphabet, by one picture of each; what is tested on was not met before.
All that trains has STEPS steps for it, and SGD once 50. The rows:

- SGD from random initial parameters, its rate tuned on tasks for meta-training;
- learned initial parameters, trained by SGD: Reptile (Nichol et al. 2018) and MAML (Finn et al. 2017), first-order and exact. The last
  one learns a rate for each tensor, too; the others' is tuned before and after;
- a learned optimizer alone, from random initial parameters (Ravi & Larochelle 2017), and "both": that and exact MAML's, learned further;
- a net that reads the examples as a sequence and attends to them, without any training (in the manner of SNAIL, Mishra et al. 2018).

Shapes: `R` tasks side by side, of `S` examples to learn from and `Q` to be judged on; `N` parameters, `K` tensors.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from few_shot_tasks import WAYS, Reader, alphabet, criterion, digits, omniglot, read, score, sinusoid, task
from reporting import COLOURS, Report, confidence, parser
from torch import Generator, nn

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.meta_train import MetaTrainConfig, meta_train
from learned_optim.meta_train.unroll import begin, losses
from learned_optim.rule import update

STEPS, REPLICAS = 5, 8  # steps of training, tasks of a meta-step
TASKS, TESTING = 300, 10**6  # tasks for testing, and their seed
ENGINE = {"truncation": STEPS, "horizon_min": STEPS, "horizon_max": STEPS, "horizon_known": 1.0, "warm_restart": 0.0, "replicas": REPLICAS}
ENGINE |= {"meta_loss": "final", "validation": True, "log_loss": False, "reparametrize": 0.0, "divergence": 100.0}
ENGINE |= {"unrolls_per_step": 1, "unrolls_per_family": 1, "learning_rate": 5e-3}
CONFIG = NetworkConfig(orthogonalize_steps=0)


def sgd(rates, layout, grad, state, horizon):
    return -layout.spread(rates) * grad, state


def train(draw, rule, seed, count, steps=STEPS, initial=None, exact=False):
    """Trains the nets of `count` tasks: the unroll at its start, and the optimizees at its end."""
    unroll = begin(task(draw), seed, initial, count, CONFIG, "cpu", horizon=steps, horizon_known=True)
    now = unroll.optimizees
    if initial is not None:
        now = now._replace(params=initial.expand(count, -1))  # with its gradient, which `begin` cuts off
    for t in range(steps):
        _, now = unroll.train_step(t, now, rule, create_graph=exact)
    return unroll, now


@torch.no_grad()
def scores(draw, rule, initial=None, steps=STEPS, seed=TESTING):
    unroll, now = train(draw, rule, seed, TASKS, steps, initial)
    return losses(unroll.task, now, unroll.batches(0), 0, training=False)[1]["score"]


def learn_initial(draw, how, meta_steps, rate):
    """Returns learned initial parameters (N,) and rates (K,); exact MAML learns the rates, too."""
    shapes, fresh = task(draw).shapes, task(draw).init(Generator().manual_seed(0))[0]
    initial = nn.Parameter(torch.cat([param.flatten() for param in fresh.values()]))
    log_rates = torch.full((len(shapes),), math.log(rate), requires_grad=how == "MAML, exact")
    optimizer = torch.optim.Adam([{"params": [initial], "lr": 3e-3}, {"params": [log_rates], "lr": 2e-2}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, meta_steps)
    for step in range(meta_steps):
        optimizer.zero_grad()
        start = initial.detach() if how == "Reptile" else initial
        unroll, now = train(draw, partial(sgd, log_rates.exp()), step, REPLICAS, initial=start, exact=how == "MAML, exact")
        if how == "Reptile":
            initial.grad = (initial.detach() - now.params).mean(0)
        else:
            replace(unroll, validation=True).measure(STEPS, now).mean().backward()
        optimizer.step()
        schedule.step()
    return initial.detach(), log_rates.detach().exp()


def learn_reader(draw, meta_steps):
    x, y, _ = draw(Generator())
    reader = Reader(x.shape[1], 1 if y.is_floating_point() else WAYS)
    optimizer = torch.optim.Adam(reader.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, meta_steps)
    for step in range(meta_steps):
        optimizer.zero_grad()
        criterion(*read(reader, draw, step, 4 * REPLICAS)).backward()
        optimizer.step()
        schedule.step()
    return reader


def compare(draw, fresh, meta_steps):
    """The scores, (R,), on tasks of `fresh`, of all methods, learned on tasks of `draw`."""

    def tuned(initial=None, steps=STEPS):
        """The best of four rates."""
        rates = [torch.full((6,), rate) for rate in (0.01, 0.03, 0.1, 0.3)]
        found = [scores(draw, partial(sgd, rate), initial, steps, seed=-1).mean().nan_to_num(math.inf).item() for rate in rates]
        return rates[found.index((min if draw is sinusoid else max)(found))]

    rate = tuned()
    found = {"SGD, 5 steps": scores(fresh, partial(sgd, rate)), "SGD, 50 steps": scores(fresh, partial(sgd, tuned(None, 50)), steps=50)}
    for how in ("Reptile", "MAML, first-order", "MAML, exact"):
        initial, rates = learn_initial(draw, how, 2 * meta_steps, rate[0].item())
        found[how] = scores(fresh, partial(sgd, rates if how == "MAML, exact" else tuned(initial)), initial)
    config, network = MetaTrainConfig(meta_steps=meta_steps, network=CONFIG, **ENGINE), OptimizerNetwork(CONFIG)
    network.log_step_size.data.fill_(math.log(0.2))  # so few steps must go far
    for name, start in (("learned optimizer", None), ("both", initial)):
        result = meta_train({"few-shot": lambda _: task(draw)}, config, network=network, initial=start)
        network, found[name] = result.network, scores(fresh, partial(update, result.network), result.initial)
    reader = learn_reader(draw, 4 * meta_steps)
    with torch.no_grad():
        found["reader"] = score(*read(reader, fresh, TESTING, TASKS)).view(TASKS, -1).mean(1)
    return found


def main(argv=None):
    options = parser(__doc__, "few_shot")
    options.add_argument(
        "--meta-steps", type=int, default=300, help="of learned optimizers; twice as many of SGD's start, 4 x of the reader"
    )
    options.add_argument("--omniglot", type=Path, help="folder of images_background and images_evaluation, in place of the alphabet")
    arguments = options.parse_args(argv)
    report = Report(arguments.out)
    letters = omniglot(arguments.omniglot) if arguments.omniglot else alphabet()
    problems = {"sinusoids, squared error": (sinusoid, sinusoid), "digits, accuracy": digits(), "letters, accuracy": letters}
    found = {name: compare(*draws, arguments.meta_steps) for name, draws in problems.items()}
    means = {name: {method: confidence(each) for method, each in methods.items()} for name, methods in found.items()}
    rows = [[method, *("{:.3f} ± {:.3f}".format(*means[name][method]) for name in problems)] for method in next(iter(means.values()))]
    report.table(f"Means of {TASKS} fresh tasks and their 95 % intervals.", [["", *problems], *rows])
    figure, axes = report.figure(3)
    for one, (name, methods) in zip(axes.flat, means.items(), strict=True):
        values, errors = zip(*reversed(methods.values()), strict=True)
        one.barh(list(reversed(methods)), values, xerr=errors, color=COLOURS[: len(values)])
        one.set(title=name)
    report.save({"mean and half interval": means}, figure)


if __name__ == "__main__":
    main()
