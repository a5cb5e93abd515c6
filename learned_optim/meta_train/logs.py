"""The log of a run: a line of JSON for each meta-step, and TensorBoard where it is asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import distributed

LOG = "log.jsonl"


class Log(contextlib.ExitStack):
    """The first process writes; a resumed run goes on without what a killed one wrote after its last checkpoint, or began to write.

    Args:
        folder: where `log.jsonl` goes, and TensorBoard's events; None logs nothing.
        meta_step: the next one.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, meta_step: int, tensorboard: bool) -> None:
        super().__init__()
        self.file: Any = None
        self.board: Any = None
        if folder is None or distributed.rank() > 0:
            return
        path = Path(folder) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("logging to TensorBoard needs the package: pip install tensorboard") from None
            self.board = self.enter_context(contextlib.closing(SummaryWriter(str(folder), purge_step=meta_step)))
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = path.with_name(f"{LOG}.tmp")
        kept.write_bytes(b"".join(line + b"\n" for line in lines if _before(meta_step, line)))
        os.replace(kept, path)
        self.file = self.enter_context(path.open("ab", buffering=0))  # whole lines, and none that is still to be written at the end

    def write(self, meta_step: int, figures: Mapping[str, float]) -> None:
        if self.file is not None:
            line = json.dumps({"meta_step": meta_step, **figures}) + "\n"
            if self.file.write(line.encode()) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, meta_step)


def _before(meta_step: int, line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False  # cut off by a kill, or by a full disk
    number = entry.get("meta_step") if isinstance(entry, dict) else None
    return isinstance(number, int) and number < meta_step
