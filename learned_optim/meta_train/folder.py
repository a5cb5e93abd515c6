"""The folder of a run: one process at a time, and nothing in it that a killed one left half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..weights import SCRATCH
from . import distributed
from .checkpoint import CHECKPOINT


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Makes the folder, keeps other runs out of it, and clears it of unfinished files. Of several processes, the first does so for all.

    The lock is on the folder itself, so there is no file to leave behind, and the system takes it off a process that ends in any way.
    Where there are no such locks (Windows, some network drives), none is held.

    Raises:
        BlockingIOError: another process has it.
    """
    if folder is None or distributed.rank() > 0:
        yield
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        for unfinished in path.glob(f"{CHECKPOINT}.*.tmp"):
            unfinished.unlink()
        for unfinished in path.glob(f"{SCRATCH}*"):
            shutil.rmtree(unfinished)
        yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"another process is meta-training in {path}; wait until it ends, stop it, or use another folder") from None
    except OSError:
        pass  # a drive without locks
    try:
        yield
    finally:
        os.close(descriptor)
