"""What a `LearnedOptimizer` finds in its groups by accident, and which tensors it was given.

Either all goes well, and then the compiled kernel does what the rule says; or an error says what is wrong, and nothing has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_helpers import assert_same, make_model, make_pair, train, values
from test_kernels import assert_near
from torch import nn
from torch.optim import lr_scheduler

from learned_optim import LearnedOptimizer
from learned_optim.features import Layout

# Groups


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_maximize_is_a_step_down_the_negated_loss(kernel: str) -> None:
    results = []
    for sign in (1, -1):
        param = nn.Parameter(torch.ones(3))
        optimizer = LearnedOptimizer([{"params": [param], "maximize": sign < 0}], kernel=kernel)
        param.grad = sign * torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        results.append(param.detach())
    assert_same(*results)


@pytest.mark.parametrize("key", ["betas", "eps", "momentum", "amsgrad", "fused"])
def test_unknown_group_options_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"does not know the group option {key}"):
        LearnedOptimizer([{"params": [nn.Parameter(torch.ones(3))], key: 1}])


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0),
    ],
)
def test_schedulers_that_cycle_momentum(scheduler: Callable[[torch.optim.Optimizer], Any]) -> None:
    """They cycle the lr; a checkpoint with what they leave in the groups loads."""
    model, optimizer = make_pair()
    train(model, optimizer, range(3), scheduler(optimizer))
    other = LearnedOptimizer(make_model().named_parameters(), "small")
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    assert "momentum" not in other.param_groups[1]


def test_what_was_an_lr_elsewhere() -> None:
    param = nn.Parameter(torch.ones(3))
    for lr in (1e-3, torch.tensor(1e-3), 1):
        with pytest.raises(TypeError, match="If that is a learning rate, leave it out"):
            LearnedOptimizer([param], lr)
    optimizer = LearnedOptimizer([param])
    for build in (
        lambda: LearnedOptimizer([param], lr=1e-3),
        lambda: LearnedOptimizer([param], lr=torch.tensor(1e-3)),
        lambda: LearnedOptimizer([{"params": [param]}, {"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3}], lr=1e-4),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3}),
    ):
        with pytest.warns(UserWarning, match=r"lr=0.001 multiplies the learned update.*1.0 is the default") as record:
            build()
        assert len(record) == 1
        assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LearnedOptimizer([param], lr=0.0)
        LearnedOptimizer([param], lr=0.02)


def test_numpy_numbers_become_pythons() -> None:
    group = LearnedOptimizer(
        [nn.Parameter(torch.ones(3))], lr=np.float16(0.5), weight_decay=np.float64(0.25), total_steps=np.int64(9)
    ).param_groups[0]
    assert [type(group[key]) for key in ("lr", "weight_decay", "total_steps")] == [float, float, int]


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("lr", value)
            for value in (torch.nan, torch.inf, -1.0, "1", None, 1j, 10**400, 1e39, True, torch.ones(2), torch.tensor(torch.nan))
        ),
        *(("weight_decay", value) for value in (torch.nan, -1.0, "x", True, torch.tensor(0.1))),
        *((key, value) for key in ("total_steps", "matrices") for value in (0, 1.5, torch.nan, "9", True, 10**400)),
        *((key, value) for key in ("maximize", "stacked") for value in (None, "yes", torch.tensor(True))),
    ],
)
def test_what_is_written_into_a_group_is_looked_at_before_a_step(kernel: str, key: str, value: Any) -> None:
    model, optimizer = make_pair(kernel)
    before = values(model)
    kept = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"(?i){key} "):
        optimizer.step()
    assert_same(values(model), before)
    del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=f"a parameter group lacks {key}"):
        optimizer.step()
    optimizer.param_groups[0][key] = kept
    optimizer.step()
    with pytest.raises(ValueError, match=f"(?i){key} "):
        LearnedOptimizer([{"params": [nn.Parameter(torch.ones(3))], key: value}], kernel=kernel)


def test_a_tensor_lr_that_becomes_no_number() -> None:
    lr = torch.tensor(1.0)
    model, optimizer = make_pair(lr=lr)
    lr.fill_(torch.nan)
    with pytest.raises(ValueError, match="lr multiplies the learned update"):
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


def test_an_option_that_is_written_into_a_group_later_is_named_once() -> None:
    _, optimizer = make_pair()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    with pytest.warns(UserWarning, match="parameter group 0 was given betas, which LearnedOptimizer does not know and ignores") as record:
        optimizer.step()
    assert record[0].filename == __file__
    optimizer.step()


def test_groups_may_be_taken_away() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (2, 3), (3,))]
    optimizer = LearnedOptimizer([{"params": params[:2]}, {"params": params[2:]}])
    del optimizer.param_groups[0]
    params[2].grad = torch.ones(3)
    optimizer.step()
    assert params[2].ne(1).all()


# Which tensors an optimizer was given


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_one_optimizer_for_each_parameter(kernel: str) -> None:
    """Told how many matrices the model has, their first steps are those of one optimizer for all, but for what tensors tell one another."""
    whole, parts = ([nn.Parameter(torch.zeros(4, 3)) for _ in range(4)] for _ in range(2))
    optimizers = [LearnedOptimizer(whole, kernel=kernel), *(LearnedOptimizer([param], kernel=kernel, matrices=4) for param in parts)]
    for k, pair in enumerate(zip(whole, parts, strict=True)):
        for param in pair:
            param.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
    for optimizer in optimizers:
        optimizer.step()
    assert_near([param.detach() for param in parts], [param.detach() for param in whole], 1e-3)


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_stacks_are_matrices_of_their_own(kernel: str) -> None:
    """The first step of a stack is that of its matrices; convolutions stay what they are."""
    grad = torch.randn(5, 4, 3)
    separate, stack, kernels = (
        [nn.Parameter(torch.zeros(4, 3)) for _ in range(5)],
        nn.Parameter(torch.zeros(5, 4, 3)),
        nn.Parameter(torch.zeros(5, 4, 3)),
    )
    for param, part in zip(separate, grad, strict=True):
        param.grad = part
    stack.grad = kernels.grad = grad
    LearnedOptimizer(separate, kernel=kernel).step()
    LearnedOptimizer([{"params": [stack], "stacked": True}], kernel=kernel).step()
    LearnedOptimizer([kernels], kernel=kernel).step()
    joined = torch.stack([param.detach() for param in separate])
    change, other = stack.detach().flatten(1), joined.flatten(1)
    assert nn.functional.cosine_similarity(change, other).min() > 0.99
    assert change.norm().item() == pytest.approx(other.norm().item(), rel=0.1)
    assert nn.functional.cosine_similarity(kernels.detach().flatten(), other.flatten(), dim=0) < 0.99


def test_layout_of_stacks() -> None:
    shapes = torch.Size([5, 4, 3]), torch.Size([2, 5, 4, 1]), torch.Size([4, 3]), torch.Size([5, 4, 3])
    layout = Layout(shapes, torch.device("cpu"), (True, True, True, False), (None, 7, None, None))
    assert layout.fans == [(4, 3), (4, 1), (4, 3), (5, 12)]
    assert layout.stacks == [(5,), (10,), (), ()]
    assert layout.is_matrix == [True, False, True, True]
    assert layout.of_some([2]).matrices == (7,)
    assert layout.of_some([1]).matrices == (7,)
