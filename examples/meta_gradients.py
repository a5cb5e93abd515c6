"""What the comparison of meta-gradients compares: a noisy problem, an optimizer network to begin with, a policy gradient, and a meter.

Shapes: `R` runs side by side, of `N` parameters each; `T` steps of a stretch.
"""

import functools
import math

import torch
from torch import Generator, nn
from torch.nn.functional import mse_loss

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.estimators import estimator, evolved_gradient
from learned_optim.meta_train.unroll import begin
from learned_optim.rule import update

HORIZON, REPLICAS = 32, 8
NOISE = 0.5  # standard deviation of an action, in units of the update's root mean square


def regression(generator):
    """A random function of four inputs, observed with noise."""
    teacher = [torch.randn(shape, generator=generator) for shape in ((4, 8), (8, 1))]

    def sample(generator, noise=1.0):
        x = torch.randn(16, 4, generator=generator)
        y = torch.tanh(x @ teacher[0]) @ teacher[1]
        return x, y + noise * torch.randn(y.shape, generator=generator)

    net = functools.partial(lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)))
    return ModuleTask(net, sample, mse_loss, functools.partial(sample, noise=0.0))


def start(seed, network):
    task = regression(Generator().manual_seed(seed))
    return begin(task, seed, None, REPLICAS, network.config, "cpu", horizon=HORIZON, horizon_known=False, validation=True)


def policy_gradient(unroll, network, weights, config):
    """REINFORCE: each action's log-probability, times what its run cost from there on. The baseline is what it cost before the action, and
    the mean over runs of the difference."""
    length, chosen, costs, now = min(config.truncation, unroll.horizon - unroll.step), [], [], unroll.optimizees

    def act(layout, grad, state, horizon):
        change, state = update(network, layout, grad, state, horizon)
        spread = NOISE * layout.spread(layout.mean(change.detach().square()).sqrt())
        noise = torch.randn_like(change)
        chosen.append((noise * change / (spread + 1e-12)).sum(-1))  # its derivative is that of the log-probability
        return change.detach() + spread * noise, state

    for t in range(unroll.step, unroll.step + length):
        cost, now = unroll.train_step(t, now, act)
        costs.append(cost.detach())
    costs = torch.stack([*costs, unroll.measure(unroll.step + length, now).detach()])  # (T + 1, R)
    to_go = costs[1:].flip(0).cumsum(0).flip(0) - costs[:-1] * torch.arange(length, 0, -1)[:, None]  # more than before the action
    advantage = (to_go - to_go.mean(1, keepdim=True)) * REPLICAS / (REPLICAS - 1) / min(config.truncation, unroll.horizon)
    gradient = torch.autograd.grad((torch.stack(chosen) * advantage).sum(0).mean(), [*weights.values()], materialize_grads=True)
    return unroll.advanced(now, length), dict(zip(weights, gradient, strict=True))


def estimate(name, unroll, network, weights, config):
    """Advances the unroll by a stretch; the gradient by the weights."""
    if name == "policy gradient":
        return policy_gradient(unroll, network, weights, config)
    unroll, found = estimator(name)(unroll, network, weights, config)
    return unroll, found.gradient or evolved_gradient(found, weights, config, name)


def beginner():
    """An untrained network, with nothing but its LSTM and one constant to set the step size, and that one small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = OptimizerNetwork(NetworkConfig(orthogonalize_steps=0))
    network.controller.log_rate.data.fill_(-30.0)
    network.controller.shrink.data.zero_()
    network.log_step_size.data.fill_(math.log(0.1))
    return network


class Held:
    """Bytes that autograd holds for the way back: now, and at most. Saved tensors are packed into these."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.now += self.size
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.size
