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
RECORD = json.loads((ROOT / "benchmarks" / "results" / "machine_code.json").read_text(encoding="utf-8"))["targets"]
SAMPLE = [
    "apply float32",
    "moments float32 float32",
    "directions float32 float32 bfloat16",
    "directions float32 float32 bfloat16 stretches",
]
SAMPLE += ["judge", "replay"]


def compiled(targets: list[str], folder: Path, *options: str) -> dict[str, dict[str, dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "compiled_kernels.py"), "--targets", *targets, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return found


def accesses(name: str) -> tuple[list[int], list[int]]:
    """The bits of a coordinate in each tensor that a kernel loads, and in each that it stores; the zeros of a direction that is left
    out count too."""
    kind, *formats = name.split()
    bits = [{"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}[each] for each in formats]
    if kind == "moments":
        return [bits[0], bits[1], bits[1]], []
    if kind == "apply":
        return [32, bits[0]], [bits[0]]
    grad, moments, lstm = bits
    return [grad] + 2 * [moments] + 4 * [lstm], 2 * [moments] + 4 * [lstm] + 2 * [32]


def check(target: str, found: dict[str, dict[str, Any]]) -> None:
    limits = RECORD.get(target, {})
    for name, one in found.items():
        memory, what = one["memory"], (target, name, one)
        # The compiler gives two numbers of such a program away, so that a third one fits into a multiprocessor.
        assert one["spills"] <= (2 if name.endswith("unaligned stretches") else 0), what
        if name in limits:
            assert one["instructions"] <= limits[name]["instructions"], what
            assert one["registers"] <= limits[name]["registers"], what
        if not one["bytes"] or "unaligned" in name:
            continue
        loaded, stored = accesses(name.removesuffix(" stretches"))
        if target == "gfx942":  # a thread has four coordinates
            assert memory.get("buffer_load_dwordx4", 0) == loaded.count(32), what
        else:  # eight; what is narrower than 8 bytes are numbers that tensors have once
            assert memory.get("LDG.E.128", 0) == sum(8 * bits // 128 for bits in loaded), what
            assert memory.get("LDG.E.64", 0) >= loaded.count(8), what
            assert memory.get("STG.E.128", 0) == sum(8 * bits // 128 for bits in stored), what
            assert memory.get("STG.E.64", 0) == stored.count(8), what
            assert not [opcode for opcode in memory if re.search(r"[US](8|16)$", opcode)], what


def test_a_sample_of_kernels(tmp_path: Path) -> None:
    targets = ["sm_80", "sm_90", "gfx942"]
    found = compiled(targets, tmp_path, "--only", *SAMPLE)
    assert list(found) == targets
    for target, kernels in found.items():
        assert len(kernels) == len(SAMPLE)
        check(target, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_all_kernels(target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-kernels"):
        pytest.skip("takes minutes; --all-kernels runs it")
    check(target, compiled([target], tmp_path)[target])


def test_the_record_names_every_pass() -> None:
    assert list(RECORD) == ["sm_80", "sm_90", "sm_100", "sm_120"]
    assert all(set(SAMPLE[:3]) <= set(kernels) for kernels in RECORD.values())
