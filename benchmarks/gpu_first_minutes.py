"""What can be learned of the GPU kernels in the first minutes with a GPU.

    python benchmarks/gpu_first_minutes.py

Needs torch, Triton and this package, nothing else, and ends within `--minutes`. Parts come in the order of what they are worth: first
whether the kernels are right, then what they cost, then what they are good for. A part that fails or for which no time is left does not
hold up the others. After each, all that is known so far is written to `--out` as JSON, and its table printed. `benchmarks/tables.py` writes
the tables into GPU_NOTES.md where the file is benchmarks/results/gpu_first_minutes.json.

`--tiny` shrinks everything, so that the program itself can be tried in seconds, on a CPU too (TRITON_INTERPRET=1 runs the kernels there).
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import itertools
import json
import math
import platform
import re
import statistics
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork, load_network
from learned_optim.meta_train import FAMILIES, MetaTrainConfig, meta_train

Row = dict[str, Any]
ADAMW, MUON, OURS, SMALL = "AdamW, fused", "Muon", "LearnedOptimizer", "LearnedOptimizer, small"
FORMATS = [("float32", "float32"), ("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")]
# Bytes of a weight that each pass moves in the formats above, of gradients and parameters in fp32; see GPU_NOTES.md.
BYTES = {
    "moments": dict(zip(FORMATS, (12, 12, 12, 8, 8), strict=True)),
    "directions": dict(zip(FORMATS, (64, 44, 34.2, 36, 26.2), strict=True)),
    "apply": dict.fromkeys(FORMATS, 12),
}


class Size(NamedTuple):
    """How much of everything."""

    rounds: int
    vector: int  # weights of the passes
    large: int  # weights of the largest vector
    vision: tuple[int, int, int, int]  # width, layers, pixels of a side, images
    text: tuple[int, int, int, int, int]  # width, layers, words, tokens of a text, texts
    race: tuple[int, int, int, int, int]
    steps: int  # of a race
    meta_seconds: float


FULL = Size(10, 2**26, 2**31 + 2**10, (768, 12, 224, 32), (1024, 24, 50257, 1024, 4), (768, 12, 50304, 512, 16), 300, 8.0)
TINY = Size(2, 2**12, 2**11 + 2**10, (32, 1, 32, 2), (32, 1, 64, 16, 2), (32, 1, 256, 16, 4), 5, 1.0)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> tuple[float, float]:
    """Median time until a call is through, and until it returns to the host, after two that do not count."""
    through, host = [], []
    for counts in [False] * 2 + [True] * rounds:
        wait(device)
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        wait(device)
        if counts:
            through.append(1e3 * (time.perf_counter() - start))
            host.append(1e3 * (returned - start))
    return statistics.median(through), statistics.median(host)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, after calls on a side stream that warm it up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# Whether the kernels are right


START = 2.0**-10  # of parameters: below the size of a step, so that 16 bits show what one does


def gradients(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def trained(
    network: OptimizerNetwork, kernel: str, device: torch.device, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, odd: bool
) -> list[Tensor]:
    """Parameters after three steps; at addresses that are no multiples of 16 bytes where `odd`."""
    params = []
    for shape in shapes:
        memory = torch.full((math.prod(shape) + 1,), START, dtype=dtype, device=device)
        params.append(nn.Parameter(memory[1:].view(shape) if odd else memory[:-1].clone().view(shape)))
    optimizer = LearnedOptimizer(params, network, total_steps=20, weight_decay=0.1, kernel=kernel)
    for step in range(3):
        for param, grad in zip(params, gradients(shapes, step), strict=True):
            param.grad = grad.to(device, dtype)
        optimizer.step()
    return [param.detach().float().cpu() for param in params]


def correctness(device: torch.device, size: Size) -> list[Row]:
    """The kernels against the rule, in every format and dtype. Matrices are too small to be orthogonalised in bf16."""
    rows = []
    shapes = [(17,), (8, 16)] if size is TINY else [(), (17,), (1, 9), (40, 3, 3, 3), (96, 80), (300 * 1024 + 16,), (300 * 1024 + 3,)]
    weights = load_network("default")
    for (moments, lstm), dtype, odd in itertools.product(FORMATS, (torch.float32, torch.bfloat16, torch.float16), (False, True)):
        if (odd or (moments, lstm) != FORMATS[1]) and dtype != torch.float32 and (not odd or (moments, lstm) != FORMATS[4]):
            continue  # dtypes are tried in two formats, each in one kind of place
        network = OptimizerNetwork(NetworkConfig(moment_format=moments, lstm_format=lstm))
        network.load_state_dict(weights.state_dict())
        mine, theirs = (trained(network, kernel, device, shapes, dtype, odd) for kernel in ("triton", "reference"))
        difference = max(float((one - other).abs().max() / (other - START).abs().max()) for one, other in zip(mine, theirs, strict=True))
        # What is rounded at random may be rounded otherwise where it lies beside a border.
        allowed = 1e-4 if (moments, lstm) == FORMATS[0] else 0.05
        place = "odd address" if odd else "aligned"
        rows.append({"moments": moments, "LSTM": lstm, "dtype": str(dtype)[6:], "place": place, "difference": difference})
        rows[-1] |= {"allowed": allowed, "right": difference <= allowed}
    return rows


def model_of(device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 160), nn.Tanh(), nn.Linear(160, 144)).to(device), torch.randn(32, 8).to(device)


def stepper(device: torch.device, lr: float | Tensor = 1.0) -> tuple[nn.Module, LearnedOptimizer, Callable[[], None]]:
    model, inputs = model_of(device)
    optimizer = LearnedOptimizer(model.parameters(), total_steps=20, lr=lr)

    def iterate() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return model, optimizer, iterate


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def waiting(device: torch.device, size: Size) -> list[Row]:
    """Whether a step waits for the device."""
    _, optimizer, iterate = stepper(device)
    iterate()
    iterate()
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"waits": sum("synchroniz" in str(one.message) and "prototype" not in str(one.message) for one in caught)}]


def graph(device: torch.device, size: Size) -> list[Row]:
    """A CUDA graph's steps against eager ones, also after `lr` has changed."""
    results = []
    for graphed in (True, False):
        lr = torch.ones((), device=device)
        model, _, iterate = stepper(device, lr)
        if graphed:
            replay = captured(iterate).replay
        else:
            for _ in range(3):
                iterate()
            replay = iterate
        for step in range(6):
            lr.fill_(0.5 if step > 2 else 1.0)
            replay()
        results.append(model)
    return [{"graph equals eager": same(*results)}]


def compiled(device: torch.device, size: Size) -> list[Row]:
    """`torch.compile` of the step against the step."""
    results = []
    for wrap in (lambda step: step, torch.compile):
        model, optimizer, iterate = stepper(device)
        optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign]
        for _ in range(3):
            iterate()
        results.append(model)
    return [{"compiled equals eager": same(*results)}]


def large(device: torch.device, size: Size) -> list[Row]:
    """Whether addresses beyond 2^31 weights are right: gradients repeat, so steps must, where nothing is rounded by place."""
    network = OptimizerNetwork(NetworkConfig(moment_format="float32", lstm_format="float32"))
    network.load_state_dict(load_network("default").state_dict())
    period = 2**10
    param = nn.Parameter(torch.zeros(size.large, device=device))
    param.grad = torch.randn(period, generator=torch.Generator().manual_seed(0)).to(device).repeat(size.large // period)
    optimizer = LearnedOptimizer([param], network)
    optimizer.step()
    optimizer.step()
    ends = param.detach()[:period], param.detach()[-period:]
    return [{"weights": size.large, "moved": bool(ends[0].abs().min() > 0), "ends are equal": ends[0].equal(ends[1])}]


# What they cost


def bandwidth(device: torch.device, size: Size) -> float:
    """Bytes a second of a copy; what is read and what is written both count."""
    source = torch.zeros(4 * size.vector, device=device)
    target = torch.zeros_like(source)
    return 2 * 4 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), device, size.rounds)[0])


def passes(device: torch.device, size: Size) -> list[Row]:
    """Time of each pass over the weights of a vector, beside that of a copy of as many bytes."""
    rows, copied = [], bandwidth(device, size)
    for formats in FORMATS:
        network = OptimizerNetwork(NetworkConfig(moment_format=formats[0], lstm_format=formats[1]))
        param = nn.Parameter(torch.zeros(size.vector, device=device))
        param.grad = torch.randn(size.vector, device=device)
        optimizer = LearnedOptimizer([param], network, kernel="triton")
        optimizer.step()
        optimizer.step()
        wait(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(size.rounds):
                optimizer.step()
            wait(device)
        found = {event.key: event.self_device_time_total / size.rounds for event in profile.key_averages()}
        for name, moved in BYTES.items():
            measured = 1e6 * found.pop(name) / size.vector
            rows.append({"moments": formats[0], "LSTM": formats[1], "pass": name, "ps a weight": measured})
            rows[-1]["to its bytes"] = measured / (1e12 * moved[formats] / copied)
        rows.append({"moments": formats[0], "LSTM": formats[1], "pass": "all else", "us a step": sum(found.values())})
    return [*rows, {"pass": "a copy", "TB/s": copied / 1e12}]


class Block(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = max(1, width // 64), causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.attend(self.first(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        hidden = hidden + self.mix(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.shrink(F.gelu(self.grow(self.second(hidden))))


class Vision(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021) of the full size, but for the mean over patches in place of a class token."""

    def __init__(self, width: int, layers: int, pixels: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn((pixels // 16) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.embed(images).flatten(2).mT + self.positions
        return self.out(self.norm(self.blocks(hidden)).mean(1))


class Text(nn.Module):
    """GPT-2 (Radford et al. 2019) with the embedding as its last layer: 355 M weights in the full size, 124 M in the race."""

    def __init__(self, width: int, layers: int, words: int, length: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(hidden)), self.embed.weight).flatten(0, 1)


class Both(Optimizer):
    """Muon for the matrices of hidden layers, AdamW for the rest."""

    def __init__(self, model: nn.Module, lr: float, adamw_lr: float) -> None:
        hidden = [param for name, param in model.named_parameters() if param.ndim == 2 and "blocks" in name]
        others = [param for param in model.parameters() if all(param is not each for each in hidden)]
        super().__init__(model.parameters(), {"lr": lr})
        self.parts: list[Optimizer] = [torch.optim.Muon(hidden, lr=lr), torch.optim.AdamW(others, lr=adamw_lr, fused=True)]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def scale(self, factor: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = factor * part.defaults["lr"]


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    ADAMW: lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    MUON: lambda model: Both(model, 1e-3, 1e-3),
    OURS: lambda model: LearnedOptimizer(model.parameters()),
    SMALL: lambda model: LearnedOptimizer(model.parameters(), "small"),
}


def peak(device: torch.device) -> float:
    """GiB since memory was last looked at."""
    if device.type != "cuda":
        return math.nan
    most = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return most


def models(device: torch.device, size: Size) -> Iterator[Row]:
    """A step, and a whole iteration, of two models; activations are bf16, and the weights that, or fp32."""
    width, layers, pixels, images = size.vision
    text_width, text_layers, words, length, texts = size.text
    problems = {
        "ViT-B/16": (Vision, (width, layers, pixels), lambda: torch.randn(images, 3, pixels, pixels), 1000),
        "GPT-2": (Text, (text_width, text_layers, words, length), lambda: torch.randint(words, (texts, length)), words),
    }
    for (name, (kind, arguments, draw, classes)), dtype in itertools.product(problems.items(), (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        with device:
            model = kind(*arguments).to(dtype)
        inputs = draw().to(device)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        targets = torch.randint(classes, (inputs.numel() if inputs.ndim == 2 else len(inputs),)).to(device)

        def backward(model: nn.Module = model, inputs: Tensor = inputs, targets: Tensor = targets) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                output = model(inputs)
            F.cross_entropy(output.float(), targets).backward()

        def whole(backward: Callable[[], None], optimizer: Optimizer) -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        for label, make in MAKERS.items():
            backward()
            optimizer = make(model)
            row = {"model": name, "weights": str(dtype)[6:], "optimizer": label}
            peak(device)
            row["step, ms"], row["host, ms"] = milliseconds(optimizer.step, device, size.rounds)
            row["peak, GiB"] = peak(device)
            row["iteration, ms"] = milliseconds(functools.partial(whole, backward, optimizer), device, size.rounds)[0]
            if device.type == "cuda":
                try:
                    row["graph, ms"] = milliseconds(captured(optimizer.step).replay, device, size.rounds)[0]
                except RuntimeError as error:
                    row["graph, ms"] = str(error).partition("\n")[0]
            yield row
            optimizer.zero_grad()
            del optimizer


# What they are good for


def meta_training(device: torch.device, size: Size) -> list[Row]:
    """Meta-steps a second, of a bundled family, on the device and on the CPU."""
    rows = []
    for where in dict.fromkeys((device.type, "cpu")):
        times: list[float] = []
        start = {"network": load_network("default"), "budget": size.meta_seconds, "device": where}
        meta_train(FAMILIES["mlp"], MetaTrainConfig(), **start, progress=lambda *_: times.append(time.perf_counter()))  # noqa: B023
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
        rows.append({"device": where, "meta-steps a second": rate})
    return rows


def corpus(words: int) -> Tensor:
    """The standard library's sources, as numbers of their most frequent words and signs; 0 is any other."""
    text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))[:3000])
    found = re.findall(r"\w+|[^\w\s]|\n *", text)
    numbers = {word: number for number, (word, _) in enumerate(collections.Counter(found).most_common(words - 1), 1)}
    return torch.tensor([numbers.get(word, 0) for word in found])


def race(device: torch.device, size: Size) -> Iterator[Row]:
    """A GPT trained from scratch: AdamW and Muon with the best of several learning rates, ours with none to choose."""
    width, layers, words, length, texts = size.race
    tokens = corpus(words)
    torch.manual_seed(0)
    with device:
        start = Text(width, layers, words, length)
    contenders: list[tuple[str, float, Callable[[nn.Module], Optimizer]]] = [
        (OURS, 1.0, lambda model: LearnedOptimizer(model.parameters(), total_steps=size.steps)),
        (SMALL, 1.0, lambda model: LearnedOptimizer(model.parameters(), "small", total_steps=size.steps)),
    ]
    for lr in (1e-3, 3e-4, 3e-3):
        contenders.append((ADAMW, lr, lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True)))  # type: ignore[misc]
        contenders.append((MUON, 10 * lr, lambda model, lr=lr: Both(model, 10 * lr, lr)))  # type: ignore[misc]
    for label, lr, make in contenders:
        model = copy.deepcopy(start)
        optimizer, generator = make(model), torch.Generator().manual_seed(0)
        losses = []
        wait(device)
        began = time.perf_counter()
        for step in range(size.steps):
            factor = min(1.0, 20 * (step + 1) / size.steps) * (0.5 + 0.5 * math.cos(math.pi * step / size.steps))
            if isinstance(optimizer, Both):
                optimizer.scale(factor)
            elif not isinstance(optimizer, LearnedOptimizer):
                optimizer.param_groups[0]["lr"] = factor * lr
            begin = torch.randint(len(tokens) - length - 1, (texts,), generator=generator)
            batch = tokens[begin[:, None] + torch.arange(length + 1)].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                output = model(batch[:, :-1])
            loss = F.cross_entropy(output.float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        wait(device)
        seconds = time.perf_counter() - began
        tail = torch.stack(losses[-max(1, size.steps // 10) :]).mean().item()
        yield {"optimizer": label, "lr": lr, "loss at the end": tail, "ms a step": 1e3 * seconds / size.steps}


# Each by its name, with the seconds that must be left for it to begin.
PARTS: dict[str, tuple[Callable[[torch.device, Size], Any], float]] = {
    "correctness": (correctness, 0),
    "waiting": (waiting, 0),
    "graph": (graph, 0),
    "compiled": (compiled, 0),
    "passes": (passes, 15),
    "models": (models, 60),
    "large": (large, 15),
    "meta-training": (meta_training, 30),
    "race": (race, 60),
}
ONLY_CUDA = {"waiting", "graph", "passes"}


def plain(value: Any) -> Any:
    """Floats with 4 digits; None for those that JSON does not know."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def run(name: str, device: torch.device, size: Size, until: float) -> dict[str, Any]:
    """What a part finds: its rows, of which there are fewer where time ran out, and what went wrong."""
    function, needed = PARTS[name]
    began, rows = time.monotonic(), []
    if until - began < needed:
        return {"rows": rows, "trouble": "no time was left"}
    found: dict[str, Any] = {"rows": rows}
    try:
        for row in function(device, size):
            rows.append({key: plain(value) for key, value in row.items()})
            if time.monotonic() > until:
                found["trouble"] = "stopped, since time ran out"
                break
    except Exception as error:
        found["trouble"] = f"{type(error).__name__}: {error}"
        found["traceback"] = traceback.format_exc()
    return found | {"seconds": plain(time.monotonic() - began)}


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(device: torch.device) -> dict[str, Any]:
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(), "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/gpu_first_minutes.json"), help="where the figures go")
    options.add_argument("--minutes", type=float, default=8.0, help="after which no part or row begins")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options.add_argument("--device", default="cuda")
    options.add_argument("--tiny", action="store_true", help="to try the program itself")
    arguments = options.parse_args(argv)
    device, until = torch.device(arguments.device), time.monotonic() + 60 * arguments.minutes
    if device.type == "cuda" and not torch.cuda.is_available():
        options.error("torch finds no CUDA device; --device cpu --tiny tries the program itself")
    results: dict[str, Any] = {"machine": machine(device), "parts": {}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if name in ONLY_CUDA and device.type != "cuda":
            found: dict[str, Any] = {"rows": [], "trouble": "needs a CUDA device"}
        else:
            found = run(name, device, TINY if arguments.tiny else FULL, until)
        results["parts"][name] = found
        print(f"\n## {name}\n\n{table(found['rows'])}\n{found.get('traceback', found.get('trouble', ''))}", flush=True)
        arguments.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    main()
