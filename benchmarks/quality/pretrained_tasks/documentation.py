"""Docstrings of packages, which the packages' own licences cover (all of them BSD), and Python's own manual."""

from __future__ import annotations

import functools
import importlib
import inspect
import random
from collections.abc import Iterable, Sequence
from typing import Any

MODULES = {
    "numpy": ("", ".linalg", ".random", ".fft", ".ma", ".strings", ".polynomial"),
    "scipy": (".stats", ".signal", ".optimize", ".sparse", ".linalg", ".special", ".ndimage", ".interpolate", ".spatial"),
    "sklearn": (".linear_model", ".ensemble", ".metrics", ".preprocessing", ".cluster", ".decomposition", ".model_selection", ".svm"),
    "matplotlib": (".axes", ".pyplot", ".patches", ".colors", ".figure"),
    "sympy": ("",),
    "networkx": ("",),
}


@functools.cache
def documentation(package: str) -> list[str]:
    """The docstrings of a package's public functions and classes, in a fixed random order."""
    texts = list(dict.fromkeys(text for module in MODULES[package] for text in docstrings(package + module)))
    random.Random(0).shuffle(texts)
    return texts


def docstrings(module: str) -> list[str]:
    """Those of a module's public functions and classes, by name."""
    members = vars(importlib.import_module(module))
    found = [inspect.getdoc(members[name]) for name in sorted(members) if callable(members[name]) and not name.startswith("_")]
    return [text for text in found if text and len(text) > 200]


def fifths(texts: Sequence[Any], validation: bool) -> list[Any]:
    return [text for index, text in enumerate(texts) if (index % 5 == 0) == validation]


def manual_topics() -> Iterable[str]:
    """The reference manual that comes with Python."""
    from pydoc_data.topics import topics

    return topics.values()


def pieces(texts: Iterable[str]) -> list[str]:
    """Paragraphs, in a fixed random order."""
    pieces = list(dict.fromkeys(piece for text in texts for piece in text.split("\n\n") if len(piece) > 150))
    random.Random(0).shuffle(pieces)
    return pieces
