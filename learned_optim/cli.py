"""The `learned-optim` command."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .argument_types import device, folder, positive, repository
from .network import OptimizerNetwork, load_network
from .storage import bytes_per_weight
from .weights import bundled_names, fingerprint, recipe

PROGRAM = "learned-optim"
DESCRIPTION = """\
A learned optimizer for PyTorch. In Python, one line takes AdamW's place:

  optimizer = learned_optim.LearnedOptimizer(model.parameters())"""
EPILOG = f"{PROGRAM} COMMAND --help explains a command, with examples. Start with: {PROGRAM} demo"
DEFAULT = "default"  # the bundled weights
MINE = "problem_of_mine"  # the name that a user's file is imported under; its own may be that of a package


class CommandError(Exception):
    """A mistake of the user's, told in one line without a traceback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A subcommand.

    Args:
        summary: one line for `--help`.
        arguments: adds the command's arguments to its parser.
        run: does it, and returns the exit status where that is not 0.
        examples: lines for its `--help`.
    """

    summary: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]
    examples: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: the exit status, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = ArgumentParser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    given = sys.argv[1:] if argv is None else argv
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        lines = ["examples:", *(f"  {PROGRAM} {name} {example}".rstrip() for example in command.examples)] if command.examples else []
        subparser = commands.add_parser(
            name, help=command.summary, description=command.summary, epilog="\n".join(lines), formatter_class=RawDescriptionHelpFormatter
        )
        if name in given:  # no others, since some import much
            command.arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(given)
    args.again = shlex.join([PROGRAM, *given])
    try:
        return args.run(args) or 0
    except CommandError as error:
        print(f"learned-optim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"learned-optim: stopped by Ctrl-C. {stop}".removesuffix(". "), file=sys.stderr)
        return 130


def _load(name: str, revision: str | None = None) -> OptimizerNetwork:
    try:
        return load_network(name, revision=revision)
    except (ValueError, OSError) as error:
        raise CommandError(error) from error


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=folder, default=Path("runs/demo"), metavar="DIR", help="folder of figures and plot (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of every optimizer on every task (%(default)s)")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes of one thread each (%(default)s)")
    parser.add_argument(
        "--pretrained", default=DEFAULT, metavar="NAME", help="optimizer weights: a bundled name, a folder or a Hub id (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: checks that the demo runs, compares nothing")


def _demo(args: Namespace) -> None:
    for module in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"the demo needs {module}; install it with: pip install matplotlib scikit-learn")
    from . import demo

    network = _load(args.pretrained)
    seeds, steps_scale = (1, 0.01) if args.quick else (args.seeds, 1.0)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        print(demo.run(network, args.out, seeds=seeds, workers=args.workers, steps_scale=steps_scale))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Nothing is saved. Start again with: {args.again}") from None
    except OSError as error:
        raise CommandError(f"the demo could not write its results to {args.out}, or its work to a temporary folder: {error}") from error


def _compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("problem", metavar="FILE.py:NAME", help="a ModuleTask, or a function of a torch.Generator that returns one")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of a training run (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="training runs of each optimizer (%(default)s)")
    parser.add_argument(
        "--pretrained", default=DEFAULT, metavar="NAME", help="optimizer weights: a bundled name, a folder or a Hub id (%(default)s)"
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder for compare.json and compare.png")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON in place of the table")


def _compare(args: Namespace) -> None:
    from .comparison import compare

    network = _load(args.pretrained)
    path, problem = _named(args.problem)
    try:
        result = compare(
            problem, steps=args.steps, seeds=args.seeds, pretrained=network, device=args.device, out=args.out, show=not args.json
        )
    except Exception as error:  # most are of the user's model, data or loss
        raise CommandError(_told(error, path)) from error
    if args.json:
        print(result.to_json())
    if result.stopped:
        kept = f" and in {args.out}" if args.out else ""
        raise KeyboardInterrupt(f"What was known by then is above{kept}. A comparison starts anew: {args.again}")


def _specialise_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("problem", metavar="FILE.py:NAME", help="a ModuleTask, or a function of a torch.Generator that returns one")
    parser.add_argument("--steps", type=positive, required=True, metavar="N", help="that your models train for")
    parser.add_argument("--budget", required=True, metavar="TIME", help='how long it may take, "30 min" for one')
    parser.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="folder for the weights; a run that was stopped resumes there"
    )
    parser.add_argument("--start", default=DEFAULT, metavar="NAME", help="weights to begin with, as in --pretrained (%(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")


def _specialise(args: Namespace) -> None:
    from .meta_train import MetaTrainingDivergedError, meta_train
    from .weights import source_of

    network = _load(args.start)
    path, problem = _named(args.problem)
    options = {"folder": args.out, "device": args.device, "network": network, "command": args.again}
    try:
        result = meta_train(problem, steps=args.steps, budget=args.budget, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The best weights so far are in {args.out}, if a meta-step was done. Go on with: {args.again}") from None
    except MetaTrainingDivergedError as error:
        raise CommandError(f"{error}. The best weights so far are in {args.out}") from error
    except Exception as error:  # most are of the user's model, data or loss
        raise CommandError(_told(error, path)) from error
    if result.evaluations:
        scores = [evaluation["score"] for evaluation in result.evaluations]
        print(f"Final loss on held-out problems: {min(scores):.3f} of tuned AdamW's, with {args.start} {scores[0]:.3f}.")
    print(f"Use them: LearnedOptimizer(model.parameters(), {source_of(args.out)!r}, total_steps={args.steps})")


def _named(text: str) -> tuple[Path, Any]:
    """Runs a file of Python; returns its path and what has the name in it."""
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise CommandError(f"the problem must be given as FILE.py:NAME, my_file.py:problem say, got {text!r}")
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(MINE, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as if the file were run
    sys.modules[MINE] = module  # where dataclasses and pickle look
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(_told(error, path)) from error
    if not hasattr(module, name):
        from .meta_train import ModuleTask

        there = [key for key, value in vars(module).items() if isinstance(value, ModuleTask) or getattr(value, "__module__", None) == MINE]
        raise CommandError(f"{path} has no {name!r}; it defines {', '.join(there) or 'nothing'}")
    return path, getattr(module, name)


def _told(error: Exception, path: Path) -> str:
    """An error in a line, and the line of the user's file that it comes from, if it does."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
    said = str(error).strip().splitlines() or [""]
    if not lines and isinstance(error, (ValueError, OSError)):
        return said[0]
    return f"{path}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {said[0]}"


def _meta_train_arguments(parser: ArgumentParser) -> None:
    from .meta_train.__main__ import add_arguments

    add_arguments(parser)


def _meta_train(args: Namespace) -> int:
    from .meta_train import process
    from .meta_train.__main__ import run

    process.settle()
    return run(args, args.again)


def _evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "pretrained", nargs="+", metavar="NAME_OR_FOLDER_OR_HUB_ID", help="optimizer weights; the bundled default goes along"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the MetaTrainConfig whose held-out problems are trained, as JSON, or the name of bundled weights for theirs; by default what "
        "lies with the first weights, or else that of the bundled default",
    )
    parser.add_argument(
        "--families", nargs="+", default=(), metavar="NAME", help="only these problems; by default all of the configuration"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="of a training run; by default horizon_max of the configuration")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON in place of the table")


def _evaluate(args: Namespace) -> None:
    from .config import from_file
    from .evaluation import evaluate
    from .meta_train import MetaTrainConfig, process
    from .meta_train.__main__ import configurations
    from .meta_train.families import chosen

    networks = {name: _load(name) for name in dict.fromkeys([*args.pretrained, DEFAULT])}
    try:
        files = configurations(args.config) if args.config else recipe(args.pretrained[0]) or recipe(DEFAULT)
        config = from_file(MetaTrainConfig, files[-1], by_hand=True)
        families = chosen(args.families or config.families)
        steps = args.steps or config.horizon_max
        config = MetaTrainConfig(seed=config.seed, horizon_min=1, horizon_max=steps, validation=config.validation)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(error) from error
    torch.set_num_threads(args.threads)
    process.settle()
    try:
        found = evaluate(networks, families, config, args.device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"No problem was done yet. Start again with: {args.again}") from None
    print(found.to_json() if args.json else found)
    if found.stopped:
        rest = " ".join(name for name in families if name not in found.adamw)
        raise KeyboardInterrupt(f"{len(found.adamw)} of {len(families)} problems are done; the others: {args.again} --families {rest}")


def _inspect_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FILE_OR_WEIGHTS",
        help="an optimizer's state dict, or a checkpoint that has one, as torch.save wrote it; a checkpoint folder of Trainer's; or "
        "optimizer weights: a bundled name, a folder or a Hub id",
    )
    parser.add_argument(
        "--pretrained", metavar="NAME", help="the optimizer weights that a state was made with, if they are no bundled ones"
    )
    parser.add_argument("--all", action="store_true", help="all tensors, also where there are many")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def _inspect(args: Namespace) -> None:
    from . import inspection

    source = Path(args.source)
    trainers = [source / name for name in ("optimizer.pt", "optimizer.bin")]  # as Trainer and accelerate call theirs
    path = next((path for path in (source, *trainers) if path.is_file()), None)
    if path is None:
        network, reference = _load(args.source), _load(DEFAULT)
        found = inspection.weights_dict(args.source, network)
        print(json.dumps(found, indent=1) if args.json else inspection.weights_text(args.source, network, (DEFAULT, reference)))
        return

    def weights_of(wanted: str) -> tuple[str, OptimizerNetwork] | None:
        for name in [args.pretrained] if args.pretrained else bundled_names():
            if fingerprint(network := _load(name)) == wanted:
                return name, network
        if args.pretrained:
            raise CommandError(
                f"{path} was made with optimizer weights {wanted}, and those of {args.pretrained} are {fingerprint(network)}"
            )
        return None

    try:
        states = inspection.read_states(path, weights_of)
    except (ValueError, OSError) as error:
        raise CommandError(error) from error
    if args.json:
        print(json.dumps([state.to_dict() for state in states], allow_nan=False, indent=1))
    else:
        print("\n\n".join(state.text(args.all) for state in states))


def _list_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the names as JSON")


def _list(args: Namespace) -> None:
    names = bundled_names()
    print(json.dumps(names) if args.json else "\n".join(names))


def _info_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pretrained", metavar="NAME_OR_FOLDER_OR_HUB_ID")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def _info(args: Namespace) -> None:
    network = _load(args.pretrained, args.revision)
    facts = {
        **asdict(network.config),
        "parameters": sum(param.numel() for param in network.parameters()),
        "state_bytes": round(bytes_per_weight(network.config), 2),
        "fingerprint": fingerprint(network),
    }
    print(json.dumps(facts, indent=2) if args.json else "\n".join(f"{name:20} {value}" for name, value in facts.items()))


def _push_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what a meta-training run or save_pretrained wrote")
    parser.add_argument("repo_id", type=repository, metavar="USER/NAME", help="made if it does not exist")
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
        summary="train two small models beside AdamW, and print and plot who wins (two to four minutes)",
        arguments=_demo_arguments,
        run=_demo,
        examples=("", "--quick", "--pretrained runs/mine --out runs/demo-of-mine"),
    ),
    "compare": Command(
        summary="train a model of yours beside tuned AdamW, and say who is ahead",
        arguments=_compare_arguments,
        run=_compare,
        examples=("my_file.py:problem --steps 300 --out runs/compare", "my_file.py:problem --json > compare.json"),
    ),
    "specialise": Command(
        summary="meta-train optimizer weights for a kind of problem of yours",
        arguments=_specialise_arguments,
        run=_specialise,
        examples=('my_file.py:problem --steps 300 --budget "30 min" --out runs/mine',),
    ),
    "meta-train": Command(
        summary="meta-train optimizer weights, as python -m learned_optim.meta_train does", arguments=_meta_train_arguments, run=_meta_train
    ),
    "evaluate": Command(
        summary="measure optimizer weights on held-out problems of meta-training, beside the bundled default and tuned AdamW",
        arguments=_evaluate_arguments,
        run=_evaluate,
        examples=(
            "runs/mine",
            "runs/mine runs/other --config my.json --json > evaluated.json",
            "runs/mine --families mlp cnn --steps 100",
        ),
    ),
    "inspect": Command(
        summary="why does it not learn? steps, step sizes at their bounds and memory of an optimizer's state; or optimizer weights",
        arguments=_inspect_arguments,
        run=_inspect,
        examples=("optimizer.pt", "out/checkpoint-500 --json", "checkpoint.pt --pretrained runs/mine", "runs/mine"),
    ),
    "list": Command(summary="names of the bundled optimizer weights", arguments=_list_arguments, run=_list),
    "info": Command(
        summary="configuration, size and fingerprint of optimizer weights, and the bytes of state that they keep for each model weight",
        arguments=_info_arguments,
        run=_info,
        examples=("default", "runs/mine --json", "user/name --revision COMMIT"),
    ),
    "push": Command(
        summary="upload a folder of optimizer weights and its model card to the Hugging Face Hub",
        arguments=_push_arguments,
        run=_push,
        examples=("runs/mine user/my-optimizer", "runs/mine user/my-optimizer --private"),
    ),
}
