"""Measures again all that depends on the optimizer's weights, one part after the other, and fills in the tables.

    python benchmarks/measure.py                       # some hours on two cores, most of them the quality benchmark
    python benchmarks/measure.py --data ../data        # MNIST and WikiText-2 too, from a folder of yours
    python benchmarks/measure.py --parts demo speed

Stopped at any moment, it goes on from there: a part that is done for these weights and this rule is not run again (unless `--again`), and
the quality benchmark keeps its runs, those of the baselines even from other weights' measurements. Parts work in runs/measure and put their
results beside the committed ones they replace, to be looked through and committed. Nothing else should run on the machine meanwhile: times
depend on it. PyLO takes part in `speed` where PYTHONPATH leads to it (see benchmarks/speed.py); else the tables do without.

Where the default weights are new ones, write the figures of those before into benchmarks/quality/results/history.json first.

What depends on the update rule and not on the weights, the other research examples and the meta-training engine's benchmarks, is not here.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent / "quality"))
import tables
from behaviour import behaviour, is_of

from learned_optim import load_network
from learned_optim.weights import fingerprint

ROOT = tables.ROOT
Kept = Callable[[dict[str, Any]], bool]  # whether a run is
RUNS = ROOT / "benchmarks/quality/results/runs.jsonl.xz"
DRAWN_RUNS = ROOT / "benchmarks/quality/results/distribution_runs.jsonl.xz"
ABLATION_RUNS = ROOT / "benchmarks/quality/results/ablations_runs.jsonl.xz"
MULTIPLIER_RUNS = ROOT / "benchmarks/quality/results/multipliers_runs.jsonl.xz"
PRETRAINED_RUNS = ROOT / "benchmarks/quality/results/pretrained_runs.jsonl.xz"
# Where runs scatter most, formats of the state are compared with more seeds than the benchmark's six.
MORE_SEEDS = {100: ["tabular", "ill-conditioned"], 24: ["reinforcement", "mlp", "physics", "resnet", "cnn", "new digits"]}
SIZES = ["1e4", "1e5", "1e6", "2097152", "1e7", "1e8"]
# Of the tasks of pretrained.py, those that AdamW is tuned on, and those that have only Trainer's default beside ours.
TUNED = ["minilm polarity", "minilm polarity head", "transformer sklearn", "efficientnet letters"]
PRETRAINED = [
    *TUNED,
    "minilm polarity lora",
    "minilm polarity last layers",
    "minilm valence",
    "minilm valence off-centre",
    "minilm masked numpy",
]
# Of its held-out tasks, those that are measured beside Trainer's default.
HELD_OUT = ["minilm packages", "minilm masked manual", "efficientnet digits", "transformer torch"]
SCATTERED = ["minilm polarity last layers"]  # where a run ends is chance, so three seeds of each
DRAWN = 40  # problems of those drawn at random to publish; AdamW takes most of a minute to be tuned on one
# Kinds of problem that the weights are specialised for, with the minutes for it.
KINDS = {"curves": [1, 3, 10], "digits": [3, 10], "sentences": [3, 10, 30]}
MNIST = ["mnist mlp", "mnist vit", "wikitext transformer", "wikitext fine-tuning"]


def call(*command: object) -> str:
    """Runs a program of the checkout, and shows and returns what it prints."""
    line = [str(word) for word in command]
    print(f"\n$ {' '.join(line)}", flush=True)
    printed = ""
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            printed += text
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    return printed


def python(*command: object) -> str:
    return call(sys.executable, *command)


def publish(folder: Path, target: str, names: dict[str, str]) -> None:
    """Copies files of a folder to the committed ones, all or none."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} was not written")
    for name, new in names.items():
        (ROOT / target).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, ROOT / target / new)


def unpack(packed: Path, runs: Path) -> None:
    """The committed runs, where there are none yet."""
    if not runs.exists() and packed.exists():
        part = runs.with_suffix(".part")
        part.write_bytes(lzma.decompress(packed.read_bytes()))
        part.replace(runs)


def pack(runs: Path, packed: Path, kept: Kept) -> None:
    """The runs that are kept: of the baselines, and of these weights with this rule."""
    lines = [line for line in runs.read_text(encoding="utf-8").splitlines() if kept(json.loads(line))]
    packed.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9))


def learned(folder: Path, kept: Kept) -> None:
    """The optimizers alone, which takes minutes where the baselines' runs are at hand; in the folder of the next part, which goes on."""
    folder = folder.parent / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    unpack(RUNS, folder / "runs.jsonl")
    python("benchmarks/quality", "--out", folder, "--parts", "baselines", "learned")
    names = {"results.json": "learned.json", "speed.png": "speed.png", "curves.png": "curves.png"}
    publish(folder, "benchmarks/quality/results", names)
    pack(folder / "runs.jsonl", RUNS, kept)


def quality(folder: Path, kept: Kept) -> None:
    """And what depends on them: other step sizes, formats of the state."""
    unpack(RUNS, folder / "runs.jsonl")
    for seeds, tasks in MORE_SEEDS.items():
        python("benchmarks/quality", "--out", folder, "--parts", "learned", "state", "--state-seeds", seeds, "--tasks", *tasks)
    python("benchmarks/quality", "--out", folder)
    publish(folder, "benchmarks/quality/results", {name: name for name in ("results.json", "tables.md")})
    pack(folder / "runs.jsonl", RUNS, kept)


def distribution(folder: Path, kept: Kept) -> None:
    unpack(DRAWN_RUNS, folder / "runs.jsonl")
    python("benchmarks/quality/distribution.py", "--held-out", "--problems", DRAWN, "--out", folder)
    publish(folder, "benchmarks/quality/results", {"results.json": "distribution.json"})
    pack(folder / "runs.jsonl", DRAWN_RUNS, kept)


def ablations(folder: Path, kept: Kept) -> None:
    unpack(ABLATION_RUNS, folder / "runs.jsonl")
    python("benchmarks/quality/ablations.py", "--out", folder)
    publish(folder, "benchmarks/quality/results", {"results.json": "ablations.json"})
    pack(folder / "runs.jsonl", ABLATION_RUNS, kept)


def multipliers(folder: Path, kept: Kept) -> None:
    unpack(MULTIPLIER_RUNS, folder / "runs.jsonl")
    python("benchmarks/quality/multipliers.py", "--out", folder)
    publish(folder, "benchmarks/quality/results", {"results.json": "multipliers.json"})
    pack(folder / "runs.jsonl", MULTIPLIER_RUNS, kept)


def pretrained(folder: Path, kept: Kept) -> None:
    """Needs the extra `pretrained-models`."""
    unpack(PRETRAINED_RUNS, folder / "runs.jsonl")
    python("benchmarks/quality/pretrained.py", "--out", folder, "--tasks", *TUNED)
    untuned = "Trainer-default 5e-05 linear", "learned", "learned+T"
    python("benchmarks/quality/pretrained.py", "--out", folder, "--tasks", *HELD_OUT, "--optimizers", *untuned)
    publish(folder, "benchmarks/quality/results", {"results.json": "pretrained_held_out.json"})
    python("benchmarks/quality/pretrained.py", "--out", folder, "--tasks", *SCATTERED, "--optimizers", *untuned, "--seeds", 3)
    python("benchmarks/quality/pretrained.py", "--out", folder, "--tasks", *PRETRAINED, "--optimizers", *untuned)
    publish(folder, "benchmarks/quality/results", {"results.json": "pretrained.json"})
    pack(folder / "runs.jsonl", PRETRAINED_RUNS, kept)


def mnist(folder: Path, data: Path) -> None:
    python("benchmarks/quality", "--out", folder, "--data", data, "--parts", "learned", "--tasks", *MNIST)
    publish(folder, "benchmarks/quality/results", {"results.json": "mnist_wikitext.json", "tables.md": "mnist_wikitext.md"})


def demo(folder: Path) -> None:
    call(Path(sys.executable).parent / "learned-optim", "demo", "--out", folder)
    publish(folder, "benchmarks/results", {"summary.json": "demo.json"})
    publish(folder, "pretrained/default", {"demo.png": "demo.png"})


def trainer(name: str) -> None:
    python(f"examples/{name}.py")
    publish(ROOT / "runs" / name, f"examples/results/{name}", {"results.json": "results.json"})


def own(folder: Path) -> None:
    """The example is kept short and only prints."""
    found = losses(python("examples/meta_train_your_own.py"))
    (folder / "results.json").write_text(json.dumps({"final loss": found}, indent=1) + "\n", encoding="utf-8")
    publish(folder, "examples/results/meta_train_your_own", {"results.json": "results.json"})


def specialise(folder: Path) -> None:
    for kind, minutes in KINDS.items():
        python("benchmarks/meta_training/specialise.py", kind, "--out", folder / kind, "--budgets", *minutes)
        names = {"results.json": f"specialise_{kind}.json", "plot.png": f"specialise_{kind}.png"}
        publish(folder / kind, "benchmarks/meta_training/results", names)


def losses(printed: str) -> dict[str, dict[str, float]]:
    rows = re.findall(r"^(\S+(?: [\d.]+)?) +final loss ([\d.]+) ± ([\d.]+) ", printed, re.MULTILINE)
    if len(rows) < 3:
        raise ValueError("examples/meta_train_your_own.py printed no losses")
    return {name: {"mean": float(mean), "deviation": float(deviation)} for name, mean, deviation in rows}


def iterations(folder: Path) -> None:
    python("benchmarks/iterations.py", "--out", folder)
    publish(folder, "benchmarks/results", {"results.json": "iterations.json", "plot.png": "iterations.png"})


def clock(folder: Path) -> None:
    python("benchmarks/clock.py", "--out", folder)
    publish(folder, "benchmarks/results", {"results.json": "clock.json", "plot.png": "clock.png"})


def speed(folder: Path) -> None:
    python("benchmarks/speed.py", "--out", folder, "--sizes", *SIZES)
    publish(folder, "benchmarks/results", {"results.json": "speed.json", "plot.png": "speed.png"})


def parts(kept: Kept, data: Path | None) -> dict[str, Callable[[Path], None]]:
    """What is measured, in this order; each is given its folder in runs/measure."""
    found: dict[str, Callable[[Path], Any]] = {
        "learned": lambda folder: learned(folder, kept),
        "quality": lambda folder: quality(folder, kept),
        "pretrained": lambda folder: pretrained(folder, kept),
        "distribution": lambda folder: distribution(folder, kept),
        "ablations": lambda folder: ablations(folder, kept),
        "multipliers": lambda folder: multipliers(folder, kept),
        "demo": demo,
        "trainer_gpt": lambda _: trainer("trainer_gpt"),
        "trainer_classifier": lambda _: trainer("trainer_classifier"),
        "meta_train_your_own": own,
        "specialise": specialise,
        "look_inside": lambda _: python("examples/look_inside.py", "--out", "examples/results/look_inside"),
        "clock": clock,
        "iterations": iterations,
        "speed": speed,
    }
    return found | ({"mnist": lambda folder: mnist(folder, data)} if data else {})


def measure(chosen: dict[str, Callable[[Path], Any]], mark: str, folder: Path, again: bool = False) -> None:
    """Runs the parts that are not done for these weights and this rule yet."""
    for name, part in chosen.items():
        stamp = folder / name / "mark"
        if not again and stamp.exists() and stamp.read_text(encoding="utf-8") == mark:
            print(f"{name}: measured already, in {stamp.parent}")
            continue
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        part(stamp.parent)
        stamp.write_text(mark, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist/ and wikitext-2/, for the part `mnist`")
    parser.add_argument("--parts", nargs="*", metavar="PART", help=f"of {', '.join(parts(bool, Path()))}; all by default")
    parser.add_argument("--again", action="store_true", help="those too that are done for these weights")
    arguments = parser.parse_args(argv)
    network = load_network("default")
    weights, numbers = fingerprint(network), behaviour(network)
    found = parts(lambda run: is_of(run, weights, numbers), arguments.data.resolve() if arguments.data else None)
    if unknown := set(arguments.parts or ()) - found.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))} (mnist needs --data); there are {', '.join(found)}")
    chosen = {name: part for name, part in found.items() if name in (arguments.parts or found)}
    measure(chosen, f"{weights} {numbers}", ROOT / "runs/measure", arguments.again)
    sys.exit(tables.main([]))


if __name__ == "__main__":
    main()
