"""What the arguments of the commands have in common: their types, which refuse a mistake before anything long begins."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def folder(text: str) -> Path:
    """The path of a folder that is there, or can be made."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, or one that can be made, and {there} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written to, and {there} cannot")
    return path


def device(text: str) -> str:
    """The name of a device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if found.type == "cuda" and (count := torch.cuda.device_count()) <= (found.index or 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, and PyTorch sees {count or 'no'} such devices here; leave it out for cpu")
    return text


def repository(text: str) -> str:
    """The name of a repository that the Hub would take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text.count("/") != 1:
        raise argparse.ArgumentTypeError(f"must be USER/NAME, got {text!r}")
    return text
