"""What all benchmarks share: the machine's own limits, and one table at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from backends import described, fast_only
from machines import REHEARSAL, here
from measure import FACTS, FIGURES, LISTENERS, NOTES, ROWS, Figure, race


@pytest.fixture(scope="session")
def device() -> torch.device:
    return here().device


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


@pytest.fixture(scope="session", autouse=True)
def _fast_backends() -> Iterator[None]:
    """No benchmark times the reference by accident; a rehearsal times nothing."""
    if REHEARSAL:
        yield
    else:
        with fast_only():
            yield


def pytest_report_header() -> list[str]:
    return described()


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table closes the run instead
    if folder := config.getoption("--rows"):
        LISTENERS.append(lambda: write_rows(Path(folder)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", help="also write the closing table to this JSON file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if ROWS:
        write_table(write)
    for line in described():
        write(line)
    for figure in FIGURES:
        write(describe(figure))
    if (ROWS or FIGURES) and (folder := terminalreporter.config.getoption("--rows")):
        write_rows(Path(folder))
        write(f"written to {folder}")


def describe(figure: Figure) -> str:
    ours, theirs = (v if isinstance(v, str) else f"{v:,.4g}" for v in (figure.ours, figure.theirs))
    return f"{figure.what}, density {figure.density:.3g}: {ours} {figure.unit}, {figure.against}: {theirs}"


def write_table(write: Callable[[str], None]) -> None:
    write("")
    write(f"{here().name}; interleaved medians; ratio = theirs / ours")
    head = ("what", "against", "density", "ours ms", "theirs ms", "ratio", "work, ours : theirs", "share of limit")
    digits = 1 if here().device.type == "cpu" else 3
    lines = [head] + [
        (
            r.what,
            r.against,
            f"{r.density:.3g}",
            f"{r.ours_ms:.{digits}f}",
            f"{r.theirs_ms:.{digits}f}",
            f"{r.ratio:.2f}x",
            r.work,
            r.share,
        )
        for r in ROWS
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_rows(path: Path) -> None:
    """All lines so far; fields that were not measured are left out."""
    rows = [{name: value for name, value in asdict(row).items() if value is not None} for row in ROWS]
    more = {"figures": [asdict(figure) for figure in FIGURES], "notes": NOTES} if FACTS or FIGURES or NOTES else {}
    write_json(path, {"machine": here().name, **FACTS, "rows": rows, **more})


def write_json(path: Path, contents: object) -> None:
    """In one step, so that whoever reads it finds a whole file."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(contents, indent=2) + "\n")
    aside.replace(path)
