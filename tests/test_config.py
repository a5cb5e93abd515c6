"""Configurations: JSON and back, and every way in which a file can be wrong."""

import dataclasses
import json

import pytest

from learned_optim.config import FORMAT_VERSION, NetworkConfig, from_json, to_json

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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"format_version": 1', "not valid JSON"),
        ("[1]", "JSON object, got list"),
        ("{}", "no format_version"),
        ('{"format_version": "1"}', "no format_version"),
        ('{"format_version": 2}', r"format_version 2; this learned_optim reads up to 1.*pip install -U learned-optim"),
        ('{"format_version": 1, "hiden_units": 4}', r"unknown keys \['hiden_units'\].*'hidden_units'"),
        ('{"format_version": 1, "hidden_units": 4.0}', r"hidden_units must be int, got 4\.0"),
        ('{"format_version": 1, "hidden_units": true}', "hidden_units must be int, got True"),
        ('{"format_version": 1, "hidden_units": null}', "hidden_units must be int, got None"),
        ('{"format_version": 1, "momentum": "0.9"}', "momentum must be float, got '0.9'"),
        ('{"format_version": 1, "hidden_units": 0}', "at least 1"),
        ('{"format_version": 1, "momentum": 1.0}', r"momentum must lie in \[0, 1\), got 1\.0"),
        ('{"format_version": 1, "second_moment": NaN}', r"second_moment must lie in \[0, 1\), got nan"),
        ('{"format_version": 1, "orthogonalize_steps": -1}', "must not be negative, got -1"),
    ],
)
def test_a_bad_file_is_refused_by_name(text, reason):
    with pytest.raises(ValueError, match=rf"^some/config\.json.*{reason}"):
        from_json(NetworkConfig, text, "some/config.json")


def test_a_bad_nested_value_names_its_place():
    with pytest.raises(ValueError, match=r"^config\.json, network.*unknown keys \['width'\]"):
        from_json(Outer, '{"format_version": 1, "network": {"width": 1}}', "config.json")
