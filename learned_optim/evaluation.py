"""Which optimizer weights are better? `learned-optim evaluate` trains the held-out problems of a meta-training run with each of them, and
with tuned AdamW. `learned_optim.meta_train.Evaluation` says how a problem is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from .meta_train.config import MetaTrainConfig
from .meta_train.evaluate import MODES, Evaluation, final
from .meta_train.tasks import Family
from .network import OptimizerNetwork
from .report import aligned, count, plain
from .speed import geometric_mean
from .weights import fingerprint


@dataclass
class Evaluated:
    """What several sets of optimizer weights do on the same problems.

    Args:
        steps: of a training run.
        weights: fingerprint of each set, by the name that it goes by.
        adamw: problem -> the loss that AdamW's best setting ends with, over the first one.
        ratios: set of weights -> problem -> mode -> final loss over AdamW's; infinite where it diverged.
        stopped: whether Ctrl-C ended it before all problems were done.
    """

    steps: int
    weights: dict[str, str]
    adamw: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    stopped: bool = False

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.verdict}"

    def mean(self, name: str, mode: str | None = None) -> float:
        """The geometric mean of a set's ratios over the problems, and over the modes unless one is named."""
        return geometric_mean([ratios[one] for ratios in self.ratios[name].values() for one in ([mode] if mode else MODES)])

    @property
    def table(self) -> str:
        """The problems with the ratios of each set, and the means, as text."""
        columns = [(name, mode) for name in self.ratios for mode in MODES]
        rows = [
            ("", "AdamW", *(name if mode == next(iter(MODES)) else "" for name, mode in columns)),
            (f"{self.steps} steps", "tuned", *(mode for _, mode in columns)),
            *(
                (problem, f"{loss:.4f}", *(f"{self.ratios[name][problem][mode]:.3f}" for name, mode in columns))
                for problem, loss in self.adamw.items()
            ),
            ("geometric mean", "", *(f"{self.mean(name, mode):.3f}" for name, mode in columns)),
        ]
        legend = (
            "AdamW: its loss at the end over that at the start, with the best of five learning rates, constant or with a cosine.\n"
            "Beside it the loss of LearnedOptimizer over AdamW's, without and with total_steps (horizon): below 1, it is ahead.\n"
            "State is kept in fp32, whatever the weights' formats are."
        )
        return f"{aligned(rows)}\n\n{legend}"

    @property
    def verdict(self) -> str:
        """A line for each set of weights, and one that says how far to trust them."""
        names = list(self.ratios)
        other = names[-1]
        lines = []
        for name in names:
            line = f"{name}: {self.mean(name):.3f} of tuned AdamW's loss"
            if name != other:
                theirs = {problem: geometric_mean(list(modes.values())) for problem, modes in self.ratios[other].items()}
                lower = sum(geometric_mean(list(modes.values())) < theirs[problem] for problem, modes in self.ratios[name].items())
                line += f"; lower than with {other} on {lower} of {count(len(theirs), 'problem')}"
            lines.append(f"{line}.")
        lines.append("One problem of a kind, two seeds each: small differences are chance.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All figures, as JSON has them: null where a run diverged."""
        scores = {name: self.mean(name) for name in self.ratios}
        figures = {"steps": self.steps, "weights": self.weights, "scores": scores, "adamw": self.adamw, "ratios": self.ratios}
        found: dict[str, Any] = plain(figures | {"stopped": self.stopped, "torch": torch.__version__})
        return json.dumps(found, allow_nan=False, indent=1)


def evaluate(
    networks: Mapping[str, OptimizerNetwork], families: Mapping[str, Family], config: MetaTrainConfig, device: str = "cpu"
) -> Evaluated:
    """Trains a held-out problem of each family with each network and with AdamW over a grid. A terminal shows how far it is.

    Args:
        networks: by the names that tables give them; others are compared with the last one.
        config: its seed decides the problems, its `horizon_max` the steps, and its `validation` which loss counts.
        device: "cpu" or "cuda".

    Raises:
        KeyboardInterrupt: Ctrl-C, before a problem was done; afterwards Ctrl-C gives what is known.
    """
    found = Evaluated(config.horizon_max, {name: fingerprint(network) for name, network in networks.items()})
    found.ratios = {name: {} for name in networks}
    try:
        with tqdm(total=len(families) * (1 + len(networks)), desc="evaluate", unit="run", leave=False, disable=None) as bar:
            for problem, family in families.items():
                bar.set_postfix_str(problem)
                evaluation = Evaluation({problem: family}, config, device)
                bar.update()
                ratios = {}
                for name, network in networks.items():
                    ratios[name] = evaluation(network.to(device))["ratios"][problem]
                    bar.update()
                for name, modes in ratios.items():
                    found.ratios[name][problem] = modes
                found.adamw[problem] = final(evaluation.adamw[problem])
    except KeyboardInterrupt:
        if not found.adamw:
            raise
        found.stopped = True
    return found
