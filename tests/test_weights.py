"""Optimizer networks to and from disk and the Hub, and every way in which that can fail.

The Hub tests run the real huggingface_hub client, in processes of its own since it reads its settings at import, against `hub_server`.
"""

import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.weights import bundled_names, fingerprint, save_network

CONFIG = NetworkConfig(hidden_units=3, momentum=0.8)


def network(seed: int = 1, config: NetworkConfig = CONFIG) -> OptimizerNetwork:
    torch.manual_seed(seed)
    return OptimizerNetwork(config)


def assert_same(a: OptimizerNetwork, b: OptimizerNetwork) -> None:
    assert a.config == b.config
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def folder(tmp_path):
    network().save_pretrained(tmp_path / "set")
    return tmp_path / "set"


# Local files


def test_round_trip(folder):
    loaded = load_network(folder)
    assert_same(loaded, network())
    assert_same(OptimizerNetwork.from_pretrained(str(folder)), loaded)
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in loaded.parameters())


def test_saved_files(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    header = (folder / "model.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    save_network(load_network(folder), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_replaces_an_earlier_set(folder):
    other = network(2, NetworkConfig(hidden_units=2))
    save_network(other, folder)
    assert_same(load_network(folder), other)


def test_an_interrupted_save_leaves_the_earlier_set(folder, monkeypatch):
    write = Path.write_bytes

    def fail_on_weights(path, content):
        if path.name == "model.safetensors":
            write(path, content[:100])
            raise OSError("disk full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_on_weights)
    with pytest.raises(OSError, match="disk full"):
        save_network(network(2, NetworkConfig(momentum=0.5)), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_network(folder), network())


def test_a_network_of_another_dtype_is_saved_in_fp32(tmp_path):
    save_network(network().bfloat16(), tmp_path)
    assert_same(load_network(tmp_path), network().bfloat16().float())


def test_saving_refuses_nan(tmp_path):
    broken = network()
    with torch.no_grad():
        broken.coordinate.out[0] = torch.nan
    with pytest.raises(ValueError, match=r"the network has NaN or infinite weights in \['coordinate\.out'\]"):
        broken.save_pretrained(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_loading_leaves_random_numbers_alone(folder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_network(folder)
    assert torch.equal(torch.rand(3), expected)


def test_later_writes_do_not_reach_a_loaded_network(folder):
    loaded = load_network(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert_same(loaded, network())


# Which source a name means


def test_every_bundled_set_loads():
    assert "default" in bundled_names()
    for name in bundled_names():
        load_network(name)


def test_a_bundled_name_comes_before_a_folder_and_a_path_object_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(network(), "default")
    assert fingerprint(load_network("default")) != fingerprint(network())
    for source in ("./default", Path("default"), tmp_path / "default"):
        assert_same(load_network(source), network())


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(network(), "user/name")
    assert_same(load_network("user/name"), network())


@pytest.mark.parametrize("source", ["nope", "runs/1/nope", "./nope", "/nope", "nope/", "a/na--me", "", Path("nope"), Path("user/name")])
def test_no_such_source(source):
    with pytest.raises(FileNotFoundError, match=r"is no bundled set \(there are \[.*'default'.*\), no local folder and no Hub id"):
        load_network(source)


def test_a_file_is_no_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for source in (folder / "model.safetensors", "set/model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors' is a file; pass the folder"):
            load_network(source)


def test_revision_applies_only_to_the_hub(folder):
    with pytest.raises(ValueError, match=r"only to the Hub, and 'default' is a bundled set; leave revision='v1' out"):
        load_network("default", revision="v1")
    with pytest.raises(ValueError, match=r"only to the Hub, and '.*set' is a local folder; leave revision='main' out"):
        LearnedOptimizer([torch.nn.Parameter(torch.ones(2))], folder, revision="main")


# Damage


def edit_config(**changes):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(keep):
    def damage(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(keep * len(content))])

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def unknown_dtype(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"F32"', b'"XYZ"'))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"set has no config\.json; save_pretrained writes"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        FileNotFoundError,
        r"set has no model\.safetensors; save_pretrained writes",
    ),
    "config is no JSON": (write("config.json", b"{"), ValueError, r"config\.json is not valid JSON"),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), ValueError, r"config\.json is not valid JSON"),
    "newer format": (edit_config(format_version=2), ValueError, r"config\.json has format_version 2; .* reads up to 1\. Upgrade"),
    "unknown key": (edit_config(depth=2), ValueError, r"config\.json has unknown keys \['depth'\]"),
    "truncated": (truncate(0.5), ValueError, r"model\.safetensors is damaged, or no safetensors file .*; fetch or save it again"),
    "truncated header": (truncate(0.02), ValueError, r"model\.safetensors is damaged"),
    "empty": (truncate(0), ValueError, r"model\.safetensors is damaged"),
    "garbage": (write("model.safetensors", random.Random(0).randbytes(5000)), ValueError, r"model\.safetensors is damaged"),
    "pickle": (write("model.safetensors", pickle.dumps(Bomb())), ValueError, r"model\.safetensors is damaged"),
    "unknown dtype": (unknown_dtype, ValueError, r"model\.safetensors is damaged"),
    "other shapes": (
        edit_config(hidden_units=4),
        ValueError,
        r"model\.safetensors does not fit the network that its config\.json describes: .*coordinate\.out has shape \(3,\), not \(4,\)",
    ),
    "absurd config": (edit_config(hidden_units=10**7), ValueError, r"coordinate\.out has shape \(3,\), not \(10000000,\)"),
    "missing and unexpected": (
        edit_weights(lambda tensors: tensors.update({"coordinate.ouput": tensors.pop("coordinate.out")})),
        ValueError,
        r"describes: missing \['coordinate\.out'\]; unexpected \['coordinate\.ouput'\]",
    ),
    "other dtype": (
        edit_weights(lambda tensors: tensors.update({"coordinate.out": tensors["coordinate.out"].bfloat16()})),
        ValueError,
        r"coordinate\.out has dtype torch\.bfloat16, not torch\.float32",
    ),
    "NaN": (edit_weights(lambda tensors: tensors["coordinate.out"].fill_(torch.nan)), ValueError, r"NaN or infinite weights in \['coord"),
    "infinity": (edit_weights(lambda tensors: tensors["coordinate.skip"].fill_(torch.inf)), ValueError, r"infinite weights in \['coord"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(case, folder):
    damage, error, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(error, match=re.escape(str(folder)) + "|" + message) as caught:
        load_network(folder)
    assert str(folder) in str(caught.value)
    assert re.search(message, str(caught.value))


# Fingerprints


@dataclass
class StubConfig:
    units: int = 2


class Stub:
    config = StubConfig()

    def state_dict(self):
        return {"b": torch.tensor([[0.5, -1.0, 3.0]]), "a": torch.tensor(2.0)}


def test_fingerprint_is_stable():
    # The optimizer's checkpoints keep it: should its definition change, they no longer load.
    assert fingerprint(Stub()) == "sha256:715eb5d35166b8ea"


def test_fingerprint_sees_config_names_shapes_and_values():
    seen = {fingerprint(network()), fingerprint(network(2)), fingerprint(network(1, NetworkConfig(hidden_units=3)))}
    for name in network().state_dict():
        changed = network()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.01
        seen.add(fingerprint(changed))
    assert len(seen) == 3 + len(network().state_dict())


def test_fingerprint_survives_a_round_trip(folder):
    assert fingerprint(load_network(folder)) == fingerprint(network())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fingerprint_and_files_do_not_depend_on_the_device(folder, tmp_path):
    on_gpu = network().cuda()
    assert fingerprint(on_gpu) == fingerprint(network())
    save_network(on_gpu, tmp_path / "gpu")
    assert (tmp_path / "gpu" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# The Hub

CLIENT = """
import json, sys, time
if "no-wait" in sys.argv:
    time.sleep = lambda seconds: None  # between retries
import torch
from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.weights import fingerprint

def network(seed):
    torch.manual_seed(seed)
    return OptimizerNetwork(NetworkConfig(hidden_units=3, momentum=0.8))

def broken():
    result = network(1)
    torch.nn.init.constant_(result.coordinate.out, float("nan"))
    return result

def load(*args, **kwargs):
    return fingerprint(load_network(*args, **kwargs))

for line in sys.stdin:
    try:
        answer = {"value": eval(line)}
    except Exception as error:
        answer = {"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error), "cause": type(error.__cause__).__name__}
    print(json.dumps(answer), flush=True)
"""


class HubError(Exception):
    def __init__(self, answer):
        super().__init__(f"{answer['kinds'][0]}: {answer['message']} (from {answer['cause']})")
        self.kinds, self.cause = answer["kinds"], answer["cause"]


class Client:
    """A Python process with its own huggingface_hub settings; calling it evaluates an expression there."""

    def __init__(self, home, endpoint, *args, **settings):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
        env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"OMP_NUM_THREADS": "1", **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *args], env=env, cwd=home, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "value" not in answer:
            raise HubError(answer)
        return answer["value"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def clients(hub, home):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    clients = {
        "online": Client(home, hub.url),
        "offline": Client(home, hub.url, HF_HUB_OFFLINE="1"),
        "dead": Client(home, dead, "no-wait"),
    }
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture
def online(clients):
    return clients["online"]


def push(client, repo, seed, **options):
    return client(f"network({seed}).push_to_hub({repo!r}, **{options!r})")


def test_push_and_load(hub, online):
    commit = push(online, "user/first", 1)
    repository = hub.repositories["user/first"]
    assert repository.refs["main"] == commit
    assert len(repository.commits) == 2, "one commit for all files, after the one that makes the repository"
    files = repository.commits[commit]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: learned-optim\n")
    assert 'LearnedOptimizer(model.parameters(), "user/first")' in card
    assert online("load('user/first')") == fingerprint(network(1))
    assert online("fingerprint(OptimizerNetwork.from_pretrained('user/first', 'main'))") == fingerprint(network(1))


def test_a_new_repository_takes_the_users_name_visibility_and_token(hub, online):
    start = len(hub.requests)
    push(online, "mine", 1, private=True, token="hf_secret")
    assert hub.repositories["user/mine"].private is True
    assert b'"user/mine"' in hub.repositories["user/mine"].commits[hub.repositories["user/mine"].refs["main"]]["README.md"]
    assert {token for _, path, token in hub.requests[start:] if not path.startswith("/lfs/")} == {"Bearer hf_secret"}


def test_pushing_again(hub, online):
    first = push(online, "user/again", 1)
    repository = hub.repositories["user/again"]
    card = repository.commit({"README.md": b"my own card"})
    assert push(online, "user/again", 1) == card, "nothing changed, so there is no commit"
    second = push(online, "user/again", 2)
    assert second not in (first, card)
    assert repository.commits[second]["README.md"] == b"my own card"
    assert online("load('user/again')") == fingerprint(network(2))


def test_pinned_revisions(hub, online):
    first = push(online, "user/pinned", 1)
    hub.repositories["user/pinned"].refs["v1"] = first
    second = push(online, "user/pinned", 2)
    assert online("load('user/pinned')") == fingerprint(network(2))
    for revision in (first, "v1"):
        assert online(f"load('user/pinned', revision={revision!r})") == fingerprint(network(1))
    optimizer = f"LearnedOptimizer([torch.nn.Parameter(torch.ones(2))], 'user/pinned', revision={first!r})"
    assert online(f"{optimizer}.param_groups[0]['weights']") == fingerprint(network(1))
    start = len(hub.requests)
    online(f"load('user/pinned', revision={second!r})")
    assert hub.requests[start:] == [], "a cached commit needs no request"


def test_config_and_weights_come_from_one_commit(hub, online):
    commit = push(online, "user/moving", 1)
    start = len(hub.requests)
    online("load('user/moving')")
    asked = {path for _, path, _ in hub.requests[start:]}
    assert asked == {"/user/moving/resolve/main/config.json", f"/user/moving/resolve/{commit}/model.safetensors"}


def test_the_cache_serves_without_the_hub(hub, clients):
    first = push(clients["online"], "user/cached", 1)
    hub.repositories["user/cached"].refs["v1"] = first
    clients["online"]("load('user/cached')")
    clients["online"]("load('user/cached', revision='v1')")
    start = len(hub.requests)
    for client in ("offline", "dead"):
        for revision in (None, "v1", first):
            assert clients[client](f"load('user/cached', revision={revision!r})") == fingerprint(network(1))
    assert hub.requests[start:] == []


def test_a_cached_config_never_pairs_with_the_weights_of_another_commit(hub, clients):
    push(clients["online"], "user/half", 1)
    clients["online"]("load('user/half')")
    hub.repositories["user/half"].commit({"config.json": b'{"format_version": 1, "momentum": 0.1}'})
    del hub.repositories["user/half"].commits[hub.repositories["user/half"].refs["main"]]["model.safetensors"]
    with pytest.raises(HubError, match=r"FileNotFoundError: model\.safetensors of Hub repository 'user/half' at 'main' does not exist"):
        clients["online"]("load('user/half')")
    with pytest.raises(HubError, match=r"FileNotFoundError: model\.safetensors of Hub repository 'user/half' at 'main' is not cached"):
        clients["offline"]("load('user/half')")


@pytest.mark.parametrize(
    ("client", "source", "revision", "message", "cause"),
    [
        ("online", "user/nope", None, "FileNotFoundError: 'user/nope' is no bundled set .*Check the spelling.*hf auth login", "Repos"),
        ("online", "user/errors", "v9", r"FileNotFoundError: config\.json of .*'user/errors' at 'v9' .*no such branch, tag or", "Revision"),
        ("online", "user/errors", "0" * 40, "FileNotFoundError: .*'user/errors' at '0{40}' .*no such branch, tag or commit", "Revision"),
        ("online", "user/gated", None, "PermissionError: .*'user/gated' .*is gated: ask for access .*hf auth login", "GatedRepo"),
        ("online", "user/empty", None, r"FileNotFoundError: config\.json of .*'user/empty' at 'main' does not exist; push", "RemoteEntry"),
        ("online", "user/newer", None, r"ValueError: .*config\.json has format_version 99; .*Upgrade", "NoneType"),
        ("online", "user/na--me", None, "FileNotFoundError: 'user/na--me' is no bundled set", "NoneType"),
        ("offline", "user/nope", None, r"FileNotFoundError: config\.json .*'user/nope' .*not cached, .*offline.*default", "LocalEntry"),
        ("offline", "user/errors", "v8", r"FileNotFoundError: config\.json .*'user/errors' at 'v8' is not cached", "LocalEntry"),
        ("dead", "user/nope", None, "FileNotFoundError: .*'user/nope' .*not cached, and the Hub was not reached: .*refused", "LocalEntry"),
    ],
)
def test_errors_of_the_hub(hub, clients, client, source, revision, message, cause):
    if "user/errors" not in hub.repositories:
        push(clients["online"], "user/errors", 1)
        for name in ("gated", "empty", "newer"):
            clients["online"](f"__import__('huggingface_hub').create_repo('user/{name}').repo_id")
        files = dict(hub.repositories["user/errors"].commits[hub.repositories["user/errors"].refs["main"]])
        hub.repositories["user/newer"].commit({**files, "config.json": b'{"format_version": 99}'})
    with pytest.raises(HubError, match="^" + message) as caught:
        clients[client](f"load({source!r}, revision={revision!r})")
    assert caught.value.cause.startswith(cause)


def test_pushing_refuses_nan_before_it_makes_a_repository(hub, online):
    with pytest.raises(HubError, match="ValueError: the network has NaN or infinite weights"):
        online("broken().push_to_hub('user/broken')")
    assert "user/broken" not in hub.repositories


def test_bundled_sets_need_neither_the_hub_nor_its_client(clients):
    for client in (clients["offline"], clients["dead"]):
        assert client("load('default')") == fingerprint(load_network("default"))
