"""The GPU benchmarks run from end to end on a CPU, at tiny sizes: what is lent for minutes must work the first time."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import background
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    "PECKER_FAST_REHEARSE": "1",
    "PYTHON": sys.executable,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}
NOT_MEASURED = "not measured: this is a rehearsal"


def rehearse() -> tuple[subprocess.CompletedProcess, str]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--benchmark-only", "--rows", rows, "benchmarks/gpu"]
        run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        return run, rows.read_text() if rows.exists() else ""


BACKGROUND = rehearse


@pytest.fixture(scope="module")
def results() -> dict:
    run, rows = background.result(rehearse)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(rows)


def test_every_race_has_its_row(results):
    what = " | ".join(row["what"] for row in results["rows"])
    for race in (
        "masked AdamW, 16x16",
        "masked AdamW, all",
        "masked AdamW, row",
        "masked AdamW, EMA",
        "masked AdamW, bfloat16 weights",
        "masked AdamW, beta1=0",
        "score + update in one kernel",
        "host time",
        "conv3x3 20>24 @ 2x4x4, 16x16",
        "stride 2",
        "linear 40>40 @ 24, 16x16",
        "a processor",
        "threshold of",
        "saliency abs",
        "SiD loss",
        "scores of all blocks",
        "UNet step, whole",
        "UNet step, decoder",
        "distill: exact",
        "distill: fast",
        *(["sd: exact, rows 0.1 of both networks"] if importlib.util.find_spec("diffusers") else []),
    ):
        assert race in what
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in results["rows"])
    assert all(row["ours_spread"] >= 0 and row["theirs_spread"] >= 0 for row in results["rows"])


def test_what_a_cpu_cannot_measure_is_no_number(results):
    assert {figure["unit"] for figure in results["figures"]} == {"launches", "J a step", "bytes at most"}
    assert all(figure["ours"] == figure["theirs"] == NOT_MEASURED for figure in results["figures"])
    assert results["rehearsal"] is True


def test_a_result_says_what_it_was_measured_with(results):
    assert results["versions"]["torch"] == torch.__version__
    assert len(results["date"]) == 10
    assert set(results["limits"]) == {"copy", "l2", "matmul"}
    assert results["sweep"]


def test_the_script_runs_its_parts(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", tmp_path / "out", "sanitize", "sweep"]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for part in ("machine", "sweep"):
        assert f"{part}: exit status 0" in summary
    assert "shipped tiles" in summary
    native = importlib.util.find_spec("pecker_fast._C") is not None
    assert run.returncode == (0 if native else 1), run.stdout
    assert len(summary.splitlines()) <= 60
    unknown = subprocess.run([*command[:3], "selekt"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown part selekt" in unknown.stderr


def test_the_layers_of_stable_diffusion_are_all_there():
    spec = importlib.util.spec_from_file_location("stable_diffusion", ROOT / "benchmarks/gpu/stable_diffusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device("meta"):
        parameters = [p for layer in module.layers() for p in layer.parameters()]
    assert (len(parameters), sum(p.numel() for p in parameters)) == (module.TENSORS, module.PARAMETERS)
