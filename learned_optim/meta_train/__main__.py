"""`python -m learned_optim.meta_train`: meta-trains on the families that come along and writes a folder that `LearnedOptimizer` loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import from_json
from ..weights import load_network, save_network
from . import distributed
from .config import MetaTrainConfig
from .families import FAMILIES
from .loop import meta_train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learned_optim.meta_train", description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        nargs="+",
        help="a MetaTrainConfig as JSON; of several, each is a stage that goes on with the weights of the one before",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the weights, and for a checkpoint and a log of each stage; a run that was stopped resumes there",
    )
    parser.add_argument("--start", help="weights to start from: a bundled name, a folder or a Hub id; fresh ones by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the tasks are small, so one is often the fastest")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        configs = [from_json(MetaTrainConfig, path.read_text(), str(path)) for path in arguments.config]
        device = distributed.join(arguments.device)
        network = load_network(arguments.start) if arguments.start else None
        for stage, config in enumerate(configs, 1):
            folder = arguments.out / f"stage{stage}"
            label = f"stage {stage}/{len(configs)}"
            with tqdm(total=config.meta_steps, desc=label, unit="step", smoothing=0.05, disable=distributed.rank() > 0) as bar:

                def progress(meta_step: int, figures: dict[str, float], bar: Any = bar) -> None:
                    bar.set_postfix(meta_loss=f"{figures['meta_loss']:.3f}", dropped=int(figures["dropped"]), refresh=False)
                    bar.update(meta_step + 1 - bar.n)

                result = meta_train(FAMILIES, config, folder=folder, device=device, network=network, progress=progress)
            network = result.network
        if distributed.rank() == 0:
            save_network(result.network, arguments.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The weights are in {arguments.out}. Use them: LearnedOptimizer(model.parameters(), {str(arguments.out)!r})")
    return 0


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # optimizees that are all but solved have tiny gradients, and denormal numbers are slow on CPUs
    sys.exit(main())
