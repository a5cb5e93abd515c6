"""The progress bar of a run: meta-steps, time left, and what is known so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def shown(meta_steps: int, label: str, hidden: bool | None = None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Gives a `progress` for `meta_train`.

    Args:
        hidden: show nothing; None shows the bar in a terminal only.
    """
    known: dict[str, str] = {}
    with tqdm(total=meta_steps, desc=label, unit="step", smoothing=0.05, disable=hidden) as bar:

        def progress(meta_step: int, figures: dict[str, float]) -> None:
            known.update({name: f"{figures[name]:.3f}" for name in ("meta_loss", "score", "first_score") if name in figures})
            bar.set_postfix(**known, dropped=int(figures["dropped"]), refresh=False)
            bar.update(meta_step + 1 - bar.n)

        yield progress
