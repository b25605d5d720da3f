"""Interleaved races, and the rows of the table that closes a run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Contestant = Callable[[], object]


@dataclass
class Row:
    """One line of the closing table."""

    what: str
    against: str
    density: float
    ours_ms: float
    theirs_ms: float
    work: str  # bytes or FLOPs of ours and theirs
    share: str  # of the machine's limit
    headline: bool = False  # shown in the README; all rows are in docs/benchmarks.md
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = self.theirs_ms / self.ours_ms


ROWS: list[Row] = []


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def _scratch() -> torch.Tensor:
    return torch.ones(64 << 20)


def settle() -> None:
    """The same start for every contestant: no work under way, and no lines of the one before left in the caches."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    else:
        _scratch().sum()


def race(contestants: dict[str, Contestant], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each contestant, all timed in turn within each round, so that noise hits them alike."""
    for contestant in contestants.values():
        contestant()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            settle()
            started = time.perf_counter()
            contestant()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
