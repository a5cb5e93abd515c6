"""Optimizer networks to and from disk, and every way in which that can fail."""

import json
import os
import pickle
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.weights import bundled_names, fingerprint

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
    load_network(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_replaces_an_earlier_set(folder):
    other = network(2, NetworkConfig(hidden_units=2))
    other.save_pretrained(folder)
    assert_same(load_network(folder), other)


def test_an_interrupted_save_leaves_the_earlier_set(folder, monkeypatch):
    write = Path.write_bytes

    def fail_on_weights(path, content):
        if path.name == "model.safetensors":
            write(path, content[:100])
            raise OSError("disk full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_on_weights)
    with pytest.raises(OSError, match=re.escape(f"could not be written to {folder}: disk full")):
        network(2, NetworkConfig(momentum=0.5)).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_network(folder), network())


def test_what_killed_saves_left_goes_when_it_is_old(folder):
    old, young = (folder / f".saving-{name}" for name in ("old", "young"))
    for scratch in (old, young):
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    load_network(folder).save_pretrained(folder)
    assert not old.exists()
    assert young.exists(), "another process may be at work"


def test_a_network_of_another_dtype_is_saved_in_fp32(tmp_path):
    network().bfloat16().save_pretrained(tmp_path)
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
    network().save_pretrained("default")
    assert fingerprint(load_network("default")) != fingerprint(network())
    for source in ("./default", Path("default"), tmp_path / "default"):
        assert_same(load_network(source), network())


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network().save_pretrained("user/name")
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


def header(content):
    return write("model.safetensors", len(content).to_bytes(8, "little") + content)


def huge(folder):
    """A tensor of 4 TB, by what the header says; the file is sparse, so that it has that size and takes no space."""
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    header(json.dumps({"coordinate.out": entry}).encode())(folder)
    os.truncate(folder / "model.safetensors", 4 * 10**12 + 8 + len(json.dumps({"coordinate.out": entry})))


def left_over(folder):
    os.truncate(folder / "model.safetensors", 10**9)


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
    "newer format": (edit_config(format_version=2), ValueError, r"config\.json has format_version 2; .* reads up to 1\. Install a newer"),
    "unknown key": (edit_config(depth=2), ValueError, r"config\.json has unknown keys \['depth'\]"),
    "truncated": (truncate(0.5), ValueError, r"model\.safetensors is damaged, or no safetensors file .*; fetch or save it again"),
    "truncated header": (truncate(0.02), ValueError, r"model\.safetensors is damaged"),
    "empty": (truncate(0), ValueError, r"model\.safetensors is damaged"),
    "garbage": (write("model.safetensors", random.Random(0).randbytes(5000)), ValueError, r"model\.safetensors is damaged"),
    "pickle": (write("model.safetensors", pickle.dumps(Bomb())), ValueError, r"model\.safetensors is damaged"),
    "unknown dtype": (unknown_dtype, ValueError, r"coordinate\.out has dtype 'XYZ', not 'F32'"),
    "other shapes": (
        edit_config(hidden_units=4),
        ValueError,
        r"model\.safetensors does not fit the network that its config\.json describes: .*coordinate\.out has shape \[3\], not \[4\]",
    ),
    "absurd config": (edit_config(hidden_units=10**9), ValueError, r"config\.json: hidden_units must lie in \[1, 1,024\]"),
    "deep config": (write("config.json", b"[" * 100_000), ValueError, r"config\.json is not valid JSON: it is nested too deep"),
    "long config": (write("config.json", b" " * 2**21), ValueError, r"config\.json has more than 1048576 bytes"),
    "deep header": (header(b'{"a":' * 20_000), ValueError, r"model\.safetensors is damaged.*nested too deep"),
    "long header": (header(b" " * 200_000), ValueError, r"model\.safetensors is damaged.*its header would have 200000 of"),
    "header twice": (header(b'{"a":{},"a":{}}'), ValueError, r"model\.safetensors is damaged.*the key 'a' stands there twice"),
    "header of numbers": (header(b'{"coordinate.out":3}'), ValueError, r"coordinate\.out has shape None, not \[3\]"),
    "huge tensor": (huge, ValueError, r"coordinate\.out has shape \[1000000000000\], not \[3\]"),
    "data left over": (left_over, ValueError, r"model\.safetensors is damaged.*it has 1\d{9} bytes, not \d{3,4}\)"),
    "missing and unexpected": (
        edit_weights(lambda tensors: tensors.update({"coordinate.ouput": tensors.pop("coordinate.out")})),
        ValueError,
        r"describes: missing \['coordinate\.out'\]; unexpected \['coordinate\.ouput'\]",
    ),
    "other dtype": (
        edit_weights(lambda tensors: tensors.update({"coordinate.out": tensors["coordinate.out"].bfloat16()})),
        ValueError,
        r"coordinate\.out has dtype 'BF16', not 'F32'",
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
    on_gpu.save_pretrained(tmp_path / "gpu")
    assert (tmp_path / "gpu" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
