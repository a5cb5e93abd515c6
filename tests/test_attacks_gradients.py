"""What a `LearnedOptimizer` meets by accident: gradients and parameters of any kind, modes of PyTorch, weights that were edited.

Either all goes well, and then the compiled kernel does what the rule says; or an error says what is wrong, and nothing has changed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacks import FINE, REFUSED, Attack, gradient_attacks, inference, tried
from optimizer_helpers import assert_same, make_model, make_pair, train, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from learned_optim import LearnedOptimizer, load_network
from learned_optim.kernels import native

# Gradients and parameters

NOT_TRAINED = {f"parameter: {kind}" for kind in ("float8", "complex", "expanded", "overlapping", "negated", "zeros that have no memory")}
NOT_TRAINED |= {f"parameter: {kind}" for kind in ("freed", "on meta", "sparse", "mkldnn", "nested")}
NOT_TRAINED |= {"gradient: sparse", "gradient: freed"}


@pytest.mark.parametrize(("name", "attack"), list(gradient_attacks()), ids=lambda value: value if isinstance(value, str) else "")
def test_kinds_of_gradients_and_parameters(name: str, attack: Attack) -> None:
    expected = REFUSED if name in NOT_TRAINED else FINE
    assert tried(attack) == expected


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda param: param.untyped_storage().resize_(0), "has lost its memory"),
        (lambda param: param.untyped_storage().resize_(16), "has lost its memory"),
        (lambda param: setattr(param, "data", torch.ones(1).expand(4, 3)), "one place in memory"),
        (lambda param: setattr(param, "data", torch._neg_view(torch.ones(4, 3))), "a negated view"),
        (lambda param: setattr(param, "data", param.data.to(torch.complex64)), "real floating-point"),
        (lambda param: setattr(param, "data", inference(param.data)), "made in inference mode"),
    ],
)
def test_a_parameter_whose_memory_was_swapped_is_looked_at_again(kernel: str, edit: Callable[[Tensor], Any], message: str) -> None:
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = LearnedOptimizer(params, kernel=kernel)
    for param in params:
        param.grad = torch.ones(4, 3)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].grad = None
    edit(params[1])
    params[1].grad = torch.ones(params[1].shape, dtype=params[1].dtype)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert params[0].equal(before)


def test_lazy_parameters() -> None:
    model = nn.LazyLinear(3)
    optimizer = LearnedOptimizer(model.named_parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["moments"].shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(3).to(torch.float8_e5m2), "real floating-point parameters.*float8_e5m2"),
        (torch.ones(1).expand(4), "are one place in memory"),
        (torch._neg_view(torch.ones(4)), "is a negated view"),
        (torch.eye(3).to_sparse(), "trains dense parameters"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused_before_others_move(param: Tensor, message: str) -> None:
    """When the optimizer is built, or at the first gradient of one that was frozen until then."""
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([nn.Parameter(param)])
    other, late = nn.Parameter(torch.ones(3)), nn.Parameter(param, requires_grad=False)
    optimizer = LearnedOptimizer([other, late])
    late.requires_grad_()
    other.grad = torch.ones(3)
    if late.layout is torch.strided:
        late.grad = torch.ones(late.shape).to(late.dtype)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert other.equal(torch.ones(3))
        assert not optimizer.state[other]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_may_be_anything(dtype: torch.dtype) -> None:
    frozen, param = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([frozen, param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.ne(1).all()


# Numbers that are none


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e20])
def test_one_bad_gradient_is_told_once_or_raises(kernel: str, poison: float) -> None:
    def build(**options: Any) -> tuple[nn.Module, LearnedOptimizer]:
        model, optimizer = make_pair(kernel, **options)
        model.first.weight.grad[0, 0] = poison
        return model, optimizer

    model, optimizer = build()
    before = values(model)
    with pytest.warns(UserWarning, match=r"the gradient of parameter 'first.weight' is not finite") as record:
        optimizer.step()
    assert record[0].filename == __file__
    optimizer.step()
    assert optimizer.skipped == copy.deepcopy(optimizer).skipped == 2
    assert model.first.weight.equal(before["first.weight"])
    assert not model.second.weight.equal(before["second.weight"])
    assert all(param.isfinite().all() for param in model.parameters())

    model, optimizer = build(error_if_nonfinite=True)
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'first.weight' is not finite"):
        optimizer.step()
    assert_same((values(model), optimizer.state_dict()), before)


# Modes


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode, lambda: torch.autograd.set_detect_anomaly(True)])
def test_a_first_step_or_a_load_in_another_mode_is_the_same(kernel: str, mode: Callable[[], Any]) -> None:
    """A default device is none of the optimizer's, and state made in inference mode can be changed outside of it."""
    results = []
    for inside in (contextlib.nullcontext, mode):
        params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
        optimizer = LearnedOptimizer(params, kernel=kernel)
        for param in params:
            param.grad = torch.full(param.shape, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that anomalies are looked for
            with inside():
                optimizer.step()
            optimizer.step()
            with inside():
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        results.append([param.detach() for param in params])
    assert_same(*results)


def test_where_tensors_have_no_numbers_a_step_is_refused() -> None:
    model, optimizer = make_pair()
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="inside this mode tensors are made as FakeTensor"):
        optimizer.step()
    assert_same((values(model), optimizer.state_dict()), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_threads_of_the_compiled_kernel_after_a_fork() -> None:
    """A child has none of its parent's, and would wait for them for ever."""
    assert native.pool(1).submit(lambda: 3).result() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forks of processes with threads may hang
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(native.pool(1).submit(lambda: 3).result())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


# The optimizer's weights


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_weights_that_are_no_numbers_are_refused(kernel: str) -> None:
    for weight, message in ((torch.tensor(torch.nan), "not finite"), (torch.tensor(1.0, device="meta"), "on the device meta")):
        network = load_network("default")
        network.log_step_size = nn.Parameter(weight)
        with pytest.raises(ValueError, match=rf"the optimizer weights log_step_size are {message}"):
            LearnedOptimizer([nn.Parameter(torch.ones(3))], network, kernel=kernel)


def test_weights_with_gaps_are_read_as_they_are() -> None:
    results = []
    for gaps in (False, True):
        network = load_network("default")
        for weight in network.coordinate.parameters():
            weight.data = weight.data.mT.contiguous().mT if gaps and weight.dim() > 1 else weight.data
        model = make_model()
        train(model, LearnedOptimizer(model.parameters(), network), range(3))
        results.append(values(model))
    assert_same(*results)


def test_weights_that_were_cast_since_are_not_read_as_what_they_were() -> None:
    model, optimizer = make_pair("compiled")
    before = values(model)
    optimizer.network.half()
    with pytest.raises(RuntimeError, match=r"the weights of LearnedOptimizer.network were moved or cast"):
        optimizer.step()
    assert_same(values(model), before)
