"""Tables of GPU runs: none without results, all rows with them, and never of a rehearsal."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

REPORT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "report.py"))
ON_GPUS = REPORT["ON_GPUS"]


def row(what, headline):
    return {
        "what": what,
        "against": "AdamW(fused=True)",
        "density": 0.1,
        "ours_ms": 0.625,
        "theirs_ms": 5.5,
        "work": "2.75 : 24.1 GB",
        "share": "99% of copy bandwidth",
        "headline": headline,
        "ratio": 8.8,
        "ours_spread": 0.012,
        "theirs_spread": 0.003,
    }


def results(rehearsal=False):
    return {
        "machine": "A card, torch 2.11.0",
        "rehearsal": rehearsal,
        "date": "2026-11-22",
        "versions": {"triton": "3.6.0"},
        "limits": {"copy": 4.3e12, "l2": 6e12, "matmul": 790e12},
        "rows": [row("first", True), row("second", False)],
        "figures": [
            {"what": "a", "against": "b", "density": 0.1, "ours": 1, "theirs": "not measured: no", "unit": "J a step"}
        ],
        "notes": ["something: left out"],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(REPORT["load"].__globals__, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "optimizer.json").write_text("{}")  # of a CPU: not looked at
    return tmp_path


def test_without_results_one_sentence_says_so(folder):
    found = REPORT["load"](ON_GPUS)
    assert found == {}
    assert REPORT["gpu_tables"](found) == REPORT["gpu_headlines"](found) == REPORT["NO_GPU"]
    assert "benchmarks/gpu.sh" in REPORT["NO_GPU"]


def test_all_rows_in_the_document_and_headlines_in_the_readme(folder):
    (folder / "card").mkdir()
    (folder / "card" / "optimizer.json").write_text(json.dumps(results()))
    found = REPORT["load"](ON_GPUS)
    tables, headlines = REPORT["gpu_tables"](found), REPORT["gpu_headlines"](found)
    line = (
        "| AdamW(fused=True) | 0.1 | 625.0 µs | 5.50 ms | **8.80x** | 1.2% | 2.75 : 24.1 GB | 99% of copy bandwidth |"
    )
    assert f"| first {line}" in tables and f"| second {line}" in tables
    assert f"| first {line}" in headlines and "second" not in headlines
    assert "* a, density 0.1: 1 J a step, b: not measured: no" in tables
    assert "* something: left out" in tables and "left out" not in headlines
    for text in (tables, headlines):
        assert "A card, torch 2.11.0, triton 3.6.0, 2026-11-22" in text
        assert "copy 4.30 TB/s" in text and "790 TFLOP/s" in text


def test_a_rehearsal_is_refused(folder):
    (folder / "card").mkdir()
    (folder / "card" / "wgrad.json").write_text(json.dumps(results(rehearsal=True)))
    with pytest.raises(SystemExit, match="rehearsal"):
        REPORT["load"](ON_GPUS)
