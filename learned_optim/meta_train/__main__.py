"""`python -m learned_optim.meta_train`: meta-trains on the families that come along and writes a folder that `LearnedOptimizer` loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import from_json
from ..weights import load_network
from .config import MetaTrainConfig
from .families import FAMILIES
from .loop import meta_train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learned_optim.meta_train", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a MetaTrainConfig as JSON, such as pretrained/default/meta_train.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, checkpoint and log; a run that was stopped resumes there"
    )
    parser.add_argument("--start", help="weights to start from: a bundled name, a folder or a Hub id; fresh ones by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the tasks are small, so one is often the fastest")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        config = from_json(MetaTrainConfig, arguments.config.read_text(), str(arguments.config))
        network = load_network(arguments.start) if arguments.start else None
        with tqdm(total=config.meta_steps, desc="meta-training", unit="step", smoothing=0.05) as bar:

            def progress(meta_step: int, figures: dict[str, float]) -> None:
                bar.set_postfix(meta_loss=f"{figures['meta_loss']:.3f}", dropped=int(figures["dropped"]), refresh=False)
                bar.update(meta_step + 1 - bar.n)

            meta_train(FAMILIES, config, folder=arguments.out, device=arguments.device, network=network, progress=progress)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The weights are in {arguments.out}. Use them: LearnedOptimizer(model.parameters(), {str(arguments.out)!r})")
    return 0


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # optimizees that are all but solved have tiny gradients, and denormal numbers are slow on CPUs
    sys.exit(main())
