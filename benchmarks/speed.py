"""What does a step of the optimizer cost?

    python benchmarks/speed.py

Every measurement is a ratio to fused AdamW's step, taken in the same process: optimizers take turns, and medians of rounds are printed. The
*LSTM pass* is a step on vectors, where nothing is orthogonalised; on matrices the share of Newton-Schulz is told apart and compared with
`torch.optim.Muon`. The roofline is the time in which the machine copies as many bytes as a step must read and write at least: gradient and
state once in each pass, parameter once. Whole training iterations are those of a character GPT of 10 million weights at 4,096 tokens a
batch and of a CNN on 128 images of 32 x 32.

PyLO takes part where it can be imported: `pip install --no-deps mup==1.0.0`, and a clone of github.com/Belilovsky-Lab/pylo in PYTHONPATH.
On PyPI, `pylo` is another program.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parent / "meta_training"))
from common import COLOURS, new_figure, parser, prepare, save, table

from learned_optim import LearnedOptimizer, load_network
from learned_optim.kernels.cpu import matrix_dtype
from learned_optim.rule import orthogonalize

Maker = Callable[[list[nn.Parameter]], Optimizer]
MINE, REFERENCE, ADAMW, PYLO = "LearnedOptimizer", "LearnedOptimizer, reference", "AdamW, fused", "PyLO small_fc_lopt"
SLOW = {REFERENCE: 10**6, PYLO: 10**6}  # the most weights that are measured of what is slow
# Bytes of a step by weight. Ours, three passes: gradient, momentum and second moment in and the two out; all three and, in bfloat16, the
# state of two units in, those four and the direction out; direction and parameter in, parameter out.
BYTES = {MINE: 20 + 12 + 2 * 2 * 4 + 4 + 12, ADAMW: 28}


def makers() -> dict[str, Maker]:
    from prodigyopt import Prodigy
    from schedulefree import AdamWScheduleFree

    def schedule_free(params: list[nn.Parameter]) -> Optimizer:
        optimizer = AdamWScheduleFree(params)
        optimizer.train()
        return optimizer

    found: dict[str, Maker] = {
        ADAMW: functools.partial(torch.optim.AdamW, fused=True),
        "AdamW": torch.optim.AdamW,
        "Schedule-Free AdamW": schedule_free,
        "Prodigy": Prodigy,
        MINE: LearnedOptimizer,
        REFERENCE: functools.partial(LearnedOptimizer, kernel="reference"),
    }
    return found if (peer := pylo()) is None else found | {PYLO: peer}


def pylo() -> Maker | None:
    """PyLO's learned optimizer in PyTorch operations, the only way in which it runs on a CPU, or None where PyLO cannot be imported. Its
    weights are random, which cost as much as those on the Hub."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no CUDA kernels
        try:
            from pylo.models.Meta_MLP import MetaMLP
            from pylo.optim import AdafacLO_naive
        except ImportError:
            return None

    def make(params: list[nn.Parameter]) -> Optimizer:
        with tempfile.TemporaryDirectory() as folder:
            MetaMLP(input_size=39, hidden_size=32, hidden_layers=1).save_pretrained(folder)
            optimizer: Optimizer = AdafacLO_naive(params, hf_key=folder)
        return optimizer

    return make


def parameters(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, which take turns after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for counts in [False] + [True] * rounds:
        for name, call in calls.items():
            duration = seconds(call)
            if counts:
                found[name].append(duration)
    return {name: statistics.median(durations) for name, durations in found.items()}


def steps(chosen: dict[str, Maker], shapes: Sequence[Sequence[int]], rounds: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return compare({name: make(parameters(shapes, dtype)).step for name, make in chosen.items()}, rounds)


def bandwidth() -> float:
    """Bytes a second of a copy that fits into no cache; what is read and what is written both count."""
    source, target = torch.zeros(2**26), torch.zeros(2**26)
    return 2 * 4 * 2**26 / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def state_bytes(make: Maker, params: list[nn.Parameter]) -> float:
    """Of a weight, after a step."""
    optimizer = make(params)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / sum(param.numel() for param in params)


class GPT(nn.Module):
    """A character transformer of 10.7 million weights."""

    def __init__(self, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(96, width), nn.Parameter(0.02 * torch.randn(256, width))
        block = functools.partial(nn.TransformerEncoderLayer, width, 6, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks, self.out = nn.ModuleList(block() for _ in range(layers)), nn.Linear(width, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.out(hidden).flatten(0, 1)


def cnn() -> nn.Module:
    """A CNN of 2.8 million weights."""
    layers: list[nn.Module] = []
    for into, out in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 256)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def iteration(model: nn.Module, inputs: Tensor, targets: Tensor, chosen: dict[str, Maker], rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward pass, and of each optimizer's step on a copy of the gradients."""

    def backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets.flatten()).backward()

    backward()
    params = {name: [nn.Parameter(param.detach().clone()) for param in model.parameters()] for name in chosen}
    for copies in params.values():
        for copied, param in zip(copies, model.parameters(), strict=True):
            copied.grad = param.grad
    return compare({"forward and backward": backward, **{name: make(params[name]).step for name, make in chosen.items()}}, rounds)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "speed")
    options.set_defaults(out=Path("runs/speed"))
    options.add_argument("--sizes", type=float, nargs="*", default=[1e4, 1e5, 1e6, 2**21, 1e7], help="weights")
    options.add_argument("--tensors", type=int, nargs="*", default=[1, 10, 100, 1000], help="that a million weights are cut into")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--skip-iterations", action="store_true", help="leave out whole training iterations, which take some minutes")
    arguments = options.parse_args(argv)
    prepare(arguments.threads)
    rounds, chosen, copy = arguments.rounds, makers(), bandwidth()
    results: dict[str, object] = {"bytes a second of a copy": copy}

    # By the number of weights
    sizes, curves = [int(size) for size in arguments.sizes], {name: [] for name in chosen}
    rows: list[list[object]] = [["weights", *(f"{name}, ms" for name in chosen), "ours / AdamW", "roofline, ms", "ours / roofline"]]
    for size in sizes:
        found = steps({name: make for name, make in chosen.items() if size <= SLOW.get(name, math.inf)}, [(size,)], rounds)
        for name in chosen:
            curves[name].append(found.get(name, math.nan))
        roof = BYTES[MINE] * size / copy
        cells = [1e3 * found[name] if name in found else "" for name in chosen]
        rows.append([size, *cells, found[MINE] / found[ADAMW], 1e3 * roof, found[MINE] / roof])
    print(f"LSTM pass: one vector\n{table(rows)}\n")
    results["by weights"] = rows

    # By the number of tensors, and by dtype
    few = {name: chosen[name] for name in (ADAMW, "AdamW", MINE)}
    rows = [["tensors, dtype", *(f"{name}, ms" for name in few), "ours / AdamW"]]
    for count in arguments.tensors:
        found = steps(few, [(max(1, 10**6 // count),)] * count, 3 * rounds)  # of interest is how rows compare
        rows.append([f"{count}, float32", *(1e3 * value for value in found.values()), found[MINE] / found[ADAMW]])
    for dtype in (torch.bfloat16, torch.float16):
        found = steps(few, [(10**5,)] * 10, rounds, dtype)
        rows.append([f"10, {str(dtype)[6:]}", *(1e3 * value for value in found.values()), found[MINE] / found[ADAMW]])
    print(f"A million weights\n{table(rows)}\n")
    results["by tensors"] = rows

    # Matrices
    side = math.isqrt(max(size for size in sizes if size <= 2**21))
    matrices = {ADAMW: chosen[ADAMW], MINE: chosen[MINE]}
    found = steps(matrices, [(side, side)], max(3, rounds // 3))
    gradient = torch.randn(side, side)
    whole = functools.partial(orthogonalize, gradient, load_network("default").config.orthogonalize_steps, matrix_dtype())
    muon = torch.optim.Muon(parameters([(side, side)]))
    found |= compare({"Newton-Schulz": torch.no_grad()(whole), "Muon (bfloat16)": muon.step}, max(1, rounds // 5))
    rows = [["step", "ms"], *([name, 1e3 * value] for name, value in found.items())]
    print(f"One matrix of {side} x {side}\n{table(rows)}\n")
    results["matrix"] = rows

    # State, and the first step
    rows = [["optimizer", "state, bytes a weight", "first step of 100,000 weights, ms"]]
    for name, make in chosen.items():
        optimizer = make(parameters([(10**5,)]))
        first = seconds(optimizer.step)
        rows.append([name, state_bytes(make, parameters([(10**5,)])), 1e3 * first])
    print(f"{table(rows)}\n")
    results["state"] = rows

    if not arguments.skip_iterations:
        rows = [["iteration", "weights", "forward and backward, s", "AdamW's share", "our LSTM pass's share", "Newton-Schulz's share"]]
        text, images = torch.randint(96, (16, 256)), torch.randn(128, 3, 32, 32)
        for name, model, inputs, targets in (("GPT", GPT(), text, text), ("CNN", cnn(), images, torch.randint(10, (128,)))):
            network = load_network("default")
            vectors = {ADAMW: chosen[ADAMW], MINE: chosen[MINE], "no Newton-Schulz": functools.partial(flat, network)}
            found = iteration(model, inputs, targets, vectors, 3)
            base, lstm = found["forward and backward"], found["no Newton-Schulz"]
            shares = [found[ADAMW] / (base + found[ADAMW]), lstm / (base + found[MINE]), (found[MINE] - lstm) / (base + found[MINE])]
            rows.append([name, sum(param.numel() for param in model.parameters()), base, *(f"{share:.1%}" for share in shares)])
        print(f"Whole training iterations\n{table(rows)}")
        results["iterations"] = rows

    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    colours = (COLOURS[0], COLOURS[2], COLOURS[3], "#56B4E9", COLOURS[1], COLOURS[4], "#E69F00")
    for (name, values), colour in zip(curves.items(), colours[: len(curves)], strict=True):
        axes.loglog(sizes, [1e3 * value for value in values], "o-", color=colour, label=name)
    axes.loglog(sizes, [1e3 * BYTES[MINE] * size / copy for size in sizes], ":", color=COLOURS[1], label="roofline of LearnedOptimizer")
    axes.set(xlabel="weights, one vector", ylabel="milliseconds a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    save(arguments.out, arguments.threads, results, figure)


def flat(network: torch.nn.Module, params: list[nn.Parameter]) -> Optimizer:
    """The optimizer on the same parameters as vectors, so that nothing is orthogonalised."""
    vectors = [nn.Parameter(param.detach().reshape(-1)) for param in params]
    for vector, param in zip(vectors, params, strict=True):
        assert param.grad is not None
        vector.grad = param.grad.reshape(-1)
    return LearnedOptimizer(vectors, network)


if __name__ == "__main__":
    main()
