"""Damages files that the package reads, at random, and sees what happens.

A damaged file must be refused by a ValueError or an OSError that names it, or be read; weights are finite then, and a checkpoint is never
read unless it is whole. tests/test_fuzz.py runs a few of each, and attacks.py as many as one likes.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from meta_train_helpers import tiny_config, tiny_task

from learned_optim import OptimizerNetwork, load_network
from learned_optim.config import from_file, to_json
from learned_optim.meta_train import MetaTrainConfig, checkpoint, meta_train

# What a value of JSON may be replaced by.
ODD = [b"1e999", b"-1e999", b"NaN", b"-1", b"0", b"1.5", b"1e-320", b"true", b"null", b'""', b'"x"', b"[]", b"{}", b"1" + b"0" * 400]
ODD += [b"1" + b"0" * 5000, b"9223372036854775808", b"1000000000", b"[" * 50_000, b'{"a":' * 50_000, b'"\\ud800"', b'1,"hidden_units":2']


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after one to three damages."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        content = damaged_once(content, chance)
    return content


def damaged_once(content: bytes, chance: random.Random) -> bytes:
    begin, other = chance.randrange(len(content) + 1), chance.randrange(len(content) + 1)
    end = min(len(content), begin + chance.choice([1, 1, 4, 8, 64, 1000]))
    before, piece, after = content[:begin], content[begin:end], content[end:]
    flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in piece[:1])
    return chance.choice(
        [
            before + flipped + content[begin + 1 :],
            before + chance.randbytes(len(piece)) + after,
            before + chance.choice([b"\x00", b"\x7f", b"\xff"]) * len(piece) + after,
            before + after,
            before + piece + piece + after,
            content[:other] + piece + content[other:],
            before,
            odd_value(content, chance),
        ]
    )


def odd_value(content: bytes, chance: random.Random) -> bytes:
    """The content with something odd after one of its colons."""
    colons = [place for place, byte in enumerate(content[:4000]) if byte == ord(":")]
    begin = chance.choice(colons or [0]) + 1
    length = next((length for length, byte in enumerate(content[begin:]) if byte in b",}\n"), 0)
    return content[:begin] + chance.choice(ODD) + content[begin + length :]


@dataclass(frozen=True)
class Target:
    """A file to damage.

    Args:
        read: reads it; raises AssertionError where it should not have been read.
    """

    file: Path
    read: Callable[[], object]

    def try_with(self, content: bytes) -> str:
        """What became of the file with this content: "read" or "refused"."""
        self.file.write_bytes(content)
        try:
            self.read()
        except (ValueError, OSError) as error:
            message = str(error)
        else:
            return "read"
        assert str(self.file) in message, f"does not name its file: {message}"
        return "refused"


def targets(folder: Path) -> dict[str, Target]:
    torch.manual_seed(0)
    network, config = OptimizerNetwork(tiny_config().network), tiny_config(meta_steps=2)
    for name in ("config", "weights"):
        network.save_pretrained(folder / name)
    (folder / "meta_train.json").write_text(to_json(MetaTrainConfig(held={"controller.log_rate": -30.0})))
    meta_train({"tiny": tiny_task}, config, folder=folder / "run")
    whole = (folder / "run" / checkpoint.CHECKPOINT).read_bytes()

    def read_weights(path: Path) -> None:
        loaded = load_network(path)
        assert all(weight.isfinite().all() for weight in loaded.parameters()), "weights are not finite"

    def read_checkpoint() -> None:
        checkpoint.load(folder / "run", config, "cpu")
        assert (folder / "run" / checkpoint.CHECKPOINT).read_bytes() == whole, "a damaged checkpoint was read"

    return {
        "`model.safetensors`": Target(folder / "weights/model.safetensors", lambda: read_weights(folder / "weights")),
        "`config.json`": Target(folder / "config/config.json", lambda: read_weights(folder / "config")),
        "`meta_train.json`": Target(folder / "meta_train.json", lambda: from_file(MetaTrainConfig, folder / "meta_train.json")),
        "`checkpoint.pt`": Target(folder / "run" / checkpoint.CHECKPOINT, read_checkpoint),
    }


def fuzz(target: Target, count: int, seed: int) -> tuple[Counter[str], float]:
    """How often the damaged file was read and refused, and the longest time that it took, in seconds."""
    whole, chance, found, slowest = target.file.read_bytes(), random.Random(seed), Counter[str](), 0.0
    assert target.try_with(whole) == "read"
    for _ in range(count):
        content = damaged(whole, chance)
        began = time.perf_counter()
        found[target.try_with(content)] += 1
        slowest = max(slowest, time.perf_counter() - began)
    target.file.write_bytes(whole)
    return found, slowest
