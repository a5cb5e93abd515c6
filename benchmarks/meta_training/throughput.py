"""How fast is an exact meta-gradient, beside the ways in which it is usually written?

    python benchmarks/meta_training/throughput.py

Compares this library's (replicas batched, all tensors in one flat pass, the graph cut at every step) with an unroll that loops over
replicas and over tensors in one graph, written in plain autograd, with `higher` and with `torchopt`, where these are installed (torchopt
needs optree and graphviz). All run the same rule, `learned_optim.rule.update`, the loops on one tensor at a time, and their gradients are
compared. Step sizes depend on all tensors together, which a loop over tensors cannot see, so here they are at their prior and not learned.
Time is CPU time, in which other programs do not count.
"""

from __future__ import annotations

import math
import statistics
import time
import unittest.mock
from collections.abc import Callable, Sequence

import torch
from common import COLOURS, new_figure, parser, prepare, save, table
from torch import Generator, Tensor, nn
from torch.func import functional_call

from learned_optim import OptimizerNetwork, load_network
from learned_optim.features import Layout
from learned_optim.meta_train import FAMILIES, MetaTrainConfig
from learned_optim.meta_train.estimators import estimator, meta_loss
from learned_optim.meta_train.unroll import Unroll, begin, named
from learned_optim.rule import State, init_state, update

OURS = "learned_optim"
DEFAULT_FAMILIES = ("mlp", "regression", "cnn", "autoencoder", "recurrent", "transformer")
TOLERANCE = 1e-3  # of gradients, as a share of their norm; sums of float32 in another order drift apart over an unroll

Gradient = dict[str, Tensor]
Forward = Callable[..., Tensor]
Step = Callable[[Tensor], None]


class TensorRule:
    """The rule on one tensor at a time."""

    def __init__(self, network: OptimizerNetwork, horizon: int) -> None:
        self.network, self.total_steps = network, torch.tensor([float(horizon)])

    def init(self, param: Tensor) -> State:
        return init_state(self.layout(param), self.network.config, param.reshape(-1))

    def change(self, grad: Tensor, param: Tensor, state: State) -> tuple[Tensor, State]:
        """What to add to the parameter, and the new state."""
        change, state = update(self.network, self.layout(param), grad.flatten(), state, self.total_steps)
        return change.view_as(param), state

    def layout(self, param: Tensor) -> Layout:
        return Layout.of((param.shape,), param.device)


def plain(module: nn.Module, rule: TensorRule) -> tuple[Forward, Step]:
    """A module's forward pass and its training step, in plain autograd."""
    params: dict[str, Tensor] = {name: param.detach().clone().requires_grad_() for name, param in module.named_parameters()}
    states = {name: rule.init(param) for name, param in params.items()}

    def step(loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, param), grad in zip(list(params.items()), grads, strict=True):
            change, states[name] = rule.change(grad, param, states[name])
            params[name] = param + change

    return lambda *inputs: functional_call(module, params, inputs, tie_weights=True), step


def with_higher(module: nn.Module, rule: TensorRule) -> tuple[Forward, Step]:
    import higher

    class Learned(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
        def _update(self, grouped_grads: list[list[Tensor]], **_: object) -> None:
            for group, grads, states in zip(self.param_groups, grouped_grads, self.state, strict=True):
                for index, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
                    change, states[index] = rule.change(grad, param, states[index] or rule.init(param))
                    group["params"][index] = param + change

    patched = higher.monkeypatch(module)
    return patched, Learned(torch.optim.SGD(module.parameters(), lr=0.0), module.parameters(), fmodel=patched).step


def with_torchopt(module: nn.Module, rule: TensorRule) -> tuple[Forward, Step]:
    import torchopt
    from torchopt.base import GradientTransformation

    def apply(
        grads: Sequence[Tensor], states: list[State], *, params: Sequence[Tensor], **_: object
    ) -> tuple[tuple[Tensor, ...], list[State]]:
        changes, states = zip(*(rule.change(*inputs) for inputs in zip(grads, params, states, strict=True)), strict=True)
        return changes, list(states)

    return module, torchopt.MetaOptimizer(module, GradientTransformation(lambda params: [rule.init(param) for param in params], apply)).step


LOOPS = {"autograd loops": plain, "higher": with_higher, "torchopt": with_torchopt}


def in_loops(
    start: Callable[[nn.Module, TensorRule], tuple[Forward, Step]], unroll: Unroll, network: OptimizerNetwork, weights: Gradient
) -> Gradient:
    """The exact meta-gradient of the whole unroll in one graph, replica after replica."""
    task, rule = unroll.task, TensorRule(network, unroll.horizon)
    runs = []
    for row in unroll.optimizees.params:
        module = task.build()
        with torch.no_grad():
            for param, value in zip(module.parameters(), named(task, row).values(), strict=True):
                param.copy_(value)
        runs.append(start(module, rule))
    losses = []
    for t in range(unroll.horizon + 1):
        batches = unroll.batches(t)
        losses.append([task.criterion(forward(*batch[:-1]), batch[-1]) for (forward, _), batch in zip(runs, batches, strict=True)])
        if t < unroll.horizon:
            for (_, step), loss in zip(runs, losses[-1], strict=True):
                step(loss)
    total = meta_loss(torch.stack([torch.stack(each) for each in losses[1:]]), unroll, config_of(unroll.horizon))
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


def config_of(steps: int) -> MetaTrainConfig:
    return MetaTrainConfig(truncation=steps, horizon_min=steps, horizon_max=steps)


def ours(unroll: Unroll, network: OptimizerNetwork, weights: Gradient) -> Gradient:
    gradient = estimator("exact")(unroll, network, weights, config_of(unroll.horizon))[1].gradient  # type: ignore[arg-type]
    assert gradient is not None
    return gradient


def usable(name: str, unroll: Unroll, network: OptimizerNetwork, weights: Gradient) -> bool:
    """Whether this way is installed and runs; says so where it does not."""
    try:
        in_loops(LOOPS[name], unroll, network, weights)
    except Exception as error:  # whatever a library of another time runs into
        print(f"{name} is left out: {type(error).__name__}: {error}")
        return False
    return True


def difference(a: Gradient, b: Gradient) -> float:
    flat_a, flat_b = (torch.cat([part.flatten() for part in gradient.values()]) for gradient in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


# What else is decided by all tensors: which gradients count as turning back, and how many matrices there are.
@unittest.mock.patch.multiple("learned_optim.rule", MANY=1)
def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "throughput")
    options.add_argument("--families", nargs="*", default=list(DEFAULT_FAMILIES), choices=list(FAMILIES))
    options.add_argument("--replicas", type=int, nargs="*", default=[4, 8])
    options.add_argument("--steps", type=int, default=20, help="of an unroll")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args(argv)
    prepare(arguments.threads)

    network = load_network("default").requires_grad_(True)
    nn.init.constant_(network.controller.log_rate, -math.inf)
    nn.init.zeros_(network.controller.shrink)
    nn.init.zeros_(network.controller.power)
    nn.init.zeros_(network.controller.log_start)
    weights: Gradient = {name: weight for name, weight in network.named_parameters() if not name.startswith("controller")}

    def unroll_of(family: str, replicas: int, steps: int) -> Unroll:
        task = FAMILIES[family](Generator().manual_seed(1))
        return begin(task, 0, None, replicas, network.config, "cpu", horizon=steps, horizon_known=True)

    small = unroll_of(arguments.families[0], 1, 2)
    ways: dict[str, Callable[[Unroll], Gradient]] = {OURS: lambda unroll: ours(unroll, network, weights)}
    for name, start in LOOPS.items():
        if usable(name, small, network, weights):
            ways[name] = lambda unroll, start=start: in_loops(start, unroll, network, weights)

    rows: list[list[object]] = [["family", "parameters", "tensors", "replicas", f"{OURS} M/s"]]
    rows[0] += [f"x {name}" for name in ways if name != OURS] + ["gradients differ by"]
    ratios: dict[str, list[float]] = {name: [] for name in ways if name != OURS}
    for family in arguments.families:
        for replicas in arguments.replicas:
            unroll = unroll_of(family, replicas, arguments.steps)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            gradients: dict[str, Gradient] = {}
            for _ in range(arguments.repeats + 1):  # the first is to warm up
                for name, way in ways.items():
                    begun = time.process_time()
                    gradients[name] = way(unroll)
                    seconds[name].append(time.process_time() - begun)
            apart = max(difference(gradients[name], gradients[OURS]) for name in ratios)
            faster = {name: statistics.median(b / a for a, b in zip(seconds[OURS][1:], seconds[name][1:], strict=True)) for name in ratios}
            for name, ratio in faster.items():
                ratios[name].append(ratio)
            size = sum(shape.numel() for shape in unroll.task.shapes.values())
            speed = arguments.steps * replicas * size / statistics.median(seconds[OURS][1:]) / 1e6
            shown = f"{apart:.0e}" + (" (!)" if apart > TOLERANCE else "")
            rows.append([family, size, len(unroll.task.shapes), replicas, speed, *faster.values(), shown])
            print(".", end="", flush=True)

    print(f"\n\nExact meta-gradients over {arguments.steps} steps; medians of {arguments.repeats}. M/s: millions of steps x parameters")
    print(f"a second. x: how many times as fast {OURS} is.\n")
    print(table(rows))
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    for name, median in medians.items():
        print(f"{median:.1f} times as fast as {name}: median; least {min(ratios[name]):.1f} (goal for autograd loops: 3)")

    figure = new_figure(9, 4)
    axes = figure.subplots()
    labels = [f"{row[0]}\n{row[3]} replicas" for row in rows[1:]]
    for offset, (colour, (name, values)) in enumerate(zip(COLOURS, ratios.items(), strict=False)):
        axes.bar([index + 0.27 * offset for index in range(len(values))], values, 0.27, color=colour, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=6)
    axes.set(ylabel=f"speed of {OURS}, times that of")
    axes.legend(frameon=False)
    save(arguments.out, arguments.threads, {"steps": arguments.steps, "table": rows, "medians": medians}, figure)


if __name__ == "__main__":
    main()
