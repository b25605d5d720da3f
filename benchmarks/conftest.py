"""What all benchmarks share: the machine's own limits, and one table at the end."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from measure import ROWS, race


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes here."""
    source = torch.empty(64 << 20, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    seconds = race({"copy": lambda: target.copy_(source)}, rounds=7)["copy"]
    return 2 * source.nbytes / seconds


@pytest.fixture(scope="session")
def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a large float32 matmul here."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return 2 * n**3 / race({"matmul": lambda: a @ b})["matmul"]


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table closes the run instead


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{machine()}; interleaved medians; ratio = theirs / ours")
    head = ("what", "against", "density", "ours ms", "theirs ms", "ratio", "work, ours : theirs", "share of limit")
    lines = [head] + [
        (
            r.what,
            r.against,
            f"{r.density:.3g}",
            f"{r.ours_ms:.1f}",
            f"{r.theirs_ms:.1f}",
            f"{r.ratio:.2f}x",
            r.work,
            r.share,
        )
        for r in ROWS
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if folder := terminalreporter.config.getoption("--rows"):
        path = Path(folder)
        path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in ROWS]}, indent=2) + "\n")
        write(f"written to {path}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", help="also write the closing table to this JSON file")


def machine() -> str:
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"
