"""The families of tasks that come along. Each samples an architecture and data for it: synthetic, Python's own source text, or what
scikit-learn ships. Nothing is downloaded, `hub_text` excepted."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ..tasks import Family
from .dense import convex, ill_conditioned, mlp, regression
from .drawn import drawn_task
from .fine_tuning import fine_tuning
from .hub import hub_text
from .images import autoencoder, cnn, vision_transformer
from .real import NEEDS_SKLEARN, digits, tabular
from .text import recurrent, transformer

FAMILIES: dict[str, Family] = {
    "mlp": mlp,
    "regression": regression,
    "convex": convex,
    "ill_conditioned": ill_conditioned,
    "cnn": cnn,
    "vision_transformer": vision_transformer,
    "autoencoder": autoencoder,
    "transformer": transformer,
    "recurrent": recurrent,
    "fine_tuning": fine_tuning,
    "drawn": drawn_task,
    "tabular": tabular,
    "digits": digits,
}

__all__ = ["FAMILIES", "chosen", "hub_text"]


def chosen(names: Sequence[str]) -> dict[str, Family]:
    """The families of these names, of those above; none means all.

    Raises:
        ValueError: there is none of that name.
        ImportError: scikit-learn is not installed, and one of them reads its data.
    """
    if unknown := sorted(set(names) - FAMILIES.keys()):
        raise ValueError(f"there are no families {unknown}; those that come along are {list(FAMILIES)}")
    found = {name: FAMILIES[name] for name in names or FAMILIES}
    if importlib.util.find_spec("sklearn") is None and {"tabular", "digits"} & found.keys():
        raise ImportError(NEEDS_SKLEARN)
    return found
