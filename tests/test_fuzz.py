"""Whatever stands in a file, it is read as it should be or refused by name; fuzz.py does the same with as many damages as one likes."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import pytest
from fuzz import Target, fuzz, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learned_optim import NetworkConfig
from learned_optim.config import from_json, to_json
from learned_optim.meta_train import MetaTrainConfig

CALM = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, database=None
)
KINDS = ["`model.safetensors`", "`config.json`", "`meta_train.json`", "`checkpoint.pt`"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_every_kind_of_file_is_fuzzed(files: dict[str, Target]) -> None:
    assert list(files) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_by_name_or_read(files: dict[str, Target], kind: str) -> None:
    found, slowest = fuzz(files[kind], 60, seed=1)
    assert found["refused"] > 20
    assert slowest < 5


# Configurations

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
classes = st.sampled_from([NetworkConfig, MetaTrainConfig])


@CALM
@given(data=st.data(), cls=classes)
def test_any_values_make_a_configuration_that_survives_a_round_trip_or_are_refused(data: st.DataObject, cls: type[Any]) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    wrong = data.draw(st.dictionaries(st.sampled_from([*names, "format_version"]) | st.text(max_size=5), values, max_size=3))
    text = json.dumps({"format_version": 1, **wrong})
    try:
        config = from_json(cls, text, "some/config.json")
    except ValueError as error:
        message = str(error)
    else:
        assert from_json(cls, to_json(config), "again") == config
        return
    assert message.startswith("some/config.json")


@CALM
@given(
    config=st.builds(
        NetworkConfig,
        hidden_units=st.integers(1, 1024),
        momentum=st.floats(0, 1, exclude_max=True),
        second_moment=st.floats(0, 1, exclude_max=True),
        orthogonalize_steps=st.integers(0, 100),
        moment_format=st.sampled_from(["float32", "bfloat16"]),
        lstm_format=st.sampled_from(["float32", "bfloat16", "int8"]),
    )
)
def test_a_network_configuration_survives_a_round_trip(config: NetworkConfig) -> None:
    assert from_json(NetworkConfig, to_json(config), "config.json") == config


@CALM
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
@pytest.mark.parametrize("kind", KINDS)
def test_any_content_is_refused_by_name(files: dict[str, Target], kind: str, content: bytes) -> None:
    whole = files[kind].file.read_bytes()
    try:
        assert files[kind].try_with(content) == "refused"
    finally:
        files[kind].file.write_bytes(whole)


# Weights

entries = st.fixed_dictionaries({}, optional={"dtype": values, "shape": values | st.lists(st.integers()), "data_offsets": values})


@CALM
@given(data=st.data())
def test_weights_with_any_header_are_refused_by_name_or_finite(files: dict[str, Target], data: st.DataObject) -> None:
    target = files["`model.safetensors`"]
    whole = target.file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(header)) | st.text(max_size=5), entries | values, max_size=3))
    for name, entry in changed.items():
        both = isinstance(entry, dict) and isinstance(header.get(name), dict)
        header[name] = {**header[name], **entry} if both else entry
    text = json.dumps(header).encode()
    try:
        target.try_with(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    finally:
        target.file.write_bytes(whole)


@CALM
@given(data=st.data())
def test_weights_with_any_numbers_are_refused_by_name_or_finite(files: dict[str, Target], data: st.DataObject) -> None:
    target: Target = files["`model.safetensors`"]
    whole = target.file.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    numbers = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=20))
    place = begin + 4 * data.draw(st.integers(0, (len(whole) - begin) // 4 - len(numbers)))
    content = whole[:place] + struct.pack(f"<{len(numbers)}f", *numbers) + whole[place + 4 * len(numbers) :]
    finite = all(abs(number) < float("inf") for number in numbers)
    try:
        assert target.try_with(content) == ("read" if finite else "refused")
    finally:
        target.file.write_bytes(whole)
