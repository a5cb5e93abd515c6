"""Gradients of every kind that a `LearnedOptimizer` meets: scaled, missing, zero, small, sparse, and in any memory layout."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizer_helpers import assert_same, loss_of, make_model, train, values
from torch import Tensor, nn
from torch.optim import lr_scheduler

from learned_optim.network import OptimizerNetwork
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.rule import Control

# Gradient scaling


def test_grad_scaler_skips_infinite_gradients(network: OptimizerNetwork) -> None:
    """Parameters and state stay as they are; finite gradients arrive unscaled."""
    model, other = make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), network)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:
            model.first.weight.grad[0, 0] = torch.inf
            before = copy.deepcopy((values(model), optimizer.state_dict()))
            scaler.step(optimizer)
            assert_same((values(model), optimizer.state_dict()), before)
        else:
            scaler.step(optimizer)
            train(other, reference, range(step, step + 1))
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(values(model), values(other))


# Missing, zero and unusual gradients


def test_parameters_without_gradient_are_left_out(network: OptimizerNetwork) -> None:
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, weight_decay=0.1)
    reference = LearnedOptimizer(other.first.parameters(), network, weight_decay=0.1)
    before = values(model)
    for step in range(3):
        for each in (model, other):
            each.zero_grad()
            loss_of(each, step).backward()
        for name, param in model.named_parameters():
            if not name.startswith("first"):
                param.grad = None
        optimizer.step()
        reference.step()
    assert_same(values(model.first), values(other.first))
    assert_same(values(model.second), {name: before[f"second.{name}"] for name in ("weight", "bias")})
    assert set(optimizer.state) == set(model.first.parameters())


def test_zero_gradients_before_the_first_change_nothing(network: OptimizerNetwork) -> None:
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, weight_decay=0.1, total_steps=5)
    reference = LearnedOptimizer(other.parameters(), network, weight_decay=0.1, total_steps=5)
    before = values(model)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same(values(model), before)
    for state in optimizer.state.values():  # but for what the weights look like
        control = Control.of(state["control"])
        state = state | {"control": control._replace(trained=torch.zeros(())).rows()}
        assert not any(value.any() for value in state.values())
    train(model, optimizer, range(5))
    train(other, reference, range(5))
    assert_same(values(model), values(other))


@pytest.mark.parametrize("scheduled", [False, True])
def test_no_gradient_at_all_warns(network: OptimizerNetwork, scheduled: bool) -> None:
    """With the line that called `step`, so that Python shows it once per such line."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = values(model)
    with pytest.warns(UserWarning, match="found no gradient on any of its parameters") as record:
        optimizer.step()
    assert scheduled or record[0].filename == __file__
    assert_same(values(model), before)
    assert not optimizer.state


def test_sparse_gradients_are_refused(network: OptimizerNetwork) -> None:
    """By name, and before any other parameter has moved."""
    dense, embedding = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    optimizer = LearnedOptimizer([dense, embedding], network)
    dense.grad, embedding.grad = torch.ones(3), torch.eye(4)[:, :2].to_sparse()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*shape \(4, 2\)"):
        optimizer.step()
    assert_same([dense.detach(), embedding.detach()], [torch.ones(3), torch.ones(4, 2)])


def test_sparse_embedding_is_refused(network: OptimizerNetwork) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = LearnedOptimizer(embedding.parameters(), network)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_of_half_precision_survive(network: OptimizerNetwork, dtype: torch.dtype) -> None:
    """They are squared in fp32: 1e-4 squared is zero in fp16."""
    param, other = nn.Parameter(torch.ones(8, dtype=dtype)), nn.Parameter(torch.ones(8))
    optimizer, reference = LearnedOptimizer([param], network), LearnedOptimizer([other], network)
    param.grad = torch.linspace(-1e-4, 1e-4, 8).to(dtype)
    other.grad = param.grad.float()
    optimizer.step()
    reference.step()
    assert_same(optimizer.state_dict()["state"], reference.state_dict()["state"])
    assert_same(param.detach(), other.detach().to(dtype))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded grad"])
def test_memory_layout_does_not_matter(network: OptimizerNetwork, layout: str) -> None:
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(4, 3, 2, 2, generator=generator)
    grads = [torch.randn(4, 3, 2, 2, generator=generator) for _ in range(3)]

    def arrange(tensor: Tensor) -> Tensor:
        match layout:
            case "transposed":
                return tensor.transpose(0, 3).contiguous().transpose(0, 3)
            case "channels_last":
                return tensor.contiguous(memory_format=torch.channels_last)
            case "strided":
                return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        return tensor

    if layout == "expanded grad":
        grads = [torch.full((4, 3, 2, 2), 0.3), torch.full((4, 3, 2, 2), -0.1)]
    param, other = nn.Parameter(arrange(plain.clone())), nn.Parameter(plain.clone())
    optimizer, reference = (LearnedOptimizer([each], network, weight_decay=0.1) for each in (param, other))
    for grad in grads:
        other.grad = grad
        param.grad = grad.flatten()[0].expand(4, 3, 2, 2) if layout == "expanded grad" else arrange(grad)
        assert layout == "expanded grad" or not param.is_contiguous()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-6, atol=1e-7)
    assert_same(optimizer.state_dict(), reference.state_dict())
