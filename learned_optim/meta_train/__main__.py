"""`python -m learned_optim.meta_train`: meta-trains on the families that come along and writes a folder that `LearnedOptimizer` loads."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import from_file, to_json
from ..network import OptimizerNetwork
from ..weights import CARD, CURVES, META_TRAIN, load_network, source_of
from . import bar, distributed, process
from .checkpoint import saved_steps
from .config import MetaTrainConfig
from .families import FAMILIES
from .folder import claimed
from .loop import MetaTrainingDivergedError, MetaTrainResult, meta_train


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
        help="folder for the weights and their card, and for a checkpoint and a log of each stage; a run that was stopped resumes there",
    )
    parser.add_argument("--start", help="weights to start from: a bundled name, a folder or a Hub id; fresh ones by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the tasks are small, so one is often the fastest")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too, in the stages' folders")
    parser.add_argument("--push", metavar="USER/NAME", help="publish the finished folder on the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    again = f"python -m learned_optim.meta_train {shlex.join(sys.argv[1:] if argv is None else argv)}"
    try:
        with distributed.joined(arguments.device) as device:
            configs = [from_file(MetaTrainConfig, path) for path in arguments.config]
            network = load_network(arguments.start) if arguments.start else None
            with claimed(arguments.out):
                try:
                    result = run_stages(arguments, configs, network, device)
                except (KeyboardInterrupt, OSError) as error:
                    if distributed.rank() == 0:
                        reason = f"stopped: {error}" if isinstance(error, OSError) else "stopped by Ctrl-C"
                        print(f"{reason}. {saved(arguments.out, configs)} Go on with: {again}", file=sys.stderr)
                    return 2 if isinstance(error, OSError) else 130
            if distributed.rank() == 0:
                if arguments.push:
                    result.network.push_to_hub(arguments.push, folder=arguments.out)
                source = source_of(arguments.out)
                print(f"The weights are in {arguments.out}. Use them: LearnedOptimizer(model.parameters(), {source!r})")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MetaTrainingDivergedError as error:
        print(
            f"stopped: {error}. The best weights so far, and their figures, are in the last stage's folder in {arguments.out}",
            file=sys.stderr,
        )
        return 1
    return 0


def saved(out: Path, configs: Sequence[MetaTrainConfig]) -> str:
    """What a run that was stopped has on disk."""
    for stage, config in reversed(list(enumerate(configs, 1))):
        if steps := saved_steps(out / f"stage{stage}"):
            return f"Saved in {out}: {steps} of {config.meta_steps} meta-steps of stage {stage}."
    return f"Nothing is saved yet; there is a checkpoint every {configs[0].checkpoint_every} meta-steps."


def run_stages(
    arguments: argparse.Namespace, configs: Sequence[MetaTrainConfig], network: OptimizerNetwork | None, device: str
) -> MetaTrainResult:
    """Runs one stage after the other and hands over the last one's folder, with the configurations of all."""
    numbers = [""] if len(configs) == 1 else range(1, len(configs) + 1)
    names = [META_TRAIN.replace(".json", f"{number}.json") for number in numbers]
    start = f" --start {arguments.start}" if arguments.start else ""
    command = f"python -m learned_optim.meta_train --config {' '.join(names)} --out runs/again{start}"
    for stage, config in enumerate(configs, 1):
        folder = arguments.out / f"stage{stage}"
        label = f"stage {stage}/{len(configs)}"
        with bar.shown(config.meta_steps, label, hidden=distributed.rank() > 0) as progress:
            options = {"tensorboard": arguments.tensorboard, "command": command}
            result = meta_train(FAMILIES, config, folder=folder, device=device, network=network, progress=progress, **options)
        network = result.network
    if distributed.rank() == 0:
        result.network.save_pretrained(arguments.out)
        for name in (CARD, CURVES):
            if (folder / name).exists():
                shutil.copy(folder / name, arguments.out / name)
        for name, config in zip(names, configs, strict=True):
            (arguments.out / name).write_text(to_json(config))
    return result


if __name__ == "__main__":
    process.settle()
    sys.exit(main())
