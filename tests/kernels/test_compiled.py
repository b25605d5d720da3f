"""Every shipped configuration of every Triton kernel, compiled ahead of time for sm_80 and sm_90: no GPU is needed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import background
import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem not in ("__init__", "build"))
BUILDS = {
    f"{stem}/{b.name}": b for stem in STEMS for b in importlib.import_module(f"pecker_fast.kernels.{stem}").BUILDS
}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one program may have."""


def compile_all() -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_builds.py")]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        return subprocess.run(command, env=environment, capture_output=True, text=True)


BACKGROUND = compile_all


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    result = background.result(compile_all)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", BUILDS)
def test_machine_code_is_what_the_kernel_states(compiled, name, capability):
    build, found = BUILDS[name], compiled[f"{name}/sm_{capability}"]
    assert found["stack_bytes"] == found["local_bytes"] == 0, "spills"
    assert found["registers"] <= build.registers
    assert found["shared_bytes"] <= min(build.shared_bytes, SHARED_LIMIT[capability])
    if build.tensor_cores:
        assert found["wgmma" if capability == 90 else "mma_sync"] > 0
    if build.async_copies:
        assert found["async_copies"] and set(found["async_copies"]) == {16}
    if build.wide_loads:
        assert found["wide_loads"]
    if build.wide_accesses:
        assert found["wide_loads"] and found["wide_stores"]


def test_every_kernel_has_builds():
    assert all(importlib.import_module(f"pecker_fast.kernels.{stem}").BUILDS for stem in STEMS)
