"""`python -m learned_optim.meta_train`: meta-trains on the families that come along and writes a folder that `LearnedOptimizer` loads."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..argument_types import device as device_type
from ..argument_types import folder as folder_type
from ..argument_types import positive, repository
from ..config import from_file, to_json
from ..network import OptimizerNetwork, load_network
from ..weights import CARD, CURVES, META_TRAIN, bundled_names, bundled_recipe, source_of
from . import bar, distributed, process
from .checkpoint import saved_steps
from .config import MetaTrainConfig
from .families import FAMILIES, chosen
from .folder import claimed
from .loop import MetaTrainingDivergedError, MetaTrainResult, check, meta_train

PROGRAM = "python -m learned_optim.meta_train"

EXAMPLES = """\
examples:
  %(prog)s --config default --out runs/again
      makes the bundled weights again, in about an hour
  %(prog)s --config my.json --start default --out runs/mine
      goes on from them, where my.json holds, for one,
      {"families": ["mlp", "cnn"], "meta_steps": 200, "horizon_max": 100}
      What is left out takes the default of MetaTrainConfig.
  torchrun --nproc-per-node=8 -m learned_optim.meta_train --config my.json --out runs/mine
      on eight processes

For a problem of your own: learned-optim specialise --help
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    add_arguments(parser)
    given = sys.argv[1:] if argv is None else argv
    return run(parser.parse_args(given), f"{PROGRAM} {shlex.join(given)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        metavar="FILE",
        help="a MetaTrainConfig as JSON, or the name of bundled weights for those that they were made with; "
        "of several, each is a stage that goes on with the weights of the one before",
    )
    parser.add_argument(
        "--out",
        type=folder_type,
        required=True,
        help="folder for the weights and their card, and for a checkpoint and a log of each stage; a run that was stopped resumes there",
    )
    parser.add_argument("--start", help="weights to start from: a bundled name, a folder or a Hub id; fresh ones by default")
    parser.add_argument("--device", type=device_type, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; the tasks are small, so one is often the fastest")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too, in the stages' folders")
    parser.add_argument("--push", type=repository, metavar="USER/NAME", help="publish the finished folder on the Hugging Face Hub")


def run(arguments: argparse.Namespace, again: str) -> int:
    """Meta-trains. Returns the exit status.

    Args:
        again: the command that was given, to be told to somebody who stopped it.
    """
    torch.set_num_threads(arguments.threads)
    try:
        with distributed.joined(arguments.device) as device:
            configs = [from_file(MetaTrainConfig, path, by_hand=True) for name in arguments.config for path in configurations(name)]
            network = load_network(arguments.start) if arguments.start else None
            for config in configs:
                check(chosen(config.families), config)
            if arguments.push:
                check_login()
            with claimed(arguments.out):
                try:
                    result = run_stages(arguments, configs, network, device)
                except (KeyboardInterrupt, OSError) as error:
                    if distributed.rank() == 0:
                        reason = f"stopped: {error}" if isinstance(error, OSError) else "stopped by Ctrl-C"
                        print(f"{reason}. {saved(arguments.out, configs)} Go on with: {again}", file=sys.stderr)
                    return 2 if isinstance(error, OSError) else 130
            if distributed.rank() == 0:
                source = source_of(arguments.out)
                print(f"The weights are in {arguments.out}. Use them: LearnedOptimizer(model.parameters(), {source!r})")
                if arguments.push:
                    push(result.network, arguments.push, arguments.out)
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


def check_login() -> None:
    """Raises: PermissionError: nobody is logged in at the Hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise PermissionError("--push needs a login at the Hugging Face Hub: `hf auth login`, or a token in HF_TOKEN")


def push(network: OptimizerNetwork, repo_id: str, folder: Path) -> None:
    """Raises: OSError: the Hub refused; the message says how to try again."""
    try:
        network.push_to_hub(repo_id, folder=folder)
    except (ValueError, OSError) as error:
        again = shlex.join(["learned-optim", "push", str(folder), repo_id])
        reason = " ".join(str(error).split()).rstrip(".")  # the Hub's has several lines
        raise OSError(f"the weights were not published: {reason}. Try again with: {again}") from error


def configurations(name: str) -> list[Path]:
    """The files that an argument of `--config` means."""
    if Path(name).is_file():
        return [Path(name)]
    if found := bundled_recipe(name):
        return found
    known = [bundled for bundled in bundled_names() if bundled_recipe(bundled)]
    raise FileNotFoundError(f"--config: there is no file {name}; and bundled weights that have configurations are {known}")


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
    command = f"{PROGRAM} --config {' '.join(names)} --out runs/again{start}"
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
