"""Recorded arithmetic beside the operations that it was recorded of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_kernels import network_of
from torch import Generator, Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.kernels import cpu, replay
from learned_optim.kernels.replay import Program, Replay

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the package was installed without a C compiler")

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda a, b: -(2 * a + b - 1) / (b + 0.5) * (3 - a),
    "powers": lambda a, b: (a.abs() ** b.abs() + 0.9 ** (10 * a) + a.square()).abs().sqrt() + 1 / a + (1 + a.abs()).rsqrt(),
    "logarithms": lambda a, b: (a.abs() + 1e-20).log() + b.exp(),
    "bounds": lambda a, b: a.clamp(min=0) + a.clamp(max=0.3) + b.clamp(-0.2, 0.2) + torch.maximum(a, b) + torch.minimum(a, b),
    "choices": lambda a, b: torch.where(a > 0, a, 0) + torch.where(b < 0.5, a, b) + (b < 0.5).float(),
    "infinities": lambda a, b: a.isfinite().float() + (a == b).float() + (1 / a).isfinite().float(),
    "means": lambda a, b: torch.lerp(a, b, 0.3) + torch.lerp(a, b, a) + a.mean(-1, keepdim=True) + b.sum(0) + (a > 0).sum(-1, keepdim=True),
    "pieces": lambda a, b: torch.cat([torch.stack([a[0], *b[:-1]]), a[-2:]]) + torch.stack([a.sum(0), b[1]], -1).sum(-1),
    "totals": lambda a, b: a + b[0].sum(-1, keepdim=True) + a[1].mean(-1, keepdim=True),
    "broadcasts": lambda a, b: a[0] * b + a[:, :1] + b[1, 2],
}

SIDE_BY_SIDE = torch.tensor([2.0, 3.0]).unbind()  # two tensors in one piece of memory


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(3)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)


@pytest.fixture(params=["in C", "by Triton"])
def make(request: pytest.FixtureRequest) -> type[Program]:
    if request.param == "in C":
        return Program
    pytest.importorskip("triton", reason="Triton is not installed")
    from learned_optim.kernels import gpu_replay

    return gpu_replay.Program


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_what_was_recorded(name: str, pair: tuple[Tensor, Tensor], make: type[Program]) -> None:
    """To rounding, with other numbers than it was recorded with, and with what is not finite."""
    if make is not Program and torch.cuda.is_available():
        pair = pair[0].cuda(), pair[1].cuda()
    run, odd = Replay(make), pair[0].new_tensor([0.0, torch.inf, -torch.inf, torch.nan, 1e-30]).expand(4, 5)

    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        return [FUNCTIONS[name](a, b), a]

    for a, b in (pair, (pair[1], 2 * pair[0]), (odd, pair[0]), (pair[1], odd), (odd, odd)):
        actual, same = run(name, function, a, b)
        torch.testing.assert_close(actual, FUNCTIONS[name](a, b), rtol=3e-6, atol=3e-6, equal_nan=True)
        torch.testing.assert_close(same, a, rtol=0, atol=0, equal_nan=True)
    assert all(isinstance(program, Program) for program in run.programs.values()), run.programs


def test_reads_tensors_that_live_on_anew(pair: tuple[Tensor, Tensor]) -> None:
    run, outside = Replay(), torch.tensor(2.0)
    for factor in (2.0, 3.0):
        outside.fill_(factor)
        assert run("scale", lambda a: [a * outside], pair[0])[0].equal(factor * pair[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda a: [a * a.sum().item()],
        lambda a: [a.clone().mul_(2)],
        lambda a: [a + torch.rand(())],
        lambda a: [a.double()],
        lambda a: [a.cumsum(0)],
        lambda a: [torch.add(a, a, alpha=3)],
        lambda a: [a * SIDE_BY_SIDE[0] + SIDE_BY_SIDE[1]],
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(function: Callable[[Tensor], list[Tensor]], pair: tuple[Tensor, Tensor]) -> None:
    run = Replay()
    for a in (*pair, pair[0]):
        torch.manual_seed(0)
        (actual,) = run("function", function, a)
        torch.manual_seed(0)
        assert actual.equal(function(a)[0])
    (reason,) = run.programs.values()
    assert isinstance(reason, str)


@pytest.mark.parametrize("total_steps", [None, 4])
def test_steps_are_replayed_whole(total_steps: int | None) -> None:
    """A function that falls back to PyTorch operations makes the step of a small model twice as long. Where the rule takes an operation
    that `replay.py` does not know, add it there and in `arithmetic.c`."""
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(5))]
    optimizer = LearnedOptimizer(params, total_steps=total_steps, kernel="compiled")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    (ledger,) = optimizer._ledgers.values()
    assert {name for name, _ in ledger.memory["replay"].programs} == {"before directions", "before update"}
    assert all(isinstance(program, Program) for program in ledger.memory["replay"].programs.values()), ledger.memory["replay"].programs


def test_follows_weights_that_change() -> None:
    """In place, or for others."""
    results = []
    for kernel in ("compiled", "reference"):
        param = nn.Parameter(torch.ones(7))
        optimizer = LearnedOptimizer([param], network_of("default"), kernel=kernel)
        for change in (None, "in place", "replaced"):
            if change == "in place":
                optimizer.network.log_step_size.add_(1.0)
            elif change == "replaced":
                optimizer.network.controller.power = nn.Parameter(torch.tensor(0.5), requires_grad=False)
            param.grad = torch.randn(7, generator=Generator().manual_seed(1))
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.fixture
def _another_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replay, "INTERFACE", replay.INTERFACE + 1)
    for module in (replay, cpu):
        module.library.cache_clear()
    yield
    for module in (replay, cpu):
        module.library.cache_clear()


@pytest.mark.usefixtures("_another_version")
def test_a_compiled_file_of_another_version_is_not_run() -> None:
    assert replay.library() is None
    assert cpu.library() is None
