"""Configurations as frozen dataclasses that turn into JSON and back.

A file names its `format_version`. A file of a newer format, with an unknown key or with a value of the wrong type is refused with an error
that names the file, so that weights are never run by a rule that they were not trained for.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar, get_origin, get_type_hints

FORMAT_VERSION = 1
FORMATS = ("float32", "bfloat16", "int8")  # of stored state

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
    orthogonalize_steps: int = 5
    moment_format: str = "float32"
    lstm_format: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.hidden_units < 1:
            raise ValueError(f"hidden_units must be at least 1, got {self.hidden_units}")
        for name in ("momentum", "second_moment"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.orthogonalize_steps < 0:
            raise ValueError(f"orthogonalize_steps must not be negative, got {self.orthogonalize_steps}")
        for name, formats in (("moment_format", FORMATS[:2]), ("lstm_format", FORMATS)):
            if getattr(self, name) not in formats:
                raise ValueError(f"{name} must be one of {list(formats)}, got {getattr(self, name)!r}")


def to_json(config: Any) -> str:
    """The configuration as sorted, indented JSON that carries `format_version`."""
    return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=2, sort_keys=True) + "\n"


def from_json(cls: type[Config], text: str, source: str) -> Config:
    """Reads what `to_json` wrote.

    Args:
        cls: the dataclass to build; keys that are missing take its defaults.
        source: the file's name, for error messages.

    Raises:
        ValueError: the text is no JSON object, has a newer format, an unknown key, or a value of the wrong type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
    version = values.pop("format_version", None)
    if not isinstance(version, int):
        raise ValueError(f"{source} has no format_version, so it was not written by learned_optim")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{source} has format_version {version}; this learned_optim reads up to {FORMAT_VERSION}. "
            "Upgrade with: pip install -U learned-optim"
        )
    return _build(cls, values, source)


def _build(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    types = get_type_hints(cls)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"{source} has unknown keys {unknown}; {cls.__name__} knows {sorted(types)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind = types[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = _build(kind, value, f"{source}, {name}")
        elif kind is float and type(value) is int:
            value = float(value)
        elif get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)
        elif type(value) is not (plain := get_origin(kind) or kind):
            raise ValueError(f"{source}: {name} must be {plain.__name__}, got {value!r}")
        arguments[name] = value
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
