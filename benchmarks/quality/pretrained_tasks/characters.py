"""A transformer of characters of our own, trained for long, which goes on with other text."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tasks import Transformer, encode, language, pretrain
from torch import Tensor, nn
from torch.nn import functional as F

from .documentation import documentation
from .problems import Batch, Problem, problem

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "learned-optim"
PRETRAINING = 6000  # steps of 16 x 64 characters


@functools.cache
def trained_transformer() -> dict[str, Tensor]:
    """A transformer of characters that has read scipy's documentation for 6000 steps of AdamW with a cosine, five times as long as those of
    the quality benchmark's own fine-tuning. Takes some minutes the first time, and is kept in the user's cache."""
    path = CACHE / f"transformer-{PRETRAINING}.pt"
    if not path.exists():
        random_state = torch.get_rng_state()
        torch.manual_seed(99)
        text = encode("\n".join(documentation("scipy")))
        state = pretrain(language(99, text, own_transformer, 64, 16), PRETRAINING)
        torch.set_rng_state(random_state)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    return torch.load(path, weights_only=True)


def own_transformer() -> nn.Module:
    return Transformer(64, 2, 64)


def continued(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    (text,) = batch
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), (logits.argmax(-1) == text[:, 1:]).float().mean(1)


def other_text(seed: int, read: Callable[[], Tensor]) -> Problem:
    """The transformer goes on with other text, whose last tenth is for validation."""
    text, model = read(), own_transformer()
    model.load_state_dict(trained_transformer())
    border = len(text) * 9 // 10
    rows = text[border:].unfold(0, 65, 65)
    return problem(seed, model, [text[:border].unfold(0, 65, 1)], [rows[:: len(rows) // 96][:96]], 8, continued)
