"""The machine code of the Triton kernels, which compile without a GPU: see `compiled_kernels.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]
NOTES = (ROOT / "benchmarks" / "GPU_NOTES.md").read_text(encoding="utf-8")
SAMPLE = ["apply float32", "moments float32 float32", "directions float32 float32 bfloat16", "judge"]
COORDINATES = 8  # of a thread, on an NVIDIA GPU


def compiled(target: str, folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "compiled_kernels.py"), "--targets", target, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)[target]
    return found


def promised() -> dict[str, dict[str, tuple[int, int]]]:
    """Of each target and kernel, the instructions and registers of the notes."""
    head = re.search(r"^\| kernel \| bytes \| instructions: ([\w, ]+) \|", NOTES, re.M)
    assert head is not None
    targets = head[1].split(", ")
    found: dict[str, dict[str, tuple[int, int]]] = {target: {} for target in targets}
    for name, instructions, registers in re.findall(r"^\| ([\w ]+) \| [\d.]+ \| ([\d/ ]+) \| \d+ \| ([\d/ ]+) \|$", NOTES, re.M):
        for target, *counts in zip(targets, instructions.split(" / "), registers.split(" / "), strict=True):
            found[target][name] = int(counts[0]), int(counts[1])
    return found


def wide(name: str) -> tuple[int, int, int, int]:
    """How many accesses of 16 and of 8 bytes a thread makes of aligned tensors: loads, loads, stores, stores. What is narrower are numbers
    that tensors have once."""
    kind, *formats = name.split()
    bits = [{"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}[each] for each in formats]
    sixteen = [COORDINATES * each // 128 for each in bits]
    direction = COORDINATES * 32 // 128
    if kind == "moments":
        return sixteen[0] + 2 * sixteen[1], 0, 0, 0
    if kind == "apply":
        return direction + sixteen[0], 0, sixteen[0], 0
    grad, moments, lstm = sixteen
    eight = 5 if bits[2] == 8 else 0
    return grad + 2 * moments + 5 * lstm, eight, 2 * moments + 5 * lstm + 2 * direction, eight  # also where a tensor is left out


def check(target: str, found: dict[str, dict[str, Any]]) -> None:
    limits = promised().get(target, {})
    for name, one in found.items():
        assert one["spills"] == 0, (target, name)
        if name in limits:
            assert (one["instructions"], one["registers"]) <= (limits[name][0], 255), (target, name)
            assert one["registers"] <= limits[name][1], (target, name)
        if one["bytes"] and not name.endswith("unaligned") and " none" not in name and target.startswith("sm_"):
            memory = {opcode.replace(".E", "").replace(".EL", ""): count for opcode, count in one["memory"].items()}
            loads, short_loads, stores, short_stores = wide(name)
            assert memory.get("LDG.128", 0) == loads, (target, name, memory)
            assert memory.get("LDG.64", 0) >= short_loads, (target, name, memory)
            assert memory.get("STG.64", 0) == short_stores, (target, name, memory)
            assert memory.get("STG.128", 0) >= stores, (target, name, memory)
            assert not [opcode for opcode in memory if re.search(r"[US](8|16)", opcode)], (target, name, memory)


def test_a_sample_of_kernels(tmp_path: Path) -> None:
    check("sm_90", compiled("sm_90", tmp_path, "--only", *SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_all_kernels(target: str, tmp_path: Path) -> None:
    check(target, compiled(target, tmp_path))


def test_the_notes_name_every_pass() -> None:
    rows = promised()
    assert list(rows) == ["sm_80", "sm_90", "sm_100", "sm_120"]
    assert all(set(SAMPLE[:3]) <= set(kernels) for kernels in rows.values())
