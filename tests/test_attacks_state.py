"""What a `LearnedOptimizer` is handed by accident as its state: dicts that do not fit, tensors that were edited, numbers that are none.

Either all goes well, and then the compiled kernel does what the rule says; or an error says what is wrong, and nothing has changed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import FINE, KILLS, REFUSED, Attack, inference, kill, state_attacks, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_helpers import assert_same, make_pair, train, values
from test_kernels import assert_near
from torch import Generator, Tensor, nn

from learned_optim import LearnedOptimizer

SEARCH = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

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
    _, optimizer = make_pair()
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(saved, data)
    pairs = [make_pair(kernel, steps=1) for kernel in ("compiled", "reference")]
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
    _, optimizer = make_pair()
    saved = optimizer.state_dict()
    saved["state"][0] = entry
    with pytest.raises(ValueError, match="the state of parameter 'gain' is no dictionary"):
        make_pair()[1].load_state_dict(saved)


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
    model, optimizer = make_pair()
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same((values(model), optimizer.state_dict()), before)


def test_states_under_other_keys_are_not_left_out() -> None:
    """JSON makes text of numbers, and all parameters would begin anew."""
    _, optimizer = make_pair()
    saved = optimizer.state_dict()
    saved["state"] = {str(key): state for key, state in saved["state"].items()}
    with pytest.raises(ValueError, match=r"entries \['0', .* of parameters that none of its groups names"):
        make_pair()[1].load_state_dict(saved)


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
    model, optimizer = make_pair(pretrained=pretrained)
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
    _, optimizer = make_pair()
    saved = optimizer.state_dict()
    saved["state"][0]["lstm"].view(-1)[0] = 127
    saved["state"][0]["lstm"] = saved["state"][0]["lstm"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"was kept in torch\.float8_e4m3fn and holds numbers that are no levels"):
        make_pair()[1].load_state_dict(saved)


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


def edited(kernel: str, edits: Iterable[tuple[str, str]]) -> None:
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = LearnedOptimizer(params, kernel=kernel)
    for param in params:
        param.grad = torch.ones(4, 3)
    optimizer.step()
    before, state = [param.detach().clone() for param in params], optimizer.state[params[1]]
    for key, edit in edits:
        kept, state[key] = state[key], EDITS[edit](state[key])
        with pytest.raises(RuntimeError, match=rf"state '{key}' of parameter 1 of group 0"):
            optimizer.step()
        assert_same([param.detach() for param in params], before)
        state[key] = kept
    del optimizer.state[params[1]]
    optimizer.step()


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("key", ["control", "moments", "lstm"])
def test_state_that_was_edited_reaches_no_pointer(kernel: str, edit: str, key: str) -> None:
    edited(kernel, [(key, edit)])


def test_state_that_was_edited_reaches_no_pointer_on_a_gpu() -> None:
    """One edit after the other: steps that are not refused take the interpreter a second."""
    pytest.importorskip("triton")
    edited("triton", itertools.product(["control", "moments", "lstm"], EDITS))


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


# Numbers that are none


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
@pytest.mark.filterwarnings("ignore")  # in the interpreter
@pytest.mark.parametrize(("pretrained", "places"), [("default", PLACES), ("small", IN_INT8)])
def test_state_that_was_poisoned_in_place_on_a_gpu(pretrained: str, places: list[tuple[str, int]]) -> None:
    """Each parameter but the last in another way, since each takes the interpreter a part of a second."""
    pytest.importorskip("triton")
    poisons = [(key, place, poison) for key, place in places for poison in (torch.nan, torch.inf)]
    params = [*(nn.Parameter(torch.ones(2, 3)) for _ in poisons), nn.Parameter(torch.ones(5))]
    optimizer = LearnedOptimizer(params, pretrained, kernel="triton")
    for k, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=Generator().manual_seed(k))
    optimizer.step()
    for param, (key, place, poison) in zip(params[:-1], poisons, strict=True):
        optimizer.state[param][key][place].view(-1)[-1] = poison
    for step in (1, 2):
        before = [param.detach().clone() for param in params]
        optimizer.step()
        for param, old, how in zip(params[:-1], before[:-1], poisons, strict=True):
            assert param.equal(old), how
        assert params[-1].isfinite().all()
        assert params[-1].ne(before[-1]).any()
        assert optimizer.skipped == step * len(poisons)
