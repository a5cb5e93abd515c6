"""When a run ends before its last meta-step: at Ctrl-C, and where its time is used up."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import distributed

UNITS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}  # in seconds


class Stop:
    """Whether the run is to end after this meta-step."""

    asked = False


@contextmanager
def after_a_meta_step() -> Iterator[Stop]:
    """Inside, the first Ctrl-C asks for the end of the run, and the second ends it at once: between two meta-steps, all can be saved.

    Processes that share a run would wait for each other, so there, and outside of the main thread, Ctrl-C is as it was.
    """
    stop = Stop()
    alone = distributed.world_size() == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: stopping after this meta-step; once more stops at once", file=sys.stderr)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def seconds(budget: str | float) -> float:
    """A time such as "30 min", "2 h" or 90 (seconds), in seconds.

    Raises:
        ValueError: it is none, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*?)s?\s*", str(budget))
    unit = found[2] if found else ""
    if found is None or unit not in UNITS | {"": 1} or float(found[1]) <= 0:
        raise ValueError(f'budget must be a time such as "30 min", "2 h" or a number of seconds, got {budget!r}')
    return float(found[1]) * UNITS.get(unit, 1)
