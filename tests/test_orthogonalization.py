"""The iterations of Newton and Schulz by which the rule orthogonalises the updates of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rule_helpers import layout_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learned_optim import rule
from learned_optim.config import NetworkConfig
from learned_optim.features import Layout
from learned_optim.kernels import matrices
from learned_optim.kernels.matrices import Matrices
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


needs_compiler = pytest.mark.skipif(matrices.library() is None, reason="the package was installed without a C compiler")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_c(directions: list[Tensor], layout: Layout, config: NetworkConfig, threads: int) -> dict[int, Tensor]:
    """Those that C code orthogonalises."""
    chosen, flat = Matrices(layout, config, threads), torch.cat(directions)
    chosen.orthogonalize(flat)
    return {k: part for k, part in enumerate(flat.split(layout.sizes)) if layout.is_matrix[k] and k not in chosen.others}


SHAPES = [
    (2, 2),
    (5, 3),
    (6, 6),
    (3, 50),
    (16, 16),
    (17, 33),
    (100, 7),
    (32, 9),
    (64, 256),
    (127, 128),
    (130, 130),
    (150, 40),
    (8, 3, 3, 3),
    (7,),
]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.usefixtures("two_threads")
def test_c_code_orthogonalises_as_the_rule_does(generator: torch.Generator, threads: int, steps: int) -> None:
    """Matrices of full rank, of one, and zeros, with singular values down to 1e-3, high and wide, whatever a tile's rows and columns."""
    layout, config = layout_of([torch.ones(shape) for shape in SHAPES]), NetworkConfig(orthogonalize_steps=steps)
    full = [torch.randn(shape, generator=generator).flatten(1) if len(shape) > 1 else torch.ones(shape) for shape in SHAPES]
    for kind in ("full", "steep", "of rank one", "small", "zero"):
        directions = {
            "full": full,
            "steep": [each * torch.logspace(0, -3, each.shape[-1]) for each in full],
            "of rank one": [each[:1].expand_as(each) for each in full],
            "small": [1e-3 * each for each in full],
            "zero": [0 * each for each in full],
        }[kind]
        directions = [each.reshape(-1) for each in directions]
        expected = dict(rule.orthogonalize_all([each.double() for each in directions], layout, config))
        found = in_c(directions, layout, config, threads)
        large = {k for k in expected if min(layout.fans[k]) >= rule.SMALL}
        assert set(found) == set(expected) - (set() if matrices.fastest() else large)
        for k, matrix in found.items():
            close = matrix.double().isclose(expected[k], rtol=1e-4, atol=2e-5)
            assert close.all(), f"{kind}, {SHAPES[k]}: {(matrix - expected[k]).abs().max()}"


@needs_compiler
def test_c_code_orthogonalises_each_matrix_of_a_stack(generator: torch.Generator) -> None:
    layout = Layout((torch.Size([3, 2, 20, 12]), torch.Size([20, 12])), torch.device("cpu"), (True, False))
    directions = [torch.randn(size, generator=generator) for size in layout.sizes]
    expected = dict(rule.orthogonalize_all(directions, layout, NetworkConfig()))
    found = in_c(directions, layout, NetworkConfig(), 1)
    assert set(found) == {0, 1}
    for k, matrix in found.items():
        torch.testing.assert_close(matrix, expected[k], rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.skipif(not matrices.fastest(), reason="torch multiplies large matrices faster on this processor")
def test_a_matrix_that_other_threads_would_wait_for_is_left_to_torch() -> None:
    large, small, tiny = torch.Size([400, 400]), torch.Size([200, 200]), torch.Size([20, 20])
    for threads, shapes, left in [
        (2, (tiny, large, small), [1, 2]),
        (1, (tiny, large), []),
        (2, (large, large, tiny), []),
        (2, (tiny,), []),
    ]:
        assert Matrices(Layout(shapes, torch.device("cpu")), NetworkConfig(), threads).others == left
