"""The families of tasks that come along. Each samples an architecture and data for it: synthetic, Python's own source text, or what
scikit-learn ships. Nothing is downloaded, `hub_text` excepted."""

from __future__ import annotations

from ..tasks import Family
from .dense import convex, ill_conditioned, mlp, regression
from .fine_tuning import fine_tuning
from .hub import hub_text
from .images import autoencoder, cnn, vision_transformer
from .real import digits, tabular
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
    "tabular": tabular,
    "digits": digits,
}

__all__ = ["FAMILIES", "hub_text"]
