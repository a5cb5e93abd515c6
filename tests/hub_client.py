"""The real huggingface_hub client, in a process of its own, since it reads its settings at import, and for a test's many calls, since it
takes seconds to start."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

CLIENT = """
import contextlib, io, json, sys, time
if "no-wait" in sys.argv:
    time.sleep = lambda seconds: None  # between retries
import torch
from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.cli import main
from learned_optim.weights import fingerprint

def network(seed):
    torch.manual_seed(seed)
    return OptimizerNetwork(NetworkConfig(hidden_units=3, momentum=0.8))

def broken():
    result = network(1)
    torch.nn.init.constant_(result.coordinate.out, float("nan"))
    return result

def load(*args, **kwargs):
    return fingerprint(load_network(*args, **kwargs))

def run(*arguments):  # the command: its status, and what it prints
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()

for line in sys.stdin:
    try:
        answer = {"value": eval(line)}
    except Exception as error:
        answer = {"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error), "cause": type(error.__cause__).__name__}
    print(json.dumps(answer), flush=True)
"""


class HubError(Exception):
    def __init__(self, answer):
        super().__init__(f"{answer['kinds'][0]}: {answer['message']} (from {answer['cause']})")
        self.kinds, self.cause = answer["kinds"], answer["cause"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Client:
    """A Python process with its own huggingface_hub settings; calling it evaluates an expression there."""

    def __init__(self, home, endpoint, *args, **settings):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
        env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"OMP_NUM_THREADS": "1", **settings}
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *args], env=env, cwd=home, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "value" not in answer:
            raise HubError(answer)
        return answer["value"]

    def run(self, *arguments):
        """Runs the `learned-optim` command there."""
        return Done(*self(f"run(*{arguments!r})"))

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
