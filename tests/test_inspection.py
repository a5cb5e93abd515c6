"""`learned-optim inspect`: what it tells of an optimizer's state is true, and what keeps a model from learning is named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.cli import main
from learned_optim.rule import Control
from learned_optim.weights import fingerprint


def trained(steps: int = 12, *, change: Callable[[int, dict[str, Tensor]], None] | None = None, **options: Any) -> LearnedOptimizer:
    """An optimizer that has begun to train a small model.

    Args:
        change: of the gradients, by name, before a step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = LearnedOptimizer(list(model.named_parameters()), **options)
    inputs = torch.randn(64, 4)
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        if change is not None:
            change(step, {name: param.grad for name, param in model.named_parameters() if param.grad is not None})
        optimizer.step()
    return optimizer


def inspected(content: Any, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    torch.save(content, folder / "state.pt")
    assert main(["inspect", str(folder / "state.pt"), "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def test_figures_are_those_of_the_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = trained(total_steps=50, weight_decay=0.1)
    (found,) = inspected(optimizer.state_dict(), tmp_path, capsys)
    assert found["weights"] == fingerprint(optimizer.network)
    assert found["known_as"] == "default"
    (group,) = found["groups"]
    assert (group["lr"], group["weight_decay"], group["total_steps"], group["without_state"]) == (1.0, 0.1, 50, [])
    assert [tensor["name"] for tensor in group["tensors"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for tensor, param in zip(group["tensors"], optimizer.param_groups[0]["params"], strict=True):
        state = optimizer.state[param]
        control = Control.of(state["control"])
        assert tensor["shape"] == list(param.shape)
        assert tensor["steps"] == 12
        assert tensor["nbytes"] == sum(value.nbytes for value in state.values())
        assert tensor["factor"] == pytest.approx(control.correction.exp().item(), rel=1e-5)
        assert tensor["trend"] == pytest.approx(control.trend.item(), rel=1e-5)
        gradient = state["moments"][1].mean() / (1 - optimizer.network.config.second_moment**12)
        assert tensor["gradient_rms"] == pytest.approx(gradient.sqrt().item(), rel=1e-4)
        assert tensor["momentum_rms"] == pytest.approx(state["moments"][0].square().mean().sqrt().item(), rel=1e-4)
        climbed = min(0.0, (optimizer.network.controller.log_start + control.climbed).item())
        assert tensor["warm_up"] == pytest.approx(math.exp(climbed), rel=1e-5)


def edit(state_dict: dict[str, Any], key: str, value: float, indices: Sequence[int]) -> dict[str, Any]:
    for index in indices:
        state_dict["state"][index]["control"][Control._fields.index(key)] = value
    return state_dict


def zero_in_first(_: int, grads: dict[str, Tensor]) -> None:
    grads["0.bias"].zero_()


def late_in_first(step: int, grads: dict[str, Tensor]) -> None:
    if step < 6:
        grads["0.bias"].zero_()


def noise(_: int, grads: dict[str, Tensor]) -> None:
    for grad in grads.values():
        grad.normal_()


def broken() -> dict[str, Any]:
    state_dict = trained().state_dict()
    state_dict["state"][1]["moments"][0, 2] = math.nan
    return state_dict


def without_gradient() -> dict[str, Any]:
    optimizer = trained()
    optimizer.add_param_group({"params": [("unused", nn.Parameter(torch.zeros(3)))]})
    return optimizer.state_dict()


CASES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing": (lambda: edit(trained().state_dict(), "climbed", 5.0, range(4)), "^Nothing stands out"),
    "a learning rate": (lambda: trained(lr=0.01).state_dict(), r"lr=0\.01\. It multiplies the update"),
    "an end": (lambda: trained(total_steps=8).state_dict(), r"total_steps=8, which 0\.weight, 0\.bias, 2\.weight and 1 more went through"),
    "no gradient": (without_gradient, "There is no state of unused: no gradient came there so far"),
    "zero gradients": (lambda: trained(change=zero_in_first).state_dict(), r"All gradients of 0\.bias were zero so far"),
    "left out": (lambda: trained(change=late_in_first).state_dict(), r"There were 12 steps, and fewer of 0\.bias:"),
    "short steps": (lambda: edit(trained().state_dict(), "correction", -3.0, [2]), r"Steps of 2\.weight are the shortest"),
    "long steps": (lambda: edit(trained().state_dict(), "correction", 3.0, range(4)), "Steps of all 4 tensors are the longest"),
    "a warm-up": (lambda: trained(change=noise).state_dict(), r"The warm-up of all 4 tensors goes on: steps have 0\.0"),
    "NaN": (broken, r"The state of 0\.bias is not finite"),
}


@pytest.mark.filterwarnings("ignore:lr=0.01 multiplies")
@pytest.mark.parametrize("case", CASES)
def test_what_stands_out_is_named_and_nothing_else(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, finding = CASES[case]
    (found,) = inspected(make(), tmp_path, capsys)
    matching = [text for text in found["findings"] if re.search(finding, text)]
    assert len(matching) == 1, found["findings"]
    others = {re.sub(r"\W.*", "", text) for text in found["findings"] if text not in matching}
    assert others <= {"The"}, found["findings"]  # the warm-up of so short a run
    assert main(["inspect", str(tmp_path / "state.pt")]) == 0
    assert re.search(finding.removeprefix("^").partition(r"\.")[0], " ".join(capsys.readouterr().out.split()))


def test_states_are_found_within_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adamw = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    content = {"epoch": 3, "optimizers": [trained(2).state_dict(), adamw.state_dict()], "more": {"generator": trained(3).state_dict()}}
    found = inspected(content, tmp_path, capsys)
    assert [state["place"] for state in found] == ["['optimizers'][0]: ", "['more']['generator']: "]
    assert [state["groups"][0]["tensors"][0]["steps"] for state in found] == [2, 3]


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin"])
def test_a_trainers_checkpoint_folder_is_known(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained(2).state_dict(), tmp_path / name)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "4 tensors of 49 weights" in capsys.readouterr().out


def test_weights_of_ones_own_are_told_from_the_bundled_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = OptimizerNetwork(NetworkConfig())
    network.save_pretrained(tmp_path / "mine")
    state_dict = trained(2, pretrained=network).state_dict()
    (found,) = inspected(state_dict, tmp_path, capsys)
    assert found["known_as"] is None
    assert found["groups"][0]["tensors"][0]["warm_up"] is None
    (found,) = inspected(state_dict, tmp_path, capsys, "--pretrained", str(tmp_path / "mine"))
    assert found["known_as"] == str(tmp_path / "mine")
    assert found["groups"][0]["tensors"][0]["warm_up"] > 0
    assert main(["inspect", str(tmp_path / "state.pt"), "--pretrained", "default"]) == 2
    assert f"was made with optimizer weights {fingerprint(network)}, and those of default are " in capsys.readouterr().err


def test_many_tensors_are_cut_unless_all_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(25)]
    optimizer = LearnedOptimizer(params)
    torch.stack(params).square().sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    for arguments, rows, more in (([], 20, True), (["--all"], 25, False)):
        assert main(["inspect", str(tmp_path / "state.pt"), *arguments]) == 0
        out = capsys.readouterr().out
        assert len(re.findall(r"^parameter \d+ +2 ", out, re.MULTILINE)) == rows
        assert ("and 5 more; --all shows them" in out) is more


def shorter_control() -> dict[str, Any]:
    state_dict = trained(1).state_dict()
    state_dict["state"][0]["control"] = state_dict["state"][0]["control"][:-1]
    return state_dict


def three_moments() -> dict[str, Any]:
    state_dict = trained(1).state_dict()
    moments = state_dict["state"][0]["moments"]
    state_dict["state"][0]["moments"] = torch.cat([moments, moments[:1]])
    return state_dict


def without_options() -> dict[str, Any]:
    state_dict = trained(1).state_dict()
    del state_dict["param_groups"][0]["total_steps"]
    return state_dict


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
            "has the state of another optimizer, and none of a LearnedOptimizer",
        ),
        (
            {"model": nn.Linear(2, 2).state_dict(), "epoch": 1},
            "has no optimizer's state, and none of a LearnedOptimizer; it holds model, epoch",
        ),
        (torch.ones(3), "it holds a Tensor"),
        (nn.Linear(2, 2), "holds other things than tensors, numbers and text"),
        (b"no file of torch.save", "was not written by torch.save"),
        (shorter_control, "holds a state that does not fit this learned_optim: the state 'control' of 0.weight has the shape"),
        (three_moments, "holds a state that does not fit this learned_optim: the state 'moments' of 0.weight has the shape"),
        (without_options, "holds a state that does not fit this learned_optim: 'total_steps'"),
    ],
)
def test_what_is_no_state_is_one_line(content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(content, bytes):
        (tmp_path / "state.pt").write_bytes(content)
    else:
        torch.save(content if isinstance(content, nn.Module) or not callable(content) else content(), tmp_path / "state.pt")
    assert main(["inspect", str(tmp_path / "state.pt")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"learned-optim: {tmp_path / 'state.pt'} ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_weights_are_shown_beside_the_default_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = OptimizerNetwork(NetworkConfig(hidden_units=3))
    with torch.no_grad():
        network.log_step_size.fill_(math.log(0.25))
        network.coordinate.out.copy_(torch.tensor([3.0, 0.0, -4.0]))
    network.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    default = load_network("default")
    assert re.search(r"\(\) +-1\.386 \(e\^ 0\.25\) +-2\.\d+ \(e\^ 0\.0", lines["log_step_size"])
    theirs = f"rms {default.coordinate.out.square().mean().sqrt():.3f}, max {default.coordinate.out.abs().max():.3f}"
    assert re.search(rf"3 +rms 2\.887, max 4\.000 +{re.escape(theirs)}", lines["coordinate.out"])
    assert fingerprint(network) in out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["coordinate.out"] == [3.0, 0.0, -4.0]
    assert found["tensors"].keys() == network.state_dict().keys()
