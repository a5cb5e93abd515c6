"""The iterations of Newton and Schulz by which the rule orthogonalises the updates of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_helpers import layout_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learned_optim import rule
from learned_optim.network import OptimizerNetwork
from learned_optim.rule import LONG, SMALL, newton_schulz, orthogonalize


def orthogonalized(wide: Tensor, steps: int) -> Tensor:
    """By iterations on whole matrices (batch, rows, columns), nothing shared between them."""
    wide = wide / (wide @ wide.mT).square().sum((-2, -1), keepdim=True) ** 0.25
    for _ in range(steps):
        wide = newton_schulz(wide, wide @ wide.mT)[0]
    return wide


@pytest.mark.parametrize("shape", [(SMALL, LONG * SMALL), (2, 5 * SMALL, SMALL)], ids=str)
def test_long_matrices_are_orthogonalised_by_their_gram_matrix(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """The same numbers, to rounding, as the iteration on the whole matrix."""
    matrix = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[-1])
    wide = (matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix).reshape(-1, SMALL, max(shape[-2:]))
    wide = orthogonalized(wide, 5)
    expected = (wide.mT if matrix.shape[-2] > matrix.shape[-1] else wide).reshape(shape)
    torch.testing.assert_close(orthogonalize(matrix, 5), expected, rtol=0, atol=2e-3 * expected.abs().max().item())


class LargestResult(TorchDispatchMode):
    """How many numbers the largest tensor had that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.size = max(self.size, out.numel())
        return out


def test_no_more_matrices_are_in_hand_at_once_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, network: OptimizerNetwork, generator: torch.Generator
) -> None:
    directions = [torch.randn(size, generator=generator) for size in (8 * 6,) * 7]
    layout = layout_of([torch.ones(8, 6)] * 7)
    expected = dict(rule.orthogonalize_all(directions, layout, network.config))
    monkeypatch.setattr(rule, "TOGETHER", 3 * 8 * 6 - 1)
    with LargestResult() as largest:
        found = dict(rule.orthogonalize_all(directions, layout, network.config))
    assert largest.size <= 2 * 8 * 6
    assert found.keys() == expected.keys()
    for k, matrix in found.items():
        torch.testing.assert_close(matrix, expected[k])


@pytest.mark.parametrize("shape", [(SMALL, SMALL + 9), (3, SMALL + 5, SMALL)], ids=str)
def test_derivative_of_large_matrices(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """It is written by hand, and equals that of the operations one by one; so does what vmap makes of it."""
    matrix, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def plain(matrix: Tensor) -> Tensor:
        wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
        wide = orthogonalized(wide.reshape(-1, *wide.shape[-2:]), 3)
        return (wide.mT if matrix.shape[-2] > matrix.shape[-1] else wide).view(matrix.shape)

    def slope(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.grad(lambda matrix: (function(matrix) * weight).sum())(matrix)

    expected = slope(plain)
    torch.testing.assert_close(slope(lambda matrix: orthogonalize(matrix, 3)), expected, rtol=1e-9, atol=1e-10)
    if len(shape) == 3:
        torch.testing.assert_close(slope(torch.func.vmap(lambda matrix: orthogonalize(matrix, 3))), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20)], ids=str)
def test_orthogonalize_keeps_the_singular_vectors(generator: torch.Generator, shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spread = torch.logspace(-2, 0, left.shape[1], dtype=torch.float64)
    result = orthogonalize((left * spread) @ right, 5)
    inner = left.mT @ result @ right.mT
    torch.testing.assert_close(inner - inner.diagonal().diag(), torch.zeros_like(inner), rtol=0, atol=1e-9)
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.3
    torch.testing.assert_close(orthogonalize(((left * spread) @ right).mT, 5), result.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [8, 64, 512])
def test_three_iterations_are_enough_whatever_the_size(generator: torch.Generator, side: int) -> None:
    """Scaled by the Frobenius norm, singular values of 512 columns would begin at 1 / 23 and end below a half."""
    found = torch.linalg.svdvals(orthogonalize(torch.linalg.qr(torch.randn(side, side, generator=generator))[0], 3))
    assert found.min() > 0.65
    assert found.max() < 1.25
    assert not orthogonalize(torch.zeros(side, side), 3).any()
