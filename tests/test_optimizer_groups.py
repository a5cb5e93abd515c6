"""Parameter groups and their options, learning rate schedulers, and which parameters a group may have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_helpers import assert_same, loss_of, make_model, train, values
from torch import Tensor, nn
from torch.optim import lr_scheduler

from learned_optim.network import OptimizerNetwork
from learned_optim.optimizer import LearnedOptimizer

# Parameter groups


def test_add_param_group_while_training(network: OptimizerNetwork) -> None:
    """Its parameters count from their own first step, and the others go on."""
    model = make_model()
    optimizer = LearnedOptimizer(model.first.parameters(), network, total_steps=10)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": list(model.second.parameters()), "lr": 0.5, "total_steps": 20})
    before = values(model)
    train(model, optimizer, range(3, 5))
    assert {key: optimizer.param_groups[1][key] for key in ("lr", "weight_decay", "total_steps")} == {
        "lr": 0.5,
        "weight_decay": 0.0,
        "total_steps": 20,
    }
    assert [optimizer.state[param]["control"][0].item() for param in model.first.parameters()] == [5, 5]
    assert [optimizer.state[param]["control"][0].item() for param in model.second.parameters()] == [2, 2]
    assert not torch.equal(model.second.weight, before["second.weight"])


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "must not be negative, got -0.1"),
    ({"lr": float("nan")}, "must not be negative, got nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
    ({"total_steps": 0}, "total_steps must be a positive number of optimizer steps.*got 0"),
    ({"total_steps": 10.5}, "total_steps must be a positive number of optimizer steps.*got 10.5"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_constructor_refuses_bad_options(network: OptimizerNetwork, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], network, **options)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        *(({"params": [torch.ones(2)], **options}, message) for options, message in BAD_OPTIONS),
        ({"params": [torch.ones(2), nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "got one of dtype torch.complex64"),
        ({"params": [nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]}, "got one of dtype torch.float8_e4m3fn"),
    ],
)
def test_bad_group_leaves_the_optimizer_as_it_was(network: OptimizerNetwork, group: dict[str, Any], message: str) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), network)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(group))
    assert_same(optimizer.state_dict(), before)
    train(model, optimizer, range(1, 2))


def test_complex_parameters_are_refused(network: OptimizerNetwork) -> None:
    with pytest.raises(ValueError, match=r"real floating-point parameters, got one of dtype torch\.complex64"):
        LearnedOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))], network)


# Learning rate schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1.5, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["float", "0-d", "1-d"])
def test_schedulers(network: OptimizerNetwork, name: str, kind: str) -> None:
    """Training under a scheduler is training with the lr of each step put in by hand."""
    lr = {"float": 1.0, "0-d": torch.tensor(1.0), "1-d": torch.tensor([1.0])}[kind]
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), network, lr=lr, weight_decay=0.1)
    reference = LearnedOptimizer(other.parameters(), network, weight_decay=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    for step in range(5):
        used.append(float(optimizer.param_groups[0]["lr"]))
        reference.param_groups[0]["lr"] = used[-1]
        train(model, optimizer, range(step, step + 1))
        train(other, reference, range(step, step + 1))
        scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    torch.testing.assert_close(values(model), values(other), rtol=1e-5, atol=1e-6)
    assert len(set(used)) > 2
    assert isinstance(optimizer.param_groups[0]["lr"], float if kind == "float" else Tensor)


# Parameters that are shared, named twice or swapped


def test_shared_parameters_are_one(network: OptimizerNetwork) -> None:
    """Tied embeddings: one state, one move a step, with the sum of the gradients."""
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    single = nn.Parameter(embedding.weight.detach().clone())
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer([single], network)
    words = torch.tensor([0, 3, 3, 6])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), words).backward()
        reference.zero_grad()
        nn.functional.cross_entropy(nn.functional.linear(nn.functional.embedding(words, single), single), words).backward()
        optimizer.step()
        reference.step()
    assert_same(embedding.weight.detach(), single.detach())
    assert len(optimizer.state) == 1
    assert len(optimizer.state_dict()["state"]) == 1


def test_parameter_named_twice_moves_once(network: OptimizerNetwork) -> None:
    """Torch only warns of a list that names a parameter twice, such as the parameters of two tied layers one after the other."""
    param, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = LearnedOptimizer([param, param], network)
    reference = LearnedOptimizer([other], network)
    param.grad = other.grad = torch.arange(6.0).reshape(3, 2)
    optimizer.step()
    reference.step()
    assert_same(param.detach(), other.detach())


def test_parameters_may_be_swapped_before_the_first_step(network: OptimizerNetwork) -> None:
    """FSDP and accelerate replace the parameters after the optimizer was built."""
    model, other = make_model(), make_model()
    optimizer, reference = LearnedOptimizer(model.parameters(), network), LearnedOptimizer(other.parameters(), network)
    assert not optimizer.state
    replacements = make_model()
    optimizer.param_groups[0]["params"] = list(replacements.parameters())
    before = values(model)
    train(replacements, optimizer, range(3))
    train(other, reference, range(3))
    assert_same(values(replacements), values(other))
    assert_same(values(model), before)
    assert set(optimizer.state) == set(replacements.parameters())


# Experts that are stacked into one tensor


EXPERTS, INPUTS, HIDDEN, OUTPUTS = 8, 16, 32, 4


def outputs_of(first: Tensor, second: Tensor, inputs: Tensor) -> Tensor:
    """Of all experts, (EXPERTS, batch, OUTPUTS)."""
    return torch.einsum("eoh,ebh->ebo", second, torch.einsum("ehi,bi->ebh", first, inputs).tanh())


def train_experts(apart: bool) -> float:
    """The loss to which experts come that lie apart, or stacked into one tensor."""
    generator = torch.Generator().manual_seed(5)
    target = 2 * torch.randn(EXPERTS, HIDDEN, INPUTS, generator=generator) / INPUTS**0.5
    target_second = torch.randn(EXPERTS, OUTPUTS, HIDDEN, generator=generator) / HIDDEN**0.5
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(EXPERTS, HIDDEN, INPUTS, generator=generator) / INPUTS**0.5]
    weights += [torch.randn(EXPERTS, OUTPUTS, HIDDEN, generator=generator) / HIDDEN**0.5]
    members = [[nn.Parameter(part.clone()) for part in (weight if apart else [weight])] for weight in weights]
    optimizer = LearnedOptimizer([*members[0], *members[1]], stacked=not apart)
    losses = []
    for _ in range(400):
        inputs = torch.randn(64, INPUTS, generator=generator)
        first, second = (torch.stack(tuple(parts)) if apart else parts[0] for parts in members)
        loss = (outputs_of(first, second, inputs) - outputs_of(target, target_second, inputs)).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_stacked_experts_train_as_those_apart() -> None:
    """Taken for a convolution's they end more than four times as high."""
    assert train_experts(apart=False) == pytest.approx(train_experts(apart=True), rel=0.2)


def test_stacked_is_an_option_of_all_groups_that_say_nothing_else() -> None:
    params = [nn.Parameter(torch.ones(2, 3, 4)) for _ in range(2)]
    optimizer = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:], "stacked": False}], stacked=True)
    assert [group["stacked"] for group in optimizer.param_groups] == [True, False]


@pytest.mark.parametrize("name", ["layers.0.mlp.experts.gate_up_proj", "experts", "block.Expert_weights"])
def test_experts_that_nobody_called_stacked_are_named(name: str) -> None:
    stack, other = nn.Parameter(torch.ones(4, 3, 2)), nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match=f"parameter '{name}' seems to hold experts.*stacked=True") as caught:
        LearnedOptimizer([("bias", other), (name, stack)])
    assert [warning.filename for warning in caught] == [__file__]
    optimizer = LearnedOptimizer([("bias", other)])
    with pytest.warns(UserWarning, match="seems to hold experts") as caught:
        optimizer.add_param_group({"params": [(name, stack)]})
    assert [warning.filename for warning in caught] == [__file__]


def test_what_is_no_stack_of_experts_is_not_named() -> None:
    stack, frozen = nn.Parameter(torch.ones(4, 3, 2)), nn.Parameter(torch.ones(4, 3, 2), requires_grad=False)
    LearnedOptimizer([("experts.weight", stack)], stacked=True)
    LearnedOptimizer([("experts.0.conv.weight", stack), ("experts.bias", nn.Parameter(torch.ones(4, 3))), ("experts.scale", frozen)])
    LearnedOptimizer([("conv.weight", stack)])


# One optimizer for each parameter


def test_an_optimizer_of_one_parameter_may_know_how_many_matrices_there_are(network: OptimizerNetwork) -> None:
    """The number of matrices makes first steps shorter by as much as the rule says."""
    moved = {}
    for matrices in (None, 2, 3):
        model = make_model()
        start = values(model)
        optimizers = [LearnedOptimizer([param], network, matrices=matrices) for param in model.parameters() if param.numel()]
        loss_of(model, 0).backward()
        for optimizer in optimizers:
            optimizer.step()
        moved[matrices] = (model.first.weight.detach() - start["first.weight"]).norm().item()
    assert moved[None] == pytest.approx(3 * moved[3], rel=1e-3)
    assert moved[2] == pytest.approx(1.5 * moved[3], rel=1e-3)
