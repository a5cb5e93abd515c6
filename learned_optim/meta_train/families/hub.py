"""A family made of a data set on the Hugging Face Hub, by name; needs the optional package `datasets`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from ..tasks import Family, ModuleTask, Task
from .sampling import VALIDATION, choose
from .text import Block, TextModel, token_loss, windows

LIMIT = 1_000_000  # characters that are read


def hub_text(name: str, *, column: str = "text", split: str = "train", **options: Any) -> Family:
    """Next-character prediction, by small transformers, in a data set's column of text.

    Args:
        name: of the data set, as `datasets.load_dataset` takes it; `options` go there too.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("a family of the Hub's data needs the package `datasets`: pip install datasets") from None
    rows = load_dataset(name, split=split, **options)
    if column not in rows.column_names:
        raise ValueError(f"the data set {name} has no column {column!r}; it has {rows.column_names}")
    text, length = bytearray(), 0
    for row in rows:
        text += row[column].encode("ascii", "replace")
        if (length := len(text)) > LIMIT:
            break
    codes = torch.frombuffer(text[: min(length, LIMIT)], dtype=torch.uint8).long()
    codes = (codes[(codes >= 32) & (codes < 128)] - 32).clone()
    return lambda generator: text_task(codes, generator)


def text_task(text: Tensor, generator: Generator) -> Task:
    width, length, size = choose(generator, (16, 24, 32)), choose(generator, (12, 16)), choose(generator, (8, 16))
    border = len(text) - len(text) // VALIDATION
    return ModuleTask(
        lambda: TextModel(width, [Block(width, 4)], length, tied=False),
        windows(text[:border], length, size),
        token_loss,
        windows(text[border:], length, size),
    )
