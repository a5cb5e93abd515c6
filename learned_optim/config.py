"""Configurations as frozen dataclasses that turn into JSON and back.

A file names its `format_version`. A file of a newer format, with an unknown key or with a value of the wrong type or out of its range is
refused with an error that names the file, so that weights are never run by a rule that they were not trained for, and no file costs more
time or memory than a real one would.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1
FORMATS = ("float32", "bfloat16", "int8")  # of stored state
MAX_BYTES = 2**20  # of a file with a configuration; real ones have some thousand
BELOW_ONE = math.nextafter(1.0, 0.0)

Ranges = Mapping[str, tuple[float, float]]  # least and greatest value of each number
RANGES: Ranges = {"hidden_units": (1, 1024), "momentum": (0, BELOW_ONE), "second_moment": (0, BELOW_ONE), "orthogonalize_steps": (0, 100)}

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Shape of the optimizer network and the constants of the update rule that it was meta-trained with.

    Args:
        hidden_units: hidden units `H` of the coordinate-wise LSTM. Each weight of the optimizee keeps `2 H` numbers of LSTM state.
        momentum: decay per step of the gradient's running mean, in [0, 1).
        second_moment: decay per step of the squared gradient's running mean, in [0, 1).
        orthogonalize_steps: Newton-Schulz iterations for matrices; 0 leaves matrices to the RMS normalisation that vectors get.
        moment_format, lstm_format: what the optimizer keeps of the two running means and of the LSTM's state between steps, see
            `learned_optim.storage`: "float32", "bfloat16" or, of the LSTM's state, "int8". Meta-training computes in fp32 throughout.
    """

    hidden_units: int = 2
    momentum: float = 0.9
    second_moment: float = 0.99
    orthogonalize_steps: int = 3
    moment_format: str = "float32"
    lstm_format: str = "bfloat16"

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name, formats in (("moment_format", FORMATS[:2]), ("lstm_format", FORMATS)):
            if getattr(self, name) not in formats:
                raise ValueError(f"{name} must be one of {list(formats)}, got {getattr(self, name)!r}")


def check_ranges(config: Any, ranges: Ranges) -> None:
    """Raises: ValueError: a field lies outside its range, or is NaN."""
    for name, (least, greatest) in ranges.items():
        if not least <= getattr(config, name) <= greatest:
            upper = "1)" if greatest == BELOW_ONE else f"{greatest:,}]"
            raise ValueError(f"{name} must lie in [{least:,}, {upper}, got {reprlib.repr(getattr(config, name))}")


def to_json(config: Any) -> str:
    """The configuration as sorted, indented JSON that carries `format_version`."""
    return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=2, sort_keys=True) + "\n"


def from_file(cls: type[Config], path: str | os.PathLike[str], *, by_hand: bool = False) -> Config:
    """Reads a configuration from a file.

    Args:
        by_hand: see `from_json`.

    Raises:
        ValueError: see `from_json`; or the file is no text, or much too long.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{os.fspath(path)} has more than {MAX_BYTES} bytes, so it is no configuration of learned_optim")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {error}") from None
    return from_json(cls, text, os.fspath(path), by_hand=by_hand)


def from_json(cls: type[Config], text: str, source: str, *, by_hand: bool = False) -> Config:
    """Reads what `to_json` wrote.

    Args:
        cls: the dataclass to build; keys that are missing take its defaults.
        source: the file's name, for error messages.
        by_hand: a text that somebody wrote need not name its format, which is then the present one.

    Raises:
        ValueError: the text is no JSON object, has another format, a key that is unknown or stands there twice, or a value of the wrong
            type or out of its range.
    """
    values = parse_object(text, source)
    version = values.pop("format_version", FORMAT_VERSION if by_hand else None)
    if type(version) is not int or version < 1:
        raise ValueError(f"{source} has no format_version from 1 to {FORMAT_VERSION}, so it was not written by learned_optim")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{source} has format_version {reprlib.repr(version)}; this learned_optim reads up to {FORMAT_VERSION}. "
            "Install a newer learned_optim."
        )
    return _build(cls, values, source)


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: it is no JSON, or too deep; it is no object; or a key stands in an object twice, which readers take in different ways.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"the key {reprlib.repr(name)} stands there twice")
            values[name] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=once)
    except ValueError as error:  # also of integers of thousands of digits
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is not valid JSON: it is nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
    return values


def _build(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    types = get_type_hints(cls)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"{source} has unknown keys {reprlib.repr(unknown)}; {cls.__name__} knows {sorted(types)}")
    arguments = {name: _value(types[name], value, source, name) for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _value(kind: Any, value: Any, source: str, name: str) -> Any:
    """A value of JSON as a field's type wants it."""
    plain, inner = get_origin(kind) or kind, get_args(kind)
    if dataclasses.is_dataclass(plain) and isinstance(value, dict):
        return _build(kind, value, f"{source}, {name}")
    if plain is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if plain is tuple and isinstance(value, list):
        return tuple(_value(inner[0], item, source, f"an item of {name}") for item in value)
    if plain is not Any and type(value) is not plain:
        raise ValueError(f"{source}: {name} must be {plain.__name__}, got {reprlib.repr(value)}")
    if plain is dict:
        return {key: _value(inner[1], item, source, f"{name}[{key!r}]") for key, item in value.items()}
    return value
