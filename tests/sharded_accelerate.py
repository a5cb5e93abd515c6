"""Runs a program under accelerate's FSDP2 on CPUs, `torchrun tests/sharded_accelerate.py PROGRAM ARGUMENTS`, and checks that the model was
sharded.

Where there is no GPU, accelerate leaves FSDP out without a word. Only its choice is changed here: what then shards the model, trains it
and saves it is accelerate's and torch's own, which needs no GPU.
"""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

choose = AcceleratorState.__init__


def choose_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    choose(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = choose_fsdp
    del sys.argv[0]
    names = runpy.run_path(sys.argv[0], run_name="__main__")
    optimizer = (names.get("trainer") or SimpleNamespace(**names)).optimizer
    moments = [state["moments"] for state in optimizer.state.values()]
    assert moments
    assert sum(state.to_local().numel() for state in moments) < 0.6 * sum(state.numel() for state in moments)
