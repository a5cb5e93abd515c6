"""What a `LearnedOptimizer` is handed by accident: state dicts that do not fit, gradients of any kind, numbers that are none.

Either all goes well, and then the compiled kernel does what the rule says; or an error says what is wrong, and nothing has changed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import FINE, KILLS, REFUSED, Attack, gradient_attacks, inference, kill, state_attacks, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_helpers import assert_same, make_model, train, values
from test_kernels import assert_near
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler

from learned_optim import LearnedOptimizer, load_network
from learned_optim.features import Layout
from learned_optim.kernels import cpu

SEARCH = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def make(kernel: str = "auto", pretrained: str = "small", steps: int = 2, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    model = make_model()
    optimizer = LearnedOptimizer(model.named_parameters(), pretrained, kernel=kernel, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


# State dicts

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
NUMBERS = [float("nan"), float("inf"), -1.0, "fast", None, 10**400, 0.5, np.float32(0.5), np.int64(7)]


def mutate(saved: dict[str, Any], data: st.DataObject) -> None:
    """Changes one thing."""
    state, groups = saved["state"], saved["param_groups"]
    index = data.draw(st.sampled_from(sorted(key for key in state if isinstance(key, int)) or [0]))
    own = state.get(index, {})
    key = data.draw(st.sampled_from(sorted(own) or ["moments"]))
    value = own.get(key)
    tensor = value if isinstance(value, Tensor) else torch.ones(3)
    match data.draw(st.integers(0, 14)):
        case 0:
            own.pop(key, None)
        case 1:
            own["renamed"] = own.pop(key, None)
        case 2:
            own[key] = tensor.to(data.draw(st.sampled_from(DTYPES)))
        case 3:
            own[key] = tensor.to("meta")
        case 4:
            own[key] = tensor.mT if tensor.dim() > 1 else tensor[::2]
        case 5:
            own[key] = tensor.flatten()[:1].expand(tensor.shape)
        case 6:
            own[key] = torch.cat([tensor, tensor], data.draw(st.integers(0, max(0, tensor.dim() - 1)))) if tensor.dim() else tensor[None]
        case 7:
            own[key] = data.draw(st.sampled_from([None, 3, "text", [1.0], tensor.tolist(), nn.Parameter(tensor.float())]))
        case 8:
            own[key] = torch._efficientzerotensor(tensor.shape)
        case 9:
            own[key] = torch.full_like(tensor, data.draw(st.sampled_from([float("nan"), float("inf"), -3.0])), dtype=torch.float32)
        case 10:
            other = data.draw(st.sampled_from(sorted(key for key in state if isinstance(key, int)) or [0]))
            state[index], state[other] = state.get(other, {}), own
        case 11:
            state[data.draw(st.sampled_from([99, "mine"]))] = state.pop(index, {})
        case 12:
            group = data.draw(st.sampled_from(groups))
            group[data.draw(st.sampled_from(["lr", "weight_decay", "total_steps", "matrices"]))] = data.draw(st.sampled_from(NUMBERS))
        case 13:
            group = data.draw(st.sampled_from(groups))
            group.pop(data.draw(st.sampled_from(sorted(group))))
        case 14:
            params = data.draw(st.sampled_from(groups)).get("params", [])  # another mutation may have taken them away
            params[:] = data.draw(st.sampled_from([params[::-1], params[1:], [0] * len(params)]))


@SEARCH
@given(st.data())
def test_mutated_state_loads_or_is_refused(data: st.DataObject) -> None:
    _, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(saved, data)
    pairs = [make(kernel, steps=1) for kernel in ("compiled", "reference")]
    refused = []
    for model, other in pairs:
        before = copy.deepcopy((values(model), other.state_dict()))
        try:
            other.load_state_dict(saved)
        except ValueError as error:
            refused.append(str(error))
        if refused:
            assert_same((values(model), other.state_dict()), before)
        train(model, other, range(5, 6))
        assert all(param.isfinite().all() for param in model.parameters())
    assert len(refused) in (0, 2)
    assert len(set(refused)) <= 1
    for one, two in zip(*(model.parameters() for model, _ in pairs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "attack"), list(state_attacks())[::23], ids=lambda value: value if isinstance(value, str) else "")
def test_a_few_of_the_attacks_on_states(name: str, attack: Attack) -> None:
    assert tried(attack) in (REFUSED, FINE), name


@pytest.mark.parametrize("name", ["meta-training", "saving"])
def test_killed_runs_go_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    assert kill(KILLS[name], tmp_path / "kills", kills=2, seed=1)["the same bits"] >= 1


@pytest.mark.parametrize("entry", [None, "x", [1]])
def test_a_state_that_is_no_dictionary_is_refused(entry: Any) -> None:
    _, optimizer = make()
    saved = optimizer.state_dict()
    saved["state"][0] = entry
    with pytest.raises(ValueError, match="the state of parameter 'gain' is no dictionary"):
        make()[1].load_state_dict(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda saved: saved.update(param_groups=None), "'param_groups' a list"),
        (lambda saved: saved.update(state=[1]), "'state' must be a dictionary"),
        (lambda saved: saved["param_groups"].__setitem__(0, None), "group 0 of the state is no dictionary but None"),
        (lambda saved: saved["param_groups"][0].update(params="ab"), "group 0 of the state has no list of params but 'ab'"),
        (lambda saved: saved["param_groups"][0].update(params=[[0], [1]]), "group 0 of the state has no list of params"),
        (lambda saved: saved["param_groups"][0].update(param_names=3), "group 0 of the state has no list of param_names but 3"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_name(edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    model, optimizer = make()
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same((values(model), optimizer.state_dict()), before)


def test_states_under_other_keys_are_not_left_out() -> None:
    """JSON makes text of numbers, and all parameters would begin anew."""
    _, optimizer = make()
    saved = optimizer.state_dict()
    saved["state"] = {str(key): state for key, state in saved["state"].items()}
    with pytest.raises(ValueError, match=r"entries \['0', .* of parameters that none of its groups names"):
        make()[1].load_state_dict(saved)


def test_parameters_in_another_order_are_told_by_their_names() -> None:
    pair = [(name, nn.Parameter(torch.ones(4))) for name in ("scale", "shift")]
    for _, param in pair:
        param.grad = torch.ones(4)
    optimizer = LearnedOptimizer(pair)
    optimizer.step()
    with pytest.raises(ValueError, match="the parameters in another order: shift, scale stand elsewhere"):
        LearnedOptimizer(pair[::-1]).load_state_dict(optimizer.state_dict())
    LearnedOptimizer([(f"module.{name}", param) for name, param in pair]).load_state_dict(optimizer.state_dict())


def test_state_in_the_memory_of_other_state_is_refused() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = LearnedOptimizer(params)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[params[1]]["lstm"] = optimizer.state[params[0]]["lstm"]
    with pytest.raises(RuntimeError, match="state 'lstm' of parameter 1 of group 0 is in the memory of other state"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pretrained", ["default", "small"])
def test_state_that_a_file_holds_in_another_precision_is_cast_back(pretrained: str, dtype: torch.dtype) -> None:
    model, optimizer = make(pretrained=pretrained)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {k: {key: value.to(dtype) for key, value in state.items()} for k, state in saved["state"].items()}
    other = LearnedOptimizer(model.parameters(), pretrained)
    other.load_state_dict(saved)
    for param, state in other.state.items():
        for key, value in optimizer.state[param].items():
            assert state[key].dtype == value.dtype
            torch.testing.assert_close(state[key].float(), value.to(dtype).float(), rtol=0.01, atol=1e-6)
    if dtype == torch.float64:
        assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_levels_that_a_file_has_rounded_are_refused() -> None:
    """In float8 127 is 128, which int8 takes for -128."""
    _, optimizer = make()
    saved = optimizer.state_dict()
    saved["state"][0]["lstm"] = saved["state"][0]["lstm"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"was kept in torch\.float8_e4m3fn and holds numbers that are no levels"):
        make()[1].load_state_dict(saved)


def test_refusals_name_the_parameter_and_both_sizes() -> None:
    narrow, wide = (nn.Linear(3, size) for size in (4, 5))
    optimizer = LearnedOptimizer(narrow.named_parameters())
    narrow(torch.ones(3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"'moments' of parameter 'weight' has the shape \(2, 4, 3\), and the .* needs \(2, 5, 3\)"):
        LearnedOptimizer(wide.named_parameters()).load_state_dict(optimizer.state_dict())


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "smaller": lambda value: value[:1].clone(),
    "larger": lambda value: torch.cat([value, value]),
    "another dtype": lambda value: value.double(),
    "with gaps": lambda value: value.repeat_interleave(2, -1)[..., ::2],
    "no numbers": lambda value: value.to("meta"),
    "no memory": lambda value: torch._efficientzerotensor(value.shape, dtype=value.dtype),
    "no tensor": lambda value: value.tolist(),
    "sparse": lambda value: value.to_sparse(),
    "of inference mode": inference,
}


@pytest.mark.parametrize("kernel", ["compiled", "reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("key", ["control", "moments", "lstm"])
def test_state_that_was_edited_reaches_no_pointer(kernel: str, edit: str, key: str) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = LearnedOptimizer(params, kernel=kernel)
    for param in params:
        param.grad = torch.ones(4, 3)
    optimizer.step()
    optimizer.state[params[1]][key] = EDITS[edit](optimizer.state[params[1]][key])
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=rf"state '{key}' of parameter 1 of group 0"):
        optimizer.step()
    assert_same([param.detach() for param in params], before)
    del optimizer.state[params[1]]
    optimizer.step()


@pytest.mark.parametrize("edit", ["data", "resized", "freed"])
def test_state_whose_memory_was_swapped_reaches_no_pointer(edit: str) -> None:
    param = nn.Parameter(torch.ones(400, 3))
    optimizer = LearnedOptimizer([param], kernel="compiled")
    param.grad = torch.ones(400, 3)
    optimizer.step()
    moments = optimizer.state[param]["moments"]
    if edit == "data":
        moments.data = torch.ones(3)
    elif edit == "resized":
        moments.resize_(10**6).resize_(2, 3)
    else:
        moments.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="state 'moments' of parameter 0"):
        optimizer.step()


def test_parameter_that_grew() -> None:
    model = nn.Embedding(5, 3)
    optimizer = LearnedOptimizer(model.parameters())
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    model.weight.data = torch.cat([model.weight.data, torch.randn(2000, 3)])
    with pytest.raises(RuntimeError, match="given other memory after its gradient was made"):
        optimizer.step()
    optimizer.zero_grad()
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"has the shape \(2, 5, 3\), and the parameter as it is now needs \(2, 2005, 3\)"):
        optimizer.step()


def test_entries_of_the_user_stay_in_the_state() -> None:
    """From before the first step on, and through a checkpoint."""
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param])
    optimizer.state[param]["seen"] = 3
    param.grad = torch.ones(3)
    optimizer.step()
    other = LearnedOptimizer([nn.Parameter(param.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())
    assert optimizer.state[param]["seen"] == 3
    optimizer.step()


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
    model, optimizer = make()
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="inside this mode tensors are made as FakeTensor"):
        optimizer.step()
    assert_same((values(model), optimizer.state_dict()), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_threads_of_the_compiled_kernel_after_a_fork() -> None:
    """A child has none of its parent's, and would wait for them for ever."""
    assert cpu.pool(1).submit(lambda: 3).result() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forks of processes with threads may hang
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(cpu.pool(1).submit(lambda: 3).result())
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
    model, optimizer = make("compiled")
    before = values(model)
    optimizer.network.half()
    with pytest.raises(RuntimeError, match=r"the weights of LearnedOptimizer.network were moved or cast"):
        optimizer.step()
    assert_same(values(model), before)


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
        model, optimizer = make(kernel, **options)
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


PLACES = [("moments", 0), ("moments", 1), ("lstm", 0), ("lstm", 2), ("lstm", -1), ("control", 0), ("control", 4), ("control", -1)]
IN_INT8 = [("lstm_scale", 0), ("lstm_scale", -1)]


def poisoned(kernel: str, pretrained: str, key: str, place: int, poison: float) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    """Parameters of which something has written to the first one's state."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (5,), (2, 2))]
    optimizer = LearnedOptimizer(params, pretrained, kernel=kernel)
    for k, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=Generator().manual_seed(k))
    optimizer.step()
    optimizer.state[params[0]][key][place].view(-1)[-1] = poison
    return params, optimizer


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 1e30])
@pytest.mark.parametrize(
    ("pretrained", "key", "place"), [*(("default", *place) for place in PLACES), *(("small", *place) for place in IN_INT8)]
)
def test_state_that_was_poisoned_in_place_stays_where_it_is(pretrained: str, key: str, place: int, poison: float) -> None:
    """Its parameter no longer moves, and the others do as if nothing were, by both kernels in the same way."""
    if (key, place, poison) == ("moments", 1, 1e30):
        poison = -1e30  # squares of gradients may be as large
    moved = []
    for kernel in ("compiled", "reference"):
        params, optimizer = poisoned(kernel, pretrained, key, place, poison)
        for step in (1, 2, 3):
            before = [param.detach().clone() for param in params]
            told = pytest.warns(UserWarning, match="the state of parameter 0 of group 0 is not finite: something has written to it")
            with told if step == 1 else contextlib.nullcontext():
                optimizer.step()
            assert params[0].equal(before[0])
            assert all(param.isfinite().all() and param.ne(old).any() for param, old in zip(params[1:], before[1:], strict=True))
            assert optimizer.skipped == step
        moved.append([param.detach() - 1 for param in params])
        with pytest.raises(ValueError, match=r"the state .*of parameter 0 of group 0 holds"):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        del optimizer.state[params[0]]
        optimizer.step()
        assert params[0].ne(before[0]).all()
    assert_near(*moved, 0.05)  # levels of int8 may be rounded otherwise


@pytest.mark.slow
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("pretrained", "key", "place"), [*(("default", *place) for place in PLACES), *(("small", *place) for place in IN_INT8)]
)
def test_state_that_was_poisoned_in_place_on_a_gpu(pretrained: str, key: str, place: int, poison: float) -> None:
    pytest.importorskip("triton")
    params, optimizer = poisoned("triton", pretrained, key, place, poison)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in the interpreter
        for step in (1, 2):
            before = [param.detach().clone() for param in params]
            optimizer.step()
            assert params[0].equal(before[0])
            assert all(param.isfinite().all() and param.ne(old).any() for param, old in zip(params[1:], before[1:], strict=True))
            assert optimizer.skipped == step


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
    model, optimizer = make()
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
    model, optimizer = make(kernel)
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
    model, optimizer = make(lr=lr)
    lr.fill_(torch.nan)
    with pytest.raises(ValueError, match="lr multiplies the learned update"):
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


def test_an_option_that_is_written_into_a_group_later_is_named_once() -> None:
    _, optimizer = make()
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
    whole, parts = ([nn.Parameter(torch.ones(4, 3)) for _ in range(4)] for _ in range(2))
    optimizers = [LearnedOptimizer(whole, kernel=kernel), *(LearnedOptimizer([param], kernel=kernel, matrices=4) for param in parts)]
    for k, pair in enumerate(zip(whole, parts, strict=True)):
        for param in pair:
            param.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
    for optimizer in optimizers:
        optimizer.step()
    assert_near([param.detach() - 1 for param in parts], [param.detach() - 1 for param in whole], 1e-3)


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_stacks_are_matrices_of_their_own(kernel: str) -> None:
    """The first step of a stack is that of its matrices; convolutions stay what they are."""
    grad = torch.randn(5, 4, 3)
    separate, stack, kernels = (
        [nn.Parameter(torch.ones(4, 3)) for _ in range(5)],
        nn.Parameter(torch.ones(5, 4, 3)),
        nn.Parameter(torch.ones(5, 4, 3)),
    )
    for param, part in zip(separate, grad, strict=True):
        param.grad = part
    stack.grad = kernels.grad = grad
    LearnedOptimizer(separate, kernel=kernel).step()
    LearnedOptimizer([{"params": [stack], "stacked": True}], kernel=kernel).step()
    LearnedOptimizer([kernels], kernel=kernel).step()
    joined = torch.stack([param.detach() for param in separate])
    change = (stack.detach() - 1).flatten(1)
    other = (joined - 1).flatten(1)
    assert nn.functional.cosine_similarity(change, other).min() > 0.99
    assert change.norm().item() == pytest.approx(other.norm().item(), rel=0.1)
    assert nn.functional.cosine_similarity((kernels.detach() - 1).flatten(), other.flatten(), dim=0) < 0.99


def test_layout_of_stacks() -> None:
    shapes = torch.Size([5, 4, 3]), torch.Size([2, 5, 4, 1]), torch.Size([4, 3]), torch.Size([5, 4, 3])
    layout = Layout(shapes, torch.device("cpu"), (True, True, True, False), (None, 7, None, None))
    assert layout.fans == [(4, 3), (4, 1), (4, 3), (5, 12)]
    assert layout.stacks == [(5,), (10,), (), ()]
    assert layout.is_matrix == [True, False, True, True]
    assert layout.of_some([2]).matrices == (7,)
    assert layout.of_some([1]).matrices == (7,)
