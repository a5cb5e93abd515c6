"""The `learned-optim` command, but for what `demo` does (see test_demo.py)."""

import os
import subprocess
import sys

import pytest
from hub_server import HubServer

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.cli import COMMANDS, main
from learned_optim.weights import bundled_names, fingerprint


def test_list_prints_the_bundled_names(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == bundled_names()


def test_info_describes_a_folder(tmp_path, capsys):
    network = OptimizerNetwork(NetworkConfig(hidden_units=3, momentum=0.8))
    network.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    facts = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert facts["hidden_units"] == "3"
    assert facts["momentum"] == "0.8"
    assert facts["parameters"] == str(sum(param.numel() for param in network.parameters()))
    assert facts["fingerprint"] == fingerprint(network)


@pytest.mark.parametrize("command", [["info"], ["demo", "--pretrained"]])
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


def test_push_publishes_a_folder_that_loads_again(tmp_path):
    """By the real client, in a process of its own: it reads HF_ENDPOINT when it is imported."""
    network = OptimizerNetwork(NetworkConfig(hidden_units=3))
    network.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/README.md").write_text("# Mine\n")
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(tmp_path / "hf"),
        }

        def command(*arguments):
            call = [sys.executable, "-c", "import sys; from learned_optim.cli import main; sys.exit(main())", *arguments]
            return subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        pushed = command("push", "mine", "user/mine")
        assert pushed.returncode == 0, pushed.stderr
        repository = hub.repositories["user/mine"]
        commit = repository.refs["main"]
        assert f'revision="{commit}"' in pushed.stdout
        assert repository.commits[commit]["README.md"] == b"# Mine\n"
        assert fingerprint(network) in command("info", "user/mine").stdout
        missing = command("push", "nowhere", "user/mine")
        assert missing.returncode == 2
        assert missing.stderr.startswith("learned-optim: nowhere is not a folder")


@pytest.mark.parametrize("module", ["matplotlib", "sklearn", "tqdm"])
def test_demo_without_its_extra_names_the_fix(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f'learned-optim: the demo needs {module}; install it with: pip install "learned-optim[demo]"\n'


def test_demo_refuses_a_file_as_its_folder_before_it_trains(tmp_path, capsys):
    OptimizerNetwork(NetworkConfig()).save_pretrained(tmp_path)
    assert main(["demo", "--pretrained", str(tmp_path), "--out", str(tmp_path / "config.json")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["info"], ["demo", "--seeds", "0"], ["demo", "--workers", "two"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: learned-optim" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command].summary.split()[0] in capsys.readouterr().out
