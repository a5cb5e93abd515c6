"""torchrun whose processes are forks of it, which have what they import from it: `python tests/forked.py MODULE ARGUMENTS`.

The arguments are torchrun's. A process is a Python that has imported the module and then runs the script, as `__main__`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from torch.distributed import run

if __name__ == "__main__":
    importlib.import_module(sys.argv[1])
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # the launcher's handler raises an error
    run.main(["--run-path", "--start-method=fork", *sys.argv[2:]])
