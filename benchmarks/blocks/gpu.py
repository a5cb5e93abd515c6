"""The machine code of the kernels, and what was measured on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .files import GPU, MACHINE_CODE, Files
from .writing import prose, table

# What the assumed time of a pass is made of: multiprocessors, GHz, TB/s, and of each cycle the instructions, fp32 and special ones of a
# multiprocessor, in threads. A copy gets nine tenths of the bandwidth.
DEVICES = {
    "A100": ("sm_80", 108, 1.41, 2.04, (128, 64, 16)),
    "H100": ("sm_90", 132, 1.98, 3.35, (128, 128, 16)),
    "H200": ("sm_90", 132, 1.98, 4.8, (128, 128, 16)),
    "B200": ("sm_100", 148, 1.92, 8.0, (128, 128, 16)),
}
COPY = 0.9


def picoseconds(device: str, found: dict[str, Any]) -> tuple[float, float]:
    """The least time of a weight: of its bytes, and of its instructions."""
    _, processors, clock, bandwidth, rates = DEVICES[device]
    cycles = max(found[key] / rate for key, rate in zip(("instructions", "fp32", "special"), rates, strict=True))
    return found["bytes"] / (COPY * bandwidth), 1e3 * cycles / (processors * clock)


def gpu_machine_code(files: Files) -> str:
    targets = files(MACHINE_CODE)["targets"]
    names = ", ".join(targets)
    rows = [["kernel", "bytes", f"instructions: {names}", "special", f"registers: {names}"]]
    for name in next(iter(targets.values())):
        each = [found[name] for found in targets.values()]
        instructions, registers = (" / ".join(f"{math.ceil(one[key])}" for one in each) for key in ("instructions", "registers"))
        special = math.ceil(max(one["special"] for one in each))
        rows.append([name, f"{each[0]['bytes']:.3g}", instructions, str(special), registers])
    return table(rows)


def gpu_least_times(files: Files) -> str:
    targets = files(MACHINE_CODE)["targets"]
    rows = [["kernel", *DEVICES]]
    for name in next(iter(targets.values())):
        times = [picoseconds(device, targets[target][name]) for device, (target, *_) in DEVICES.items()]
        rows.append([name, *(f"{of_bytes:.1f} / {of_instructions:.1f}" for of_bytes, of_instructions in times)])
    return table(rows)


def gpu_bound(files: Files) -> str:
    targets, found = files(MACHINE_CODE)["targets"], []
    for device, (target, *_) in DEVICES.items():
        for name, one in targets[target].items():
            of_bytes, of_instructions = picoseconds(device, one)
            if of_instructions > of_bytes:
                found.append(f"{name} on {device} ({of_instructions:.1f} where its bytes take {of_bytes:.1f})")
    return prose(f"Bound by their instructions and not by their bytes are: {'; '.join(found) or 'none'}.")


def gpu_measured(files: Files) -> str:
    if not files.has(GPU):
        return prose("""
            **No time here was measured.** No GPU was at hand. `python benchmarks/gpu_first_minutes.py` is meant to take eight minutes on
            one, and has not run.
        """)
    found = files(GPU)
    parts = [prose(f"Measured on {', '.join(f'{key} {value}' for key, value in found['machine'].items())}.")]
    for name, part in found["parts"].items():
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        rows = [columns, *([str(row.get(column, "")) for column in columns] for row in part["rows"])]
        trouble = [prose(part["trouble"])] if "trouble" in part else []
        parts += [f"**{name}**", *([table(rows)] if part["rows"] else []), *trouble]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[Files], str]] = {
    "gpu.machine_code": gpu_machine_code,
    "gpu.least_times": gpu_least_times,
    "gpu.bound": gpu_bound,
    "gpu.measured": gpu_measured,
}
