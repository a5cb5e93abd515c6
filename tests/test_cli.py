"""The `learned-optim` command, but for what `demo` does (see test_demo.py)."""

import json
import re
import sys

import pytest
import torch

import learned_optim as package
from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork
from learned_optim.cli import COMMANDS, main
from learned_optim.config import from_file
from learned_optim.meta_train import MetaTrainConfig
from learned_optim.weights import bundled_names, bundled_recipe, fingerprint


def test_list_prints_the_bundled_names(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == bundled_names()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"learned-optim {package.__version__}\n"


@pytest.mark.parametrize("name", bundled_names())
def test_info_as_json_tells_how_large_the_state_is(name, capsys):
    assert main(["info", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = LearnedOptimizer([param], name)
    param.sum().backward()
    optimizer.step()
    state = [value for key, value in optimizer.state[param].items() if key != "control"]
    assert facts["state_bytes"] == round(sum(value.nbytes for value in state) / param.numel(), 2)
    assert facts["hidden_units"] == 2
    assert main(["list", "--json"]) == 0
    assert name in json.loads(capsys.readouterr().out)


def test_info_describes_a_folder(tmp_path, capsys):
    network = OptimizerNetwork(NetworkConfig(hidden_units=3, momentum=0.8))
    network.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    facts = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert facts["hidden_units"] == "3"
    assert facts["momentum"] == "0.8"
    assert facts["parameters"] == str(sum(param.numel() for param in network.parameters()))
    assert facts["fingerprint"] == fingerprint(network)


@pytest.mark.parametrize("command", [["info"], ["inspect"], ["evaluate"], ["demo", "--pretrained"]])
@pytest.mark.parametrize("damage", ["missing", "invalid"])
def test_bad_weights_are_one_line_and_status_2(command, damage, tmp_path, capsys):
    if damage == "invalid":
        OptimizerNetwork(NetworkConfig()).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text("{")
    assert main([*command, str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("learned-optim: ")
    assert captured.err.count("\n") == 1
    assert "config.json" in captured.err


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_demo_without_its_extra_names_the_fix(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"learned-optim: the demo needs {module}; install it with: pip install matplotlib scikit-learn\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["no-such-command"], "no-such-command"),
        (["info"], "NAME_OR_FOLDER_OR_HUB_ID"),
        (["demo", "--seeds", "0"], "must be at least 1, got 0"),
        (["demo", "--workers", "two"], "'two'"),
        (["compare", "file.py:problem", "--device", "gpu"], "must be cpu or cuda, got 'gpu'"),
        (["compare", "file.py:problem", "--device", "cuda:99"], "PyTorch sees "),
        (["meta-train", "--config", "default", "--out", "out", "--device", "mps"], "must be cpu or cuda, got 'mps'"),
        (["meta-train", "--config", "default", "--out", "out", "--threads", "0"], "must be at least 1, got 0"),
        (["meta-train", "--config", "default", "--out", "out", "--push", "mine"], "must be USER/NAME, got 'mine'"),
        (["demo", "--out", __file__], "argument --out: must be a folder, or one that can be made, and "),
        (["compare", "file.py:problem", "--out", f"{__file__}/out"], "test_cli.py is a file"),
        (["meta-train", "--config", "default", "--out", __file__], "argument --out: must be a folder"),
        (["evaluate"], "NAME_OR_FOLDER_OR_HUB_ID"),
        (["evaluate", "default", "--steps", "0"], "must be at least 1, got 0"),
        (["evaluate", "default", "--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        (["inspect"], "FILE_OR_WEIGHTS"),
        (["push", "out", "user/na--me"], "na--me"),
    ],
)
def test_wrong_usage_is_status_2_before_anything_begins(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "usage: learned-optim" in error
    assert message in error


def test_meta_train_knows_the_configurations_of_bundled_weights(monkeypatch, tmp_path, capsys):
    def stopped(families, config, **_):
        seen.append(config)
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr("learned_optim.meta_train.__main__.meta_train", stopped)
    monkeypatch.setattr("learned_optim.meta_train.process.settle", lambda: None)
    threads = torch.get_num_threads()
    arguments = ["meta-train", "--config", "default", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert torch.get_num_threads() == threads == 1
    assert seen == [from_file(MetaTrainConfig, bundled_recipe("default")[0])]
    assert f"Go on with: learned-optim {' '.join(arguments)}\n" in capsys.readouterr().err
    arguments[2] = "small"
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: --config: there is no file small; and bundled weights that have configurations are ['default']\n"
    )


def test_meta_train_takes_a_configuration_that_was_written_by_hand(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("learned_optim.meta_train.process.settle", lambda: None)
    config = {"families": ["convex"], "meta_steps": 1, "horizon_min": 3, "horizon_max": 3, "truncation": 3, "replicas": 1}
    (tmp_path / "my.json").write_text(json.dumps(config))
    assert main(["meta-train", "--config", str(tmp_path / "my.json"), "--start", "default", "--out", str(tmp_path / "mine")]) == 0
    assert f"LearnedOptimizer(model.parameters(), '{tmp_path}/mine')" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "mine")]) == 0


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"families": ["no_such"]}, "there are no families ['no_such']"),
        ({"families": ["convex"], "unrolls_per_step": 9}, "unrolls_per_step is 9, but only 3 unrolls are kept going"),
        ({"optimizer": "torch.optim.Addam"}, "cannot make the meta-optimizer 'torch.optim.Addam'"),
        ({"estimators": {"": "frozen"}}, "leave nothing to train"),
        ({"held": {"coordinate.out": 1.0}}, "held is for frozen scalars of the network, which 'coordinate.out' is not"),
    ],
)
def test_meta_train_looks_at_the_last_stage_before_the_first(later, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("learned_optim.meta_train.process.settle", lambda: None)
    (tmp_path / "later.json").write_text(json.dumps(later))
    assert main(["meta-train", "--config", "default", str(tmp_path / "later.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_meta_train_asks_for_a_login_before_it_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("learned_optim.meta_train.process.settle", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["meta-train", "--config", "default", "--out", str(tmp_path / "out"), "--push", "user/mine"]) == 2
    assert capsys.readouterr().err.startswith("error: --push needs a login at the Hugging Face Hub")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert COMMANDS[command].summary.split()[0] in out
    assert command == "list" or f"learned-optim {command} " in out.partition("examples:")[2]


def test_push_and_info_of_what_was_pushed(hub, online, tmp_path):
    networks = [OptimizerNetwork(NetworkConfig(hidden_units=units)) for units in (2, 3)]
    folder = tmp_path / "set"
    commits = []
    for network in networks:
        network.save_pretrained(folder)
        done = online.run("push", str(folder), "user/command", "--private", "--message", "Mine")
        assert done.returncode == 0, done.stderr
        commits.append(re.search(r'LearnedOptimizer\(params, "user/command", revision="(\w+)"\)', done.stdout)[1])
    assert hub.repositories["user/command"].private
    assert hub.repositories["user/command"].refs["main"] == commits[1]
    assert {"config.json", "model.safetensors", "README.md"} <= hub.repositories["user/command"].commits[commits[0]].keys()
    for network, commit in zip(networks, commits, strict=True):
        done = online.run("info", "user/command", "--revision", commit)
        assert fingerprint(network) in done.stdout, done.stderr


def test_push_refuses_what_is_no_folder_of_weights_and_tells_what_the_hub_refused(online, tmp_path, capsys):
    assert main(["push", str(tmp_path), "user/command"]) == 2
    assert capsys.readouterr().err.startswith(f"learned-optim: {tmp_path} has no config.json")
    OptimizerNetwork(NetworkConfig()).save_pretrained(tmp_path / "set")
    done = online.run("push", str(tmp_path / "set"), "user/gated")
    assert done.returncode == 2
    assert done.stderr.startswith("learned-optim: ")
    assert "gated" in done.stderr
    assert "Traceback" not in done.stderr


def test_meta_train_says_how_to_publish_what_the_hub_refused(hub, online, tmp_path):
    config = {"families": ["convex"], "meta_steps": 1, "horizon_min": 3, "horizon_max": 3, "truncation": 3, "replicas": 1}
    (tmp_path / "my.json").write_text(json.dumps(config))
    arguments = ["meta-train", "--config", str(tmp_path / "my.json"), "--out", str(tmp_path / "out"), "--push"]
    done = online.run(*arguments, "user/gated")
    assert done.returncode == 2
    assert f"The weights are in {tmp_path}/out." in done.stdout
    (told,) = re.findall(r"error: the weights were not published: .*gated.* Try again with: (.*)", done.stderr)
    assert told == f"learned-optim push {tmp_path}/out user/gated"
    done = online.run(*arguments, "user/trained")  # the run is finished, so it only publishes
    assert done.returncode == 0, done.stderr
    assert "meta_train.json" in hub.repositories["user/trained"].commits[hub.repositories["user/trained"].refs["main"]]


def test_what_is_to_be_private_does_not_go_to_a_public_repository(hub, online, tmp_path):
    OptimizerNetwork(NetworkConfig()).save_pretrained(tmp_path / "set")
    done = online.run("push", str(tmp_path / "set"), "user/public")
    assert done.returncode == 0, done.stderr
    commits = dict(hub.repositories["user/public"].commits)
    done = online.run("push", str(tmp_path / "set"), "user/public", "--private")
    assert hub.repositories["user/public"].commits == commits
    assert done.returncode == 2
    assert done.stderr.startswith("learned-optim: user/public exists and is public, so nothing was uploaded")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "place", "advice"),
    [
        (["list"], "learned_optim.cli.bundled_names", ""),
        (["demo"], "learned_optim.demo.run", ". Nothing is saved. Start again with: learned-optim demo --out {out}"),
    ],
)
def test_ctrl_c_is_one_line(arguments, place, advice, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(place, interrupt)
    if advice:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"learned-optim: stopped by Ctrl-C{advice.format(out=tmp_path)}\n"
