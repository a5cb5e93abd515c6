"""Embeddings of which a step sees few rows keep their direction's length; other long matrices are orthogonalised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.optimizer import ROWS

ROWS_IN_USE = 40


def trained(param: nn.Parameter, grads: list[Tensor], optimizer: LearnedOptimizer | None = None, kernel: str = "auto") -> LearnedOptimizer:
    optimizer = optimizer or LearnedOptimizer([param], kernel=kernel)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return optimizer


def gradients(count: int, rows: int = ROWS, columns: int = 8, used: int = ROWS_IN_USE) -> list[Tensor]:
    """Gradients of an embedding, each with other rows in use."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        grad = torch.zeros(rows, columns)
        grad[torch.randperm(rows, generator=generator)[:used]] = torch.randn(used, columns, generator=generator)
        found.append(grad)
    return found


def table(rows: int = ROWS, columns: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns))


@pytest.mark.parametrize("kernel", ["reference", "compiled"])
def test_how_far_a_row_moves_does_not_depend_on_how_many_others_there_are(kernel: str) -> None:
    moved = []
    for rows in (ROWS, 16 * ROWS):
        param, grads = table(rows), torch.zeros(rows, 8)
        grads[:ROWS_IN_USE] = gradients(1, ROWS_IN_USE, used=ROWS_IN_USE)[0]
        trained(param, [grads], kernel=kernel)
        assert not param[ROWS_IN_USE:].any()
        moved.append(param.detach()[:ROWS_IN_USE])
    torch.testing.assert_close(moved[0], moved[1])
    assert moved[0].abs().min() > 0


def test_a_row_that_is_seen_once_moves_about_as_far_as_those_seen_at_each_step() -> None:
    # An orthogonalised update gives the one row's direction as much as that of all the others together.
    common = torch.zeros(ROWS, 8)
    common[:ROWS_IN_USE, :4] = 1.0
    rare = common.clone()
    rare[-1, 4:] = 1.0
    param = table()
    optimizer = trained(param, [common] * 20)
    before = param.detach().clone()
    trained(param, [rare], optimizer)
    moved = (param.detach() - before).norm(dim=1)
    assert 0 < moved[-1] < 1.3 * moved[0]


def test_kernels_agree() -> None:
    params = []
    for kernel in ("reference", "compiled"):
        param = table()
        trained(param, gradients(5), kernel=kernel)
        params.append(param.detach())
    torch.testing.assert_close(*params, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", ["all rows", "half of the rows"])
def test_a_matrix_whose_rows_have_gradients_is_orthogonalised(first: str) -> None:
    used = ROWS if first == "all rows" else ROWS // 2
    param = table()
    trained(param, gradients(1, used=used))
    values = torch.linalg.svdvals(param.detach())
    assert values.max() < 2 * values.min()  # which random rows do not have

    table_param = table()
    trained(table_param, gradients(1))
    sparse = torch.linalg.svdvals(table_param.detach())
    assert sparse.max() > 1.5 * sparse.min()


def test_what_it_was_at_first_it_stays_also_after_a_resume() -> None:
    dense = gradients(3, used=ROWS)
    param = table()
    optimizer = trained(param, gradients(2) + dense[:1])
    saved, start = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    trained(param, dense[1:], optimizer)

    again = nn.Parameter(start)
    other = LearnedOptimizer([again])
    other.load_state_dict(saved)
    trained(again, dense[1:], other)
    assert torch.equal(param, again)
    clone = copy.deepcopy(optimizer)
    assert clone.state_dict()["state"][0]["control"].equal(optimizer.state_dict()["state"][0]["control"])


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_first_gradient_without_numbers_decides_nothing(value: float) -> None:
    param, expected = table(), table()
    with pytest.warns(UserWarning, match="not finite") if value else torch.no_grad():
        optimizer = trained(param, [torch.full((ROWS, 8), value)])
    trained(param, gradients(3), optimizer)
    trained(expected, gradients(3))
    assert torch.equal(param, expected)


def test_short_and_wide_matrices_are_none() -> None:
    # Few rows in use, as with a batch of one and rectifiers: what decides is the shape.
    for shape in ((ROWS // 2, 8), (ROWS, ROWS // 2), (8, ROWS)):
        param = nn.Parameter(torch.zeros(shape))
        grad = torch.zeros(shape)
        grad[: max(1, shape[0] // 16)] = torch.randn(max(1, shape[0] // 16), shape[1], generator=torch.Generator().manual_seed(0))
        trained(param, [grad])
        values = torch.linalg.svdvals(param.detach())
        values = values[values > 0.01 * values.max()]
        assert values.max() < 2 * values.min()
