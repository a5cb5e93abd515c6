"""The result files that tables are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUALITY = "benchmarks/quality/results/results.json"
MNIST = "benchmarks/quality/results/mnist_wikitext.json"
LEARNED = "benchmarks/quality/results/learned.json"  # the same tasks with the present weights; other figures there may be of those before
PRETRAINED = "benchmarks/quality/results/pretrained.json"
PRETRAINED_HELD_OUT = "benchmarks/quality/results/pretrained_held_out.json"
DISTRIBUTION = "benchmarks/quality/results/distribution.json"
ABLATIONS = "benchmarks/quality/results/ablations.json"
MULTIPLIERS = "benchmarks/quality/results/multipliers.json"
TRAINER = "Trainer-default 5e-05 linear"
HISTORY = "benchmarks/quality/results/history.json"  # of the weights before, by hand: where the default weights change, they get a row
SPEED = "benchmarks/results/speed.json"
ITERATIONS = "benchmarks/results/iterations.json"
CLOCK = "benchmarks/results/clock.json"
SHARDED = "benchmarks/results/sharded.json"
DEMO = "benchmarks/results/demo.json"
ATTACKS = "benchmarks/results/attacks.json"
MACHINE_CODE = "benchmarks/results/machine_code.json"
GPU = "benchmarks/results/gpu_first_minutes.json"  # there only once it has run on a GPU
ENGINE = "benchmarks/meta_training/results"
EXAMPLES = "examples/results"

PLAIN, HORIZON = "learned", "learned+T"  # as the quality benchmark calls the optimizer without and with `total_steps`
UNTUNED = "AdamW-default 0.001"
OPTIMIZERS = {
    HORIZON: "**LearnedOptimizer, `total_steps`**",
    PLAIN: "**LearnedOptimizer, no settings**",
    "Muon tuned": "Muon, tuned",
    "ScheduleFree tuned": "Schedule-Free AdamW, tuned",
    "AdamW tuned": "AdamW, tuned",
    "SGD tuned": "SGD with momentum, tuned",
    "Prodigy 1 cosine": "Prodigy",
    "ScheduleFree-default 0.0025 constant": "Schedule-Free AdamW, default",
    UNTUNED: "AdamW, default (0.001)",
    "Trainer-default 5e-05 linear": "Trainer's default (AdamW, 5e-5, linear)",
}


class TableError(Exception):
    """What is wrong with a document or a result file, and where."""


class Files:
    """The result files of a checkout, by their path in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.read = root, {}

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    def __call__(self, path: str) -> Any:
        if path not in self.read:
            if not self.has(path):
                raise TableError(f"{path} is missing")
            self.read[path] = json.loads((self.root / path).read_text(encoding="utf-8"))
        return self.read[path]
