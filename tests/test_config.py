"""Configurations: JSON and back, and every way in which a file can be wrong."""

import dataclasses
import json

import pytest

from learned_optim.config import FORMAT_VERSION, MAX_BYTES, NetworkConfig, from_file, from_json, to_json
from learned_optim.meta_train import MetaTrainConfig

VALUES = {"hidden_units": 3, "momentum": 0.5, "second_moment": 0.75, "orthogonalize_steps": 2}
VALUES |= {"moment_format": "bfloat16", "lstm_format": "int8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "outer"
    network: NetworkConfig


def test_round_trip():
    config = NetworkConfig(**VALUES)
    assert from_json(NetworkConfig, to_json(config), "config.json") == config


def test_round_trip_of_a_nested_config():
    config = Outer(name="x", network=NetworkConfig(**VALUES))
    assert from_json(Outer, to_json(config), "config.json") == config


def test_json_is_sorted_and_names_its_format():
    text = to_json(NetworkConfig(**VALUES))
    assert json.loads(text) == {"format_version": FORMAT_VERSION, **VALUES}
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_missing_keys_take_defaults():
    assert from_json(NetworkConfig, '{"format_version": 1, "momentum": 0.5}', "config.json") == NetworkConfig(momentum=0.5)


def test_an_integer_serves_as_a_float():
    momentum = from_json(NetworkConfig, '{"format_version": 1, "momentum": 0}', "config.json").momentum
    assert momentum == 0.0
    assert isinstance(momentum, float)


def test_a_configuration_that_was_written_by_hand_need_not_name_its_format():
    assert from_json(NetworkConfig, '{"momentum": 0.5}', "my.json", by_hand=True) == NetworkConfig(momentum=0.5)
    with pytest.raises(ValueError, match="format_version 2"):
        from_json(NetworkConfig, '{"format_version": 2}', "my.json", by_hand=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"format_version": 1', "not valid JSON"),
        ("[1]", "JSON object, got list"),
        ("{}", "no format_version"),
        ('{"format_version": "1"}', "no format_version"),
        ('{"format_version": 2}', r"format_version 2; this learned_optim reads up to 1.*Install a newer learned_optim"),
        ('{"format_version": 1, "hiden_units": 4}', r"unknown keys \['hiden_units'\].*'hidden_units'"),
        ('{"format_version": 1, "hidden_units": 4.0}', r"hidden_units must be int, got 4\.0"),
        ('{"format_version": 1, "hidden_units": true}', "hidden_units must be int, got True"),
        ('{"format_version": 1, "hidden_units": null}', "hidden_units must be int, got None"),
        ('{"format_version": 1, "momentum": "0.9"}', "momentum must be float, got '0.9'"),
        ('{"format_version": 1, "hidden_units": 0}', r"hidden_units must lie in \[1, 1,024\], got 0"),
        ('{"format_version": 1, "hidden_units": 1000000000}', r"hidden_units must lie in \[1, 1,024\], got 1000000000"),
        ('{"format_version": 1, "momentum": 1.0}', r"momentum must lie in \[0, 1\), got 1\.0"),
        ('{"format_version": 1, "second_moment": NaN}', r"second_moment must lie in \[0, 1\), got nan"),
        ('{"format_version": 1, "second_moment": 1e999}', r"second_moment must lie in \[0, 1\), got inf"),
        ('{"format_version": 1, "momentum": -1e-9}', r"momentum must lie in \[0, 1\), got -1e-09"),
        ('{"format_version": 1, "orthogonalize_steps": -1}', r"orthogonalize_steps must lie in \[0, 100\], got -1"),
        ('{"format_version": 1, "orthogonalize_steps": 1000000000}', r"orthogonalize_steps must lie in \[0, 100\]"),
        ('{"format_version": true}', "no format_version from 1"),
        ('{"format_version": 1.0}', "no format_version from 1"),
        ('{"format_version": 0}', "no format_version from 1"),
        ('{"format_version": -1}', "no format_version from 1"),
        ('{"format_version": null}', "no format_version from 1"),
        pytest.param(f'{{"format_version": 1{"0" * 400}}}', "has format_version 1000.*reads up to", id="format 10**400"),
        ('{"format_version": 1, "momentum": 0.5, "momentum": 0.9}', "the key 'momentum' stands there twice"),
        ('{"format_version": 2, "format_version": 1}', "the key 'format_version' stands there twice"),
        pytest.param('{"a":' * 100_000, "nested too deep", id="deep objects"),
        pytest.param("[" * 100_000, "nested too deep", id="deep lists"),
        pytest.param(f'{{"format_version": 1, "momentum": 1{"0" * 400}}}', "momentum must be float, got 1000", id="float 10**400"),
        pytest.param(f'{{"format_version": 1, "hidden_units": 1{"0" * 400}}}', "hidden_units must lie in", id="int 10**400"),
        pytest.param(f'{{"format_version": 1, "hidden_units": 1{"0" * 9999}}}', "not valid JSON", id="int 10**9999"),
    ],
)
def test_a_bad_file_is_refused_by_name(text, reason):
    with pytest.raises(ValueError, match=rf"^some/config\.json.*{reason}"):
        from_json(NetworkConfig, text, "some/config.json")


def test_a_bad_nested_value_names_its_place():
    with pytest.raises(ValueError, match=r"^config\.json, network.*unknown keys \['width'\]"):
        from_json(Outer, '{"format_version": 1, "network": {"width": 1}}', "config.json")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"families": [1]}, "an item of families must be str, got 1"),
        ({"estimators": {"": []}}, r"estimators\[''\] must be str, got \[\]"),
        ({"held": {"log_step_size": "1"}}, r"held\['log_step_size'\] must be float, got '1'"),
        ({"held": {"log_step_size": 1e999}}, r"held\['log_step_size'\] must lie in"),
        ({"network": {"hidden_units": 10**9}}, "network: hidden_units must lie in"),
        ({"network": 3}, "network must be NetworkConfig, got 3"),
        ({"optimizer_options": [1]}, r"optimizer_options must be dict, got \[1\]"),
    ],
)
def test_what_lists_and_dicts_hold_is_checked_too(values, reason):
    with pytest.raises(ValueError, match=rf"^config\.json.*{reason}"):
        from_json(MetaTrainConfig, json.dumps({"format_version": 1, **values}), "config.json")


NUMBERS = {
    cls: [field.name for field in dataclasses.fields(cls) if field.type in ("int", "float")] for cls in (NetworkConfig, MetaTrainConfig)
}


@pytest.mark.parametrize("value", [10**9 + 10**18 * 10, -(10**10), float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in NUMBERS.items() for name in names])
def test_no_number_is_without_bounds(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must lie in \["):
        cls(**{name: value})


def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path):
    file = tmp_path / "mine.json"
    for content, reason in ((b"\xff\xfe\x00", "not valid JSON"), (b" " * (MAX_BYTES + 1), "has more than 1048576 bytes")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            from_file(NetworkConfig, file)
        assert str(file) in str(caught.value)
    for missing in (tmp_path, tmp_path / "nope"):
        with pytest.raises(OSError, match=str(missing)):
            from_file(NetworkConfig, missing)
