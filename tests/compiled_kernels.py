"""Compiles the Triton kernels without a GPU, and looks at the machine code: registers, spills, instructions, and how wide memory is read.

    python tests/compiled_kernels.py --record           # what the tables of benchmarks/GPU_NOTES.md are made of, in some minutes
    python tests/compiled_kernels.py --targets gfx942   # prints what is found of all kernels, as JSON

Not with TRITON_INTERPRET=1, which leaves nothing to compile.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from learned_optim import storage
from learned_optim.config import FORMATS
from learned_optim.kernels import gpu, gpu_passes, gpu_replay

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TYPES = {"instructions": "*i64", "tensors": "*i64", "blocks": "*i32", "chunks": "*i32", "skipped": "*i64", "totals": "*fp64"}
TYPES |= {"begin": "i32", "count": "i32", "decay1": "fp32", "decay2": "fp32"}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "machine_code.json"
STATE = [("float32", "float32"), ("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")]
UNITS = 2

FP32 = {"FFMA", "FMUL", "FADD"}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND"}  # what a multiprocessor has few units for
NOTHING = {"NOP", "BRA"}  # after the last instruction


def kernels() -> dict[str, tuple[Any, dict[str, Any], float]]:
    """Each kernel as it is compiled, by a name: its function, constants, and bytes that it moves for a weight; 0 where it has none."""
    found: dict[str, tuple[Any, dict[str, Any], float]] = {}
    for columns in (1, gpu_passes.SUMS):
        found |= {f"{name} {columns}": (getattr(gpu_passes, name), {"COLUMNS": columns}, 0) for name in ("add_up", "means")}
    found |= {name: (getattr(gpu_passes, name), {}, 0) for name in ("gather", "scatter", "judge")}
    found["replay"] = gpu_replay._replay, {}, 0
    for align, cut in itertools.product((gpu_passes.ALIGNMENT, 1), (False, True)):
        suffix = ("" if align > 1 else " unaligned") + (" stretches" if cut else "")
        for dtype in ("float32", "bfloat16", "float16") if align > 1 else ("float32", "bfloat16"):
            width, kind = WIDTHS[dtype], getattr(tl, dtype)
            if not cut:
                found[f"apply {dtype}{suffix}"] = gpu_passes.apply, {"PARAM": kind, "ALIGN": align}, 4 + 2 * width
            for fmt in FORMATS[: 0 if cut else 2]:
                constants = {"FORMAT": FORMATS.index(fmt), "GRAD": kind, "ALIGN": align}
                found[f"moments {dtype} {fmt}{suffix}"] = gpu_passes.moments, constants, width + 2 * WIDTHS[fmt]
            for moments, lstm in STATE if dtype == "float32" else STATE[1:2]:
                if cut and lstm == "int8":
                    continue  # which is refused
                formats = {"MOMENTS": FORMATS.index(moments), "LSTM": FORMATS.index(lstm)}
                scale = 4 / storage.BLOCK if lstm == "int8" else 0
                moved = width + 4 * WIDTHS[moments] + 2 * 2 * UNITS * (WIDTHS[lstm] + scale) + 4
                found[f"directions {dtype} {moments} {lstm}{suffix}"] = (
                    gpu_passes.directions,
                    {"UNITS": UNITS, **formats, "GRAD": kind, "ALIGN": align, "CUT": cut},
                    moved,
                )
    return found


def passes() -> list[str]:
    """The kernels of the tables: what goes over all weights of aligned tensors in the two most common dtypes."""
    return [
        name
        for name, (_, constants, moved) in kernels().items()
        if moved
        and constants["ALIGN"] == gpu_passes.ALIGNMENT
        and constants.get("CUT", 0) == 0
        and name.split()[1] not in ("none", "float16")
    ]


def look(name: str, target: str) -> dict[str, Any]:
    """What the machine code of a kernel is like. Instructions are those of a thread for each of its weights, all branches together."""
    function, constants, moved = kernels()[name]
    signature = {each: "constexpr" if each in constants else TYPES.get(each, "*fp32") for each in function.arg_names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, each in enumerate(function.arg_names) if signature[each].startswith("*")}
    source = ASTSource(function, signature, constants, aligned)
    warps = gpu.WARPS[constants["ALIGN"]] if moved else gpu.WARPS[gpu_passes.ALIGNMENT]
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
    weights = gpu_passes.BLOCK / (warps * TARGETS[target].warp_size) if moved else 1
    read = of_amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else of_nvidia(compiled.asm["cubin"])
    opcodes = read.pop("opcodes")
    counts = collections.Counter(opcode.split(".")[0] for opcode in opcodes if opcode.split(".")[0] not in NOTHING)
    per_weight = {
        "instructions": sum(counts.values()) / weights,
        "fp32": sum(counts[opcode] for opcode in FP32) / weights,
        "special": sum(counts[opcode] for opcode in SPECIAL) / weights,
    }
    memory = collections.Counter(opcode for opcode in opcodes if opcode.startswith(("LDG", "STG", "global_", "buffer_")))
    return {"bytes": moved, **read, **per_weight, "memory": dict(memory)}


def of_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = lambda *command: subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout  # noqa: E731
        text = run(knobs.nvidia.nvdisasm.path, "-c")
        usage = run(knobs.nvidia.cuobjdump.path, "-res-usage")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return {"registers": int(registers[1]), "spills": sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes), "opcodes": opcodes}


def of_amd(text: str) -> dict[str, Any]:
    registers, *spills = (
        int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return {"registers": registers, "spills": sum(spills), "opcodes": re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.M)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--targets", nargs="*", choices=TARGETS, default=[name for name in TARGETS if name.startswith("sm_")])
    options.add_argument("--only", nargs="*", help="kernels, by name")
    options.add_argument("--record", action="store_true", help=f"write what is found of the passes over all weights to {RECORD}")
    arguments = options.parse_args()
    names = arguments.only or (passes() if arguments.record else list(kernels()))
    found = {target: {name: look(name, target) for name in names} for target in arguments.targets}
    if arguments.record:
        for one in itertools.chain.from_iterable(of_target.values() for of_target in found.values()):
            del one["memory"]  # which the tests look at anew
        RECORD.write_text(json.dumps({"triton": triton.__version__, "targets": found}, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
