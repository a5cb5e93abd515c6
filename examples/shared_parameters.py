"""Meta-training through a language model with tied embeddings and weight drop, in memory that grows with the root of the unroll.

    pip install ".[demo]" -c constraints.txt
    python examples/shared_parameters.py

The model is made like an AWD-LSTM (Merity et al. 2018, "Regularizing and Optimizing LSTM Language Models"): embedding and read-out are one
matrix, recurrent weights are dropped, one mask for all steps, and so are whole units of inputs and outputs. What is shared is one tensor of
coordinates with one state, in the unroll and in the optimizer. A meta-gradient is computed from the graph of the whole unroll and, dropout
included, once more in segments; then an optimizer network is meta-trained and used on fresh models.
"""

import time

import torch
from meta_gradients import Held
from reporting import COLOURS, Report, confidence, parser
from torch import Generator, Tensor
from weight_drop import make_task

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork
from learned_optim.meta_train import MetaTrainConfig, ModuleTask, meta_train
from learned_optim.meta_train.estimators import estimator
from learned_optim.meta_train.families.text import token_loss
from learned_optim.meta_train.unroll import begin, named

RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def untied_difference(tied: ModuleTask, untied: ModuleTask, params: Tensor) -> float:
    """How far the gradient of the shared matrix is from the sum of those of its two uses, relative to its length."""
    weights, batch = named(tied, params), tied.batch(Generator().manual_seed(0))

    def gradient(task: ModuleTask, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: weights[name].clone().requires_grad_() for name in task.shapes}
        loss = task.loss(leaves, {}, batch, training=False)[0]
        return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))

    whole = gradient(tied, weights)["embedding.weight"]
    parts = gradient(untied, weights | {"head.weight": weights["embedding.weight"]})
    return ((parts["embedding.weight"] + parts["head.weight"] - whole).norm() / whole.norm()).item()


def meta_gradient(task: ModuleTask, steps: int, recompute: bool):
    """One through so many steps: the unroll at its end, the gradient, the most MiB held for the way back, and the processor's seconds."""
    torch.manual_seed(0)
    network = OptimizerNetwork(NetworkConfig()).requires_grad_(True)
    config = MetaTrainConfig(truncation=steps, horizon_min=steps, horizon_max=steps, recompute=recompute)
    unroll = begin(task, 0, None, 1, network.config, "cpu", horizon=steps, horizon_known=True)
    Held.most, began = 0, time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        unroll, found = estimator("exact")(unroll, network, dict(network.named_parameters()), config)
    return unroll, found.gradient, Held.most / 2**20, time.process_time() - began


def final_loss(task: ModuleTask, make_optimizer, steps: int, seed: int) -> float:
    """Of a fresh model, trained in an ordinary loop, on 40 batches of held-out articles."""
    torch.manual_seed(seed)
    model, generator = task.build(), Generator().manual_seed(seed)
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        inputs, targets = task.batch(generator)
        optimizer.zero_grad()
        token_loss(model(inputs), targets).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        batches = [task.validation_batch(generator) for _ in range(40)]
        return sum(token_loss(model(inputs), targets).item() for inputs, targets in batches) / len(batches)


def main(argv=None):
    options = parser(__doc__, "shared_parameters")
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--lengths", type=int, nargs="*", default=[8, 16, 32, 64], help="steps of the unrolls that are measured")
    options.add_argument("--meta-steps", type=int, default=80)
    options.add_argument("--horizon", type=int, default=32, help="steps of training")
    options.add_argument("--seeds", type=int, default=5)
    arguments = options.parse_args(argv)
    report, task, steps = Report(arguments.out), make_task(arguments.width), arguments.horizon

    untied, memory = make_task(arguments.width, tied=False), []
    rows = [["steps", "MiB, whole graph", "MiB, recomputed", "time, recomputed / whole", "same bits", "off the tie"]]
    meta_gradient(task, 2, True)  # a warm-up
    for length in arguments.lengths:
        (_, whole, *before), (unroll, again, *after) = (meta_gradient(task, length, recompute) for recompute in (False, True))
        same = all(torch.equal(whole[name], again[name]) for name in whole)
        apart = untied_difference(task, untied, unroll.optimizees.params[0])
        rows.append([length, before[0], after[0], after[1] / before[1], "yes" if same else "no", f"{apart:.0e}"])
        memory.append((before[0], after[0]))
    sizes = [sum(shape.numel() for shape in one.shapes.values()) for one in (task, untied)]
    report.table(
        f"Exact meta-gradients by the steps of the unroll, of {sizes[0]:,} coordinates ({sizes[1]:,} if not tied). MiB saved for the way "
        "back; time; whether the gradients are the same; and, at the end, by how much the gradient of the shared matrix is not the "
        "sum of those of its two uses.",
        rows,
    )

    once = {
        "horizon_min": steps,
        "horizon_max": steps,
        "truncation": steps,
        "horizon_known": 1.0,
        "unrolls_per_step": 1,
        "unrolls_per_family": 1,
    }
    config = MetaTrainConfig(meta_steps=arguments.meta_steps, recompute=True, replicas=1, warm_restart=0.0, learning_rate=1e-2, **once)
    network = meta_train({"language": lambda _: task}, config).network
    torch.manual_seed(config.seed)
    rules = {"untrained": OptimizerNetwork(NetworkConfig()), "meta-trained": network}
    makers = {name: lambda params, rule=rule: LearnedOptimizer(params, rule, total_steps=steps) for name, rule in rules.items()}
    makers |= {f"AdamW, {rate}": lambda params, rate=rate: torch.optim.AdamW(params, rate) for rate in RATES}
    losses = {name: torch.tensor([final_loss(task, make, steps, seed) for seed in range(arguments.seeds)]) for name, make in makers.items()}
    rows = [[name, "{:.3f} ± {:.3f}".format(*confidence(each))] for name, each in losses.items()]
    report.table(f"Loss on held-out articles after {steps} steps, {arguments.seeds} fresh models.", [["optimizer", "nats a word"], *rows])

    figure, ((left, right),) = report.figure(2)
    for colour, name, each in zip(COLOURS, ("whole graph", "recomputed"), zip(*memory, strict=True), strict=False):
        left.plot(arguments.lengths, each, "o-", color=colour, label=name)
    left.set(xlabel="steps of the unroll", ylabel="MiB held for the way back", xscale="log", yscale="log")
    middles, radii = zip(*((float(each.mean()), float(confidence(each)[1])) for each in losses.values()), strict=True)
    right.barh([*losses], middles, xerr=radii, color=COLOURS[0])
    right.set(xlabel=f"nats a word after {steps} steps", xlim=(0.9 * min(float(each.min()) for each in losses.values()), None))
    report.save({"memory": memory, "lengths": arguments.lengths, "coordinates": sizes, "losses": losses}, figure)


if __name__ == "__main__":
    main()
