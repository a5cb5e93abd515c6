"""The compiled kernel beside `rule.update`, which it must equal to rounding, and its choice."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from rule_helpers import acting_network
from torch import Generator, Tensor, nn

from learned_optim import LearnedOptimizer, OptimizerNetwork, load_network
from learned_optim.kernels import cpu
from learned_optim.storage import DTYPES

SHAPES = [(), (1,), (17,), (1, 9), (5, 7), (7, 5), (40, 3, 3, 3), (2, 16411)]  # the last one is some blocks, and no multiple of a vector

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the package was installed without a C compiler")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(step: int, scale: float) -> list[Tensor]:
    generator = Generator().manual_seed(step)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def run(
    kernel: str, network: OptimizerNetwork, grads: Callable[[int], list[Tensor]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Parameters after some steps from zero, and the optimizer."""
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = LearnedOptimizer(params, network, total_steps=20, kernel=kernel)
    for step in range(5):
        for param, grad in zip(params, grads(step), strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
    return [param.detach() for param in params], optimizer


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4, floor: float = 1e-30) -> None:
    """Within a share of each tensor's root mean square. The kernel's sigmoid and tanh are exact to 3e-6, and Newton-Schulz magnifies."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.square().mean().sqrt() + floor, tuple(one.shape)


def network_of(kind: str, **config: str | int) -> OptimizerNetwork:
    """Weights in which everything acts, or the default ones, that keep all bits of their state unless told otherwise."""
    network = acting_network() if kind == "acting" else load_network("default")
    network.config = dataclasses.replace(network.config, **{"moment_format": "float32", "lstm_format": "float32", **config})
    return network


def assert_states_near(actual: LearnedOptimizer, expected: LearnedOptimizer) -> None:
    for one, other in zip(actual.state.values(), expected.state.values(), strict=True):
        assert one.keys() == other.keys()
        assert_near(list(one.values()), list(other.values()), floor=1e-7)


@pytest.mark.parametrize("units", range(1, cpu.MAX_UNITS + 1))
def test_equals_the_rule(units: int) -> None:
    network = acting_network(hidden_units=units, lstm_format="float32")
    (mine, optimizer), (theirs, reference) = (
        run(kernel, network, lambda step: gradients(step, 1.0)) for kernel in ("compiled", "reference")
    )
    assert_near(mine, theirs)
    assert_states_near(optimizer, reference)


@pytest.mark.parametrize("scale", [1e-17, 1e-9, 1e9, 1e17])
def test_tiny_and_huge_gradients(scale: float) -> None:
    """1e-17 is where floors count, and not yet where squares are lost if some library has denormal numbers flushed; 1e17 squared is near
    the end of fp32."""
    network = network_of("default")
    mine, theirs = (run(kernel, network, lambda step: gradients(step, scale))[0] for kernel in ("compiled", "reference"))
    assert all(param.isfinite().all() and param.any() for param in mine)
    assert_near(mine, theirs)


def test_sparse_outliers_and_zeros() -> None:
    """Coordinates and whole tensors without a gradient, beside some that are a million times the others."""

    def grads(step: int) -> list[Tensor]:
        values = gradients(step, 1.0)
        for k, value in enumerate(values):
            value.view(-1)[::3] = 0
            value.view(-1)[::7] *= 1e6
            if k % 2 and step < 3:
                value.zero_()
        return values

    network = network_of("acting")
    (mine, optimizer), (theirs, reference) = (run(kernel, network, grads) for kernel in ("compiled", "reference"))
    assert_near(mine, theirs)
    assert_states_near(optimizer, reference)


@pytest.mark.parametrize(("moments", "units"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "int8")])
def test_rows_of_words_that_come_late_and_seldom(moments: str, units: str) -> None:
    """Coordinates that never had a gradient are passed over. Those that had one move on without, and what is not zero is never taken for
    it: negative zeros, a gradient at the end of a stretch of zeros, and state beside moments that have vanished."""
    network = network_of("acting", moment_format=moments, lstm_format=units)
    found = {}
    for kernel in ("compiled", "reference"):
        words = nn.Parameter(torch.zeros(40, 64))
        optimizer = LearnedOptimizer([words], network, kernel=kernel)
        for step in range(6):
            grad = torch.randn(40, 64, generator=Generator().manual_seed(step))
            grad[3 if step < 2 else 11 if step < 4 else 0 :] = 0  # one row of four in a stretch, then another stretch, then none
            if step == 3:
                grad[20:28] = -0.0
                grad[31, 63] = 1.0
            words.grad = grad
            if step == 5:
                optimizer.state[words]["moments"][:, :4] = 0
            optimizer.step()
        found[kernel] = [words.detach(), *(optimizer.state[words][key].float() for key in ("moments", "lstm", "control"))]
    compared = len(found["compiled"]) if units == "float32" else 1  # what is stored in less may be on a border
    for one, other in zip(*(each[:compared] for each in found.values()), strict=True):
        assert_near([one], [other], 1e-4 if units == "float32" else 0.03, floor=1e-7)
    assert not found["compiled"][0][12:31].any()
    assert found["compiled"][0][31].all()


def test_what_moves_between_steps_is_noticed() -> None:
    """What a step has found out is kept for the next: gradients at the same addresses and at others, some that are missing or broken, a
    parameter in other memory, another learning rate."""
    found = {}
    for kernel in ("compiled", "reference"):
        params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        optimizer = LearnedOptimizer(params, network_of("default"), kernel=kernel)
        for step in range(9):
            for param, grad in zip(params, gradients(step, 1.0), strict=True):
                if step in (1, 2) or param.grad is None:
                    param.grad = grad
                else:
                    param.grad.copy_(grad)
            if step == 3:
                params[4].grad = None
            if step == 5:
                params[5].grad[0, 0] = torch.nan
            if step == 6:
                params[7].data = params[7].data.clone()
                optimizer.param_groups[0]["lr"] = 0.5
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                optimizer.step()
        assert optimizer.skipped == 1
        found[kernel] = [param.detach() for param in params]
    assert_near(found["compiled"], found["reference"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    network = network_of("default")
    mine, theirs = (run(kernel, network, lambda step: gradients(step, 1.0), dtype=dtype)[0] for kernel in ("compiled", "reference"))
    assert_near([param.float() for param in mine], [param.float() for param in theirs], max(1e-4, 8 * torch.finfo(dtype).eps))


def test_non_contiguous_gradients_and_parameters() -> None:
    params = {kernel: nn.Parameter(torch.zeros(30, 20).T) for kernel in ("compiled", "reference")}
    for kernel, param in params.items():
        optimizer = LearnedOptimizer([param], network_of("default"), kernel=kernel)
        for step in range(3):
            param.grad = torch.randn(20, 90, generator=Generator().manual_seed(step))[:, ::3]
            optimizer.step()
        assert not param.is_contiguous()
    assert_near([params["compiled"].detach()], [params["reference"].detach()])


FORMATS = [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "int8")]


@pytest.mark.parametrize(("moments", "units"), FORMATS)
def test_stored_formats(moments: str, units: str) -> None:
    """Both round by the same random bits, so what differs are values on a border, and what these lead to."""
    network = network_of("acting", moment_format=moments, lstm_format=units)
    (mine, optimizer), (theirs, reference) = (
        run(kernel, network, lambda step: gradients(step, 1.0)) for kernel in ("compiled", "reference")
    )
    assert_near(mine, theirs, 0.02)
    for param, other in zip(optimizer.state, reference.state, strict=True):
        for key, fmt in (("moments", moments), ("lstm", units)):
            one, two = optimizer.state[param][key], reference.state[other][key]
            assert one.dtype == two.dtype == DTYPES[fmt]
            for values, expected in zip(one.float(), two.float(), strict=True):
                if expected.numel() > 100:
                    assert (values - expected).abs().mean() <= 0.01 * expected.abs().max(), key


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_rounding_is_right_on_average(kernel: str) -> None:
    """A running mean of ones whose every step is less than the last bit of bfloat16 gets there all the same."""
    network = network_of("default", moment_format="bfloat16", lstm_format="int8")
    network.config = dataclasses.replace(network.config, momentum=0.999, second_moment=0.999)
    param = nn.Parameter(torch.zeros(5000))
    optimizer = LearnedOptimizer([param], network, kernel=kernel)
    param.grad = torch.ones(5000)
    for _ in range(400):
        optimizer.step()
    for moment in optimizer.state[param]["moments"].float():
        assert moment.mean().item() == pytest.approx(1 - 0.999**400, rel=0.01)


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_poison_stays_in_its_tensors(poison: float, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that gets a gradient of NaN, at its start or in the middle, keeps its parameter and its state, and the others train on as if
    it had no gradient. That is so in both kernels, in the last coordinate of many blocks too, and for the rule where nobody may look."""
    monkeypatch.setattr("learned_optim.kernels.reference.may_wait", lambda device: waits)
    steps = {2: (2, 3), 7: (1, 4)}  # of which tensor

    def grads(step: int, poisoned: bool) -> list[Tensor | None]:
        values: list[Tensor | None] = list(gradients(step, 1.0))
        for k, at in steps.items():
            if step in at:
                values[k] = values[k].index_fill(values[k].dim() - 1, torch.tensor(-1 + values[k].shape[-1]), poison) if poisoned else None
        return values

    for kernel in ("compiled", "reference"):
        results = []
        for poisoned in (True, False):
            params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
            optimizer = LearnedOptimizer(params, total_steps=20, kernel=kernel, weight_decay=0.1)
            for step in range(6):
                for param, grad in zip(params, grads(step, poisoned), strict=True):
                    param.grad = grad
                kept = {k: [value.clone() for value in (params[k], *optimizer.state[params[k]].values())] for k in steps}
                optimizer.step()
                for k, at in steps.items():
                    if step in at:
                        now = [params[k], *optimizer.state[params[k]].values()]
                        assert all(one.equal(other) for one, other in zip(now, kept[k], strict=False)), (kernel, step, k)
            assert optimizer.skipped == (4 if poisoned else 0)
            results.append([param.detach() for param in params])
        assert_near(*results, tolerance=1e-5 if waits or kernel == "compiled" else 0.2)


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_in_a_compiled_function(kernel: str) -> None:
    """Kernels write to addresses, which torch.compile does not see."""
    results = []
    for wrap in (lambda function: function, lambda function: torch.compile(function, backend="eager")):
        torch.compiler.reset()
        params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = LearnedOptimizer(params, network_of("default"), kernel=kernel)

        def train(params: list[Tensor] = params, optimizer: LearnedOptimizer = optimizer) -> None:
            for param in params:
                param.grad = param.detach() * 2
            optimizer.step()

        for function in (train, optimizer.step):
            for _ in range(2):
                wrap(function)()
        results.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_passes_do_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    """To the last bit: on which thread took which block. What torch does between them does depend on that."""
    results = []
    for count in (1, 2, 3):
        threads(count)
        param = nn.Parameter(torch.zeros(300_001))
        optimizer = LearnedOptimizer([param], kernel="compiled")
        for step in range(3):
            param.grad = torch.randn(300_001, generator=Generator().manual_seed(step))
            optimizer.step()
        results.append(torch.cat([value.flatten() for value in optimizer.state[param].values()]))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def test_a_kernel_of_another_version_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that was updated and not installed again has a table of tensors that the compiled file would misread."""
    monkeypatch.setattr(cpu, "INTERFACE", cpu.INTERFACE + 1)
    cpu.library.cache_clear()
    try:
        assert cpu.library() is None
    finally:
        cpu.library.cache_clear()


def test_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    network = acting_network()
    expected, _ = run("reference", network, lambda step: gradients(step, 1.0))
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.warns(UserWarning, match="C compiler") as warned:
        actual, optimizer = run("auto", network, lambda step: gradients(step, 1.0))
    assert len(warned) == 1
    assert optimizer.kernels == {"cpu": "reference"}
    assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError, match="Install gcc or clang"):
        run("compiled", network, lambda step: gradients(step, 1.0))


def test_networks_that_are_too_large_are_named() -> None:
    with pytest.raises(RuntimeError, match=f"up to {cpu.MAX_UNITS} hidden units, and this one has 9"):
        run("compiled", acting_network(hidden_units=9), lambda step: gradients(step, 1.0))


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="kernel must be one of"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2))], kernel="fast")


def test_the_choice_survives_pickling() -> None:
    optimizer = LearnedOptimizer([nn.Parameter(torch.zeros(2))], kernel="reference")
    assert pickle.loads(pickle.dumps(optimizer)).kernel == "reference"
