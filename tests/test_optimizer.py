"""The steps of `LearnedOptimizer`, its closures, hooks, weights and devices."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_helpers import assert_same, loss_of, make_model, train, values
from rule_helpers import acting_network
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from learned_optim import rule
from learned_optim.features import Layout
from learned_optim.network import OptimizerNetwork, load_network
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.rule import ADAMW_UPDATE_RMS
from learned_optim.storage import DTYPES
from learned_optim.weights import fingerprint

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


# The rule, driven in place


def assert_formats(optimizer: LearnedOptimizer) -> None:
    """The state's dtypes are those of the configuration, whatever the parameters' are."""
    config = optimizer.network.config
    formats = {"moments": config.moment_format, "lstm": config.lstm_format}
    for state in optimizer.state.values():
        assert {key: value.dtype for key, value in state.items()} == {key: DTYPES[formats.get(key, "float32")] for key in state}


def test_step_is_the_rule(network: OptimizerNetwork) -> None:
    """Several steps over two groups, each with its own lr, weight decay and horizon, are the pure rule to the last bit."""
    network.config = dataclasses.replace(network.config, lstm_format="float32")
    model = make_model()
    params = [param for param in model.parameters() if param.numel()]
    groups = [{"params": params[:2], "lr": 0.5, "weight_decay": 0.1, "total_steps": 9}, {"params": params[2:]}]
    optimizer = LearnedOptimizer(groups, network, kernel="reference")
    layout = Layout.of(tuple(param.shape for param in params), torch.device("cpu"))
    state = rule.init_state(layout, network.config, torch.cat([param.detach().reshape(-1) for param in params]))
    horizons = torch.tensor([9.0, 9.0, *[torch.inf] * 3])
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = [param.detach().clone() for param in params]
        grad = torch.cat([param.grad.reshape(-1) for param in params])
        with torch.no_grad():
            change, state = rule.update(network, layout, grad, state, horizons)
        optimizer.step()
        for k, (param, part) in enumerate(zip(params, change.split(layout.sizes), strict=True)):
            lr, weight_decay = (0.5, 0.1) if k < 2 else (1.0, 0.0)
            share = lr * weight_decay * part.square().mean().sqrt() / ADAMW_UPDATE_RMS
            torch.testing.assert_close(param.detach(), before[k] * (1 - share) + lr * part.view(param.shape), rtol=1e-5, atol=1e-7)
            own = optimizer.state[param]
            assert_same(own["control"], state["control"][:, k])
            rows = {key: value.split(layout.sizes, -1)[k] for key, value in state.items() if key != "control"}
            assert_same(own["moments"].view(2, -1), torch.stack([rows["momentum"], rows["second_moment"]]))
            assert_same(own["lstm"].view(-1, param.numel()), torch.cat([rows["hidden"], rows["cell"]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_loss_falls_and_state_keeps_its_formats(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = LearnedOptimizer(model.parameters(), total_steps=40)
    losses = train(model, optimizer, range(40))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert_formats(optimizer)


def test_step_touches_nothing_else(network: OptimizerNetwork) -> None:
    """Not the gradients, not the network, not the parameters' place in autograd."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    weights = copy.deepcopy(network.state_dict())
    train(model, optimizer, range(2))
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss_of(model, 2), params, create_graph=True), strict=True):
        param.grad = grad
    assert model.first.weight.grad.requires_grad
    gradients = [param.grad.detach().clone() for param in params]
    optimizer.step()
    assert_same([param.grad.detach() for param in model.parameters()], gradients)
    assert_same(dict(network.state_dict()), dict(weights))
    assert all(param.is_leaf and param.requires_grad for param in model.parameters())
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


def test_network_of_the_caller_stays_trainable() -> None:
    """The optimizer takes a copy: meta-training may go on with the original, and does not change a running optimizer."""
    network, model, other = acting_network(), make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), acting_network())
    assert all(param.requires_grad for param in network.parameters())
    train(model, optimizer, range(2))
    with torch.no_grad():
        network.coordinate.skip.mul_(-1)
    train(model, optimizer, range(2, 4))
    train(other, reference, range(4))
    assert_same(values(model), values(other))


@pytest.mark.parametrize("lr", [0.0, 0.25, 4.0])
def test_lr_multiplies_the_whole_update(network: OptimizerNetwork, lr: float) -> None:
    """Weight decay included, exactly: float64 parameters keep every bit of the fp32 update."""
    moves = {}
    for factor in (1.0, lr):
        model = make_model(torch.float64)
        before = values(model)
        optimizer = LearnedOptimizer(model.parameters(), network, lr=factor, weight_decay=0.1)
        train(model, optimizer, range(1))
        moves[factor] = {name: param - before[name] for name, param in values(model).items()}
    assert moves[1.0]["gain"] != 0
    torch.testing.assert_close(moves[lr], {name: lr * move for name, move in moves[1.0].items()}, rtol=1e-6, atol=1e-12)


def test_lr_zero_moves_nothing(network: OptimizerNetwork) -> None:
    model = make_model()
    before = values(model)
    train(model, LearnedOptimizer(model.parameters(), network, lr=0.0, weight_decay=0.1), range(3))
    assert_same(values(model), before)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_weight_decay_is_decoupled(network: OptimizerNetwork, lr: float) -> None:
    """It shrinks the parameter by the documented share and does not enter the gradient, so the state is the same without it."""
    plain, decayed = make_model(torch.float64), make_model(torch.float64)
    without = LearnedOptimizer(plain.parameters(), network, lr=lr)
    with_decay = LearnedOptimizer(decayed.parameters(), network, lr=lr, weight_decay=0.3)
    before = values(plain)
    train(plain, without, range(1))
    train(decayed, with_decay, range(1))
    for name, param in decayed.named_parameters():
        if param.numel():
            move = (dict(plain.named_parameters())[name] - before[name]).detach()
            rate = move.square().mean().sqrt() / lr / ADAMW_UPDATE_RMS
            torch.testing.assert_close(param.detach(), before[name] * (1 - lr * 0.3 * rate) + move, rtol=1e-6, atol=1e-12)
    assert_same(with_decay.state_dict()["state"], without.state_dict()["state"])


# Closures and gradient modes


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_closure(network: OptimizerNetwork, keyword: bool, outside: Callable[[], Any]) -> None:
    """It is called once, with grad enabled, before the step; its loss is returned."""
    model, other = make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), network)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss)
        return loss

    with outside():
        result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert len(calls) == 1
    assert result is calls[0]
    train(other, reference, range(1))
    assert_same(values(model), values(other))


def test_step_without_closure_returns_none(network: OptimizerNetwork) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    loss_of(model, 0).backward()
    assert optimizer.step() is None
    assert optimizer.step(None) is None


def test_step_inside_autocast_is_the_same(network: OptimizerNetwork) -> None:
    """A loop that runs wholly under autocast must not run the rule in bf16."""
    model, other = make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), network)
    for step in range(3):
        for each in (model, other):
            each.zero_grad()
            loss_of(each, step).backward()
        reference.step()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        assert_same(values(model), values(other))


def test_default_dtype_does_not_matter(network: OptimizerNetwork) -> None:
    """Whoever works in float64 throughout gets the same fp32 rule, even from a network that was built so."""
    shapes = [(14,), (7, 6)]  # layouts are cached, so shapes that no other test uses

    def moves(network: OptimizerNetwork) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
        optimizer = LearnedOptimizer(params, network, total_steps=9)
        for param in params:
            param.grad = torch.linspace(-1, 1, param.numel(), dtype=torch.float64).reshape(param.shape)
        optimizer.step()
        assert_formats(optimizer)
        return [param.detach() for param in params]

    torch.set_default_dtype(torch.float64)
    try:
        unusual = moves(copy.deepcopy(network).double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(unusual, moves(network))


def test_network_of_another_dtype_runs_in_fp32(network: OptimizerNetwork) -> None:
    """Meta-training may work in float64; the state, and so the rule, does not."""
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), copy.deepcopy(network).double())
    reference = LearnedOptimizer(other.parameters(), network)
    train(model, optimizer, range(3))
    train(other, reference, range(3))
    assert_same(values(model), values(other))
    assert_same(optimizer.state_dict(), reference.state_dict())


# Where the weights come from


def test_bundled_weights_are_the_default() -> None:
    model, other = make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters()), LearnedOptimizer(other.parameters(), load_network("default"))
    losses = train(model, optimizer, range(30))
    train(other, reference, range(30))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert_same(values(model), values(other))
    assert optimizer.param_groups[0]["weights"] == fingerprint(load_network("default"))


def test_weights_of_a_local_folder(network: OptimizerNetwork, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    assert_same(dict(LearnedOptimizer(make_model().parameters(), tmp_path).network.state_dict()), dict(network.state_dict()))
    with pytest.raises(ValueError, match="revision applies only to the Hub"):
        LearnedOptimizer(make_model().parameters(), tmp_path, revision="main")


# Hooks


def test_step_hooks(network: OptimizerNetwork) -> None:
    """Before and after the update, global ones too, with the arguments of `step`."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    loss_of(model, 0).backward()
    start, seen = values(model), []

    def hook(name: str) -> Callable[..., None]:
        return lambda self, args, kwargs: seen.append((name, self is optimizer, args[1:], kwargs, torch.equal(model.gain, start["gain"])))

    handles = [
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        optimizer.step(None)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == [(name, True, (None,), {}, "pre" in name) for name in ("global pre", "pre", "post", "global post")]


def test_each_device_has_a_network_of_its_own(network: OptimizerNetwork) -> None:
    """A copy, made once; a device without numbers stands for a GPU."""
    optimizer = LearnedOptimizer(make_model().parameters(), network)
    elsewhere = torch.device("meta")
    copied = optimizer._network_on(elsewhere)
    assert copied.log_step_size.device == elsewhere
    assert optimizer._network_on(torch.device("cpu")) is optimizer.network
    assert optimizer.network.log_step_size.device.type == "cpu"
    assert optimizer._network_on(elsewhere) is copied
    assert not copy.deepcopy(optimizer)._networks


def test_many_layouts_are_kept() -> None:
    """As many as where each parameter has an optimizer of its own."""
    shapes = [(torch.Size([size]),) for size in range(1, 50)]
    first = [Layout.of(shape, torch.device("cpu")) for shape in shapes]
    assert all(Layout.of(shape, torch.device("cpu")) is layout for shape, layout in zip(shapes, first, strict=True))


# CUDA


@pytest.mark.gpu
@needs_cuda
def test_cuda_matches_cpu(network: OptimizerNetwork) -> None:
    model, other = make_model(device="cuda"), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), network)
    train(model, optimizer, range(3))
    train(other, reference, range(3))
    torch.testing.assert_close({name: param.cpu() for name, param in values(model).items()}, values(other), rtol=1e-3, atol=1e-4)
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cuda"}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_resumes_from_a_checkpoint_read_to_the_cpu(network: OptimizerNetwork, dtype: torch.dtype) -> None:
    model = make_model(dtype, "cuda")
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = LearnedOptimizer(make_model(dtype, "cuda").parameters(), network)
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.gpu
@needs_cuda
def test_parameters_on_two_devices(network: OptimizerNetwork) -> None:
    """The rule runs once a device; a tensor lr may live on either."""
    model = make_model()
    model.second.to("cuda")
    for device in ("cpu", "cuda"):
        optimizer = LearnedOptimizer(model.parameters(), network, lr=torch.tensor(0.5, device=device))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        before = values(model)
        optimizer.step()
        assert all(not torch.equal(param, before[name]) for name, param in values(model).items() if param.numel())
