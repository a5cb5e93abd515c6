"""The `learned-optim` command."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .network import OptimizerNetwork
from .weights import bundled_names, fingerprint, load_network


class CommandError(Exception):
    """A mistake of the user's, told in one line without a traceback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A subcommand.

    Args:
        summary: one line for `--help`.
        arguments: adds the command's arguments to its parser.
        run: does it.
    """

    summary: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit status, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = ArgumentParser(prog="learned-optim", description="A learned optimizer for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        command.arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        print(f"learned-optim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("learned-optim: stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


def _load(name: str, revision: str | None = None) -> OptimizerNetwork:
    try:
        return load_network(name, revision=revision)
    except (ValueError, OSError) as error:
        raise CommandError(error) from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of figures and plot (%(default)s)")
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of every optimizer on every task (%(default)s)")
    parser.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes of one thread each (%(default)s)")
    parser.add_argument(
        "--pretrained", default="default", metavar="NAME", help="weights: a bundled name, a folder or a Hub id (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: checks that the demo runs, compares nothing")


def _demo(args: Namespace) -> None:
    for module in ("matplotlib", "sklearn", "tqdm"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f'the demo needs {module}; install it with: pip install "learned-optim[demo]"')
    from . import demo

    network = _load(args.pretrained)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out must be a folder, or one that can be made: {error}") from error
    seeds, steps_scale = (1, 0.01) if args.quick else (args.seeds, 1.0)
    try:
        print(demo.run(network, args.out, seeds=seeds, workers=args.workers, steps_scale=steps_scale))
    except OSError as error:
        raise CommandError(f"the demo could not write its results to {args.out}, or its work to a temporary folder: {error}") from error


def _list(_: Namespace) -> None:
    print("\n".join(bundled_names()))


def _info_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pretrained", metavar="NAME_OR_FOLDER_OR_HUB_ID")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def _info(args: Namespace) -> None:
    network = _load(args.pretrained, args.revision)
    facts = {
        **asdict(network.config),
        "parameters": sum(param.numel() for param in network.parameters()),
        "fingerprint": fingerprint(network),
    }
    for name, value in facts.items():
        print(f"{name:20} {value}")


def _push_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what a meta-training run or save_pretrained wrote")
    parser.add_argument("repo_id", metavar="USER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="nobody else may read it; refused where the repository is there and public")
    parser.add_argument("--message", default="Upload optimizer network", help="of the commit (%(default)s)")


def _push(args: Namespace) -> None:
    try:
        network = load_network(args.folder)  # a path always means a folder
        commit = network.push_to_hub(args.repo_id, folder=args.folder, private=True if args.private else None, commit_message=args.message)
    except (ValueError, OSError) as error:  # huggingface_hub's errors are among them
        raise CommandError(error) from error
    print(f'pushed; load it with LearnedOptimizer(params, "{args.repo_id}", revision="{commit}")')


COMMANDS = {
    "demo": Command(
        summary="train two small models beside AdamW, and print and plot who wins (about 3 minutes)", arguments=_demo_arguments, run=_demo
    ),
    "list": Command(summary="names of the bundled weights", arguments=lambda parser: None, run=_list),
    "info": Command(summary="configuration, size and fingerprint of a set of weights", arguments=_info_arguments, run=_info),
    "push": Command(summary="upload a folder of weights and its model card to the Hugging Face Hub", arguments=_push_arguments, run=_push),
}
