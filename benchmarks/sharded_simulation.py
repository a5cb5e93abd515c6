"""What a step of a sharded model would cost each GPU, for models that do not fit on the machines at hand: derived, not measured.

    python benchmarks/sharded_simulation.py

Counted from the code as it runs: the models' shapes (transformers, without memory), which process sends what to whom
(`learned_optim.sharding`, for each process), the sums that all get, bytes of state (`learned_optim.storage`) and the operations of
Newton-Schulz. A test compares the traffic with that of two real processes. The bytes of the Triton kernels are those of GPU_NOTES.md.

Assumed is what the arguments say: the speed of links, matrix products and memory; and that nothing overlaps, that all wait for the process
with the largest matrices, and that a batch holds more than a quarter of all words, so that embeddings are matrices. Copies around
Newton-Schulz are left out for all.

Three ways to step beside AdamW, each with parameters and gradients cut along rows (FSDP2):

- ours: the Triton kernels, products in bfloat16, matrices in fp32 on the wire.
- Muon with all-to-all, as ours does it (Ahn et al. 2025, "Dion: distributed orthonormalized updates", whose code has Muon so): bfloat16
  on the wire, five iterations; embeddings, head and vectors by AdamW.
- DistMuon (Liu et al. 2025, "Muon is scalable for LLM training", section 2.3): weights lie end to end and are cut in equal stretches. Each
  process gathers in bfloat16 all matrices of which it has a part, and orthogonalises the whole of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Shard
from torch.utils.flop_counter import FlopCounterMode

from learned_optim import load_network
from learned_optim.rule import orthogonalize
from learned_optim.sharding import ShardedLayout, Shards
from learned_optim.storage import bytes_per_weight

OUT = Path(__file__).parent / "results" / "sharded.json"
FP32, BF16 = 4, 2  # bytes
KERNEL_BYTES, ADAMW_BYTES, MUON_BYTES = 64, 28, 20  # of a weight and step: gradients, moments and parameters in fp32, read or written
ADAMW_STATE, MUON_STATE = 8, 4
MUON_STEPS = 5
# Numbers of each tensor in the sums of a step, which all processes get, with weight decay; and their bytes.
SUMS = {"triton": (4, 1, 1), "compiled": (4, 1, 1), "reference": (4, 4, 1, 1)}
SUM_BYTES = {"triton": 4, "compiled": 8, "reference": 8}


class Mesh:
    """A process's place among all, as much of a DeviceMesh as `learned_optim.sharding` asks for without sending anything."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.shape, self.coordinate = shape, coordinate

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate

    def get_group(self, dim: int) -> Any:
        return self

    group_name = "all"


def layout_of(shapes: Sequence[torch.Size], ranks: int, rank: int) -> ShardedLayout:
    """Tensors whose rows are cut up over all processes, as FSDP2 does it."""
    mesh: Any = Mesh((ranks,), (rank,))
    return ShardedLayout(tuple(shapes), tuple(Shards(mesh, (Shard(0),), shape) for shape in shapes), torch.device("meta"))


def parts_sent(layout: ShardedLayout) -> list[int]:
    """Bytes that a process sends to others in each all_to_all of a step. There it sends parts of matrices, and gets parts of those that it
    orthogonalises; on the way back the other way round."""
    sent = []
    for exchange in layout.exchanges:
        ways: tuple[list[int], list[int]] = ([], [])
        for dim, *both in exchange.stages:
            mine = exchange.mesh.get_coordinate()[dim]
            for way, traffic in zip(ways, both, strict=True):
                way.append(FP32 * sum(exchange.boxes[key].size for peer, keys in enumerate(traffic) if peer != mine for key in keys))
        sent += [*ways[0], *reversed(ways[1])]
    return sent


def sums_sent(layout: ShardedLayout, kernel: str) -> list[int]:
    """Bytes of each all_reduce of a step."""
    return [SUM_BYTES[kernel] * count * len(layout.shapes) for count in SUMS[kernel]]


@functools.cache
def products(shape: tuple[int, int], steps: int, dtype: torch.dtype) -> int:
    """Floating-point operations to orthogonalise a matrix."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(shape, device="meta"), steps, dtype)
    return counter.get_total_flops()


class Machine(NamedTuple):
    """What is assumed, in units of one GPU."""

    link: float  # bytes a second to others, and as many from them
    latency: float  # seconds of a collective
    bf16: float  # operations a second of matrix products
    memory: float  # bytes a second
    tokens: int  # of a batch


def split(model: torch.nn.Module) -> tuple[list[torch.Size], list[int]]:
    """Shapes of parameters, and which of them Muon orthogonalises."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= {id(head.weight)}
    params = list(model.parameters())
    return [param.shape for param in params], [k for k, param in enumerate(params) if param.ndim == 2 and id(param) not in tables]


def ours(shapes: Sequence[torch.Size], ranks: int, machine: Machine) -> dict[str, float]:
    config = load_network("default").config
    layouts = [layout_of(shapes, ranks, rank) for rank in range(ranks)]
    sums = sums_sent(layouts[0], "triton")
    sent = max(sum(parts_sent(layout)) for layout in layouts) + ring(sum(sums), ranks)
    owned = [[k for exchange in layout.exchanges for k in exchange.owned] for layout in layouts]
    work = [sum(products(tuple(shapes[k]), config.orthogonalize_steps, torch.bfloat16) for k in members) for members in owned]
    here = [sum(layout.sizes) for layout in layouts]
    # What comes in, matrices, and what they become; and where Newton-Schulz works on the largest ones.
    matrices = [3 * FP32 * sum(shapes[k].numel() for k in members) for members in owned]
    collectives = len(parts_sent(layouts[0])) + len(sums)
    return {
        "state": max(here) * bytes_per_weight(config),
        "temporary": max(2 * FP32 * count + size for count, size in zip(here, matrices, strict=True)),
        "sent": sent,
        "collectives": collectives,
        "seconds of links": sent / machine.link + collectives * machine.latency,
        "seconds of products": max(work) / machine.bf16,
        "seconds of memory": max(here) * KERNEL_BYTES / machine.memory,
    }


def ring(count: float, ranks: int) -> float:
    """Bytes that each process sends for all to have a sum of that many."""
    return 2 * (ranks - 1) / ranks * count


def muon(shapes: Sequence[torch.Size], matrices: Sequence[int], ranks: int, machine: Machine) -> dict[str, float]:
    layouts = [layout_of([shapes[k] for k in matrices], ranks, rank) for rank in range(ranks)]
    owned = [[matrices[k] for exchange in layout.exchanges for k in exchange.owned] for layout in layouts]
    sent = max(sum(parts_sent(layout)) for layout in layouts) * BF16 / FP32
    mine = max(sum(layout.sizes) for layout in layouts)
    work = max(sum(products(tuple(shapes[k]), MUON_STEPS, torch.bfloat16) for k in members) for members in owned)
    room = max(3 * BF16 * sum(shapes[k].numel() for k in members) for members in owned) + BF16 * mine
    return of_muon(shapes, mine, ranks, machine, sent, 2, work, room)


def distmuon(shapes: Sequence[torch.Size], matrices: Sequence[int], ranks: int, machine: Machine) -> dict[str, float]:
    ends = list(itertools.accumulate(shapes[k].numel() for k in matrices))
    size = -(-ends[-1] // ranks)
    sent, received, work, room = ([0] * ranks for _ in range(4))
    for k, end in zip(matrices, ends, strict=True):
        begin = end - shapes[k].numel()
        holders = range(begin // size, (end - 1) // size + 1)
        for rank in holders:
            part = min(end, size * (rank + 1)) - max(begin, size * rank)
            sent[rank] += BF16 * part * (len(holders) - 1)
            received[rank] += BF16 * (end - begin - part)
            work[rank] += products(tuple(shapes[k]), MUON_STEPS, torch.bfloat16)
            room[rank] = max(room[rank], 2 * BF16 * (end - begin))  # one after the other
    most = max(max(pair) for pair in zip(sent, received, strict=True))
    return of_muon(shapes, size, ranks, machine, most, 1, max(work), max(room))


def of_muon(
    shapes: Sequence[torch.Size], mine: int, ranks: int, machine: Machine, sent: float, collectives: int, work: int, room: float
) -> dict[str, float]:
    others = weights_of(shapes) / ranks - mine  # AdamW's
    return {
        "state": MUON_STATE * mine + ADAMW_STATE * others,
        "temporary": room,
        "sent": sent,
        "collectives": collectives,
        "seconds of links": sent / machine.link + collectives * machine.latency,
        "seconds of products": work / machine.bf16,
        "seconds of memory": (MUON_BYTES * mine + ADAMW_BYTES * others) / machine.memory,
    }


def adamw(shapes: Sequence[torch.Size], ranks: int, machine: Machine) -> dict[str, float]:
    mine = weights_of(shapes) / ranks
    nothing = dict.fromkeys(("temporary", "sent", "collectives", "seconds of links", "seconds of products"), 0)
    return {"state": ADAMW_STATE * mine, **nothing, "seconds of memory": ADAMW_BYTES * mine / machine.memory}


def weights_of(shapes: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig())  # its defaults are those of 7B


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {"GPT-2 1.5B": (gpt2, 8), "Llama 7B": (llama, 64)}


def simulate(machine: Machine, links: Sequence[float]) -> Iterator[dict[str, Any]]:
    for (name, (make, ranks)), link in zip(MODELS.items(), links, strict=True):
        with torch.device("meta"):
            model = make()
        shapes, matrices = split(model)
        here, weights = machine._replace(link=link), weights_of(shapes)
        rows = {
            "AdamW": adamw(shapes, ranks, here),
            "Muon, all-to-all": muon(shapes, matrices, ranks, here),
            "DistMuon": distmuon(shapes, matrices, ranks, here),
            "ours": ours(shapes, ranks, here),
        }
        for row in rows.values():
            row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds of"))
        # FSDP2 gathers parameters in bf16 for the way there and again for the way back, and scatters gradients in bf16.
        moved = 3 * BF16 * weights * (ranks - 1) / ranks
        yield {
            "model": name,
            "weights": weights,
            "GPUs": ranks,
            "link, bytes a second": link,
            "forward and backward": {"sent": moved, "seconds of products": 6 * weights * machine.tokens / machine.bf16},
            "optimizers": rows,
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=OUT, help="where the figures go")
    links = "GB/s that a GPU sends while it gets as many: 8 GPUs of one host, 64 of eight"
    options.add_argument("--links", type=float, nargs=2, default=[300, 40], help=links)
    options.add_argument("--latency", type=float, default=30, help="microseconds of a collective")
    options.add_argument("--bf16", type=float, default=500, help="TFLOP/s of matrix products in bfloat16")
    options.add_argument("--memory", type=float, default=3, help="TB/s of a GPU's memory")
    options.add_argument("--tokens", type=int, default=16384, help="a batch's tokens on each GPU")
    arguments = options.parse_args(argv)
    rates = (1e12 * getattr(arguments, name) for name in ("bf16", "memory"))
    machine = Machine(0, 1e-6 * arguments.latency, *rates, arguments.tokens)
    models = list(simulate(machine, [1e9 * link for link in arguments.links]))
    results = {
        "assumed": {key: value for key, value in machine._asdict().items() if key != "link"},
        "models": models,
    }
    for model in models:
        print(f"\n{model['model']}, {model['weights'] / 1e9:.2f} billion weights on {model['GPUs']} GPUs, each:")
        for name, row in model["optimizers"].items():
            parts = [f"{key} {1e3 * value:.1f} ms" for key, value in row.items() if key.startswith("seconds")]
            print(f"{name:18} {', '.join(f'{key} {row[key] / 1e9:.2f} GB' for key in ('state', 'temporary', 'sent'))}, {', '.join(parts)}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
