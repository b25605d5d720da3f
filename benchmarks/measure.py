"""Interleaved races, and the rows of the table that closes a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from machines import Burst, Contestant, here

Clock: TypeAlias = Literal["device", "wall", "host"]


class Seconds(float):
    """A median.

    Attributes:
        spread: How far apart the quartiles are, as a share of the median.
    """

    spread: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Seconds:
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        seconds = cls(median)
        seconds.spread = (high - low) / median
        return seconds


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
    ours_spread: float | None = None
    theirs_spread: float | None = None

    def __post_init__(self) -> None:
        self.ratio = self.theirs_ms / self.ours_ms


@dataclass
class Figure:
    """What is not a time; a text where it could not be measured."""

    what: str
    against: str
    density: float
    ours: float | str
    theirs: float | str
    unit: str


ROWS: list[Row] = []
FIGURES: list[Figure] = []
NOTES: list[str] = []
FACTS: dict[str, object] = {}
"""What else the JSON file of a run says: versions, date, limits."""
LISTENERS: list[Callable[[], None]] = []
"""Called after every new line, so that a run that is cut short leaves what it had."""


def record(line: Row | Figure | str) -> None:
    """Add a row, a figure, or a note on what was left out and why."""
    kind: list[object] = ROWS if isinstance(line, Row) else FIGURES if isinstance(line, Figure) else NOTES
    if line not in kind:
        kind.append(line)
    for tell in LISTENERS:
        tell()


def race(contestants: dict[str, Contestant], rounds: int = 7, clock: Clock = "device") -> dict[str, Seconds]:
    """Median seconds of each contestant, all timed in turn within each round, so that noise hits them alike.

    Args:
        contestants: By name; of a ``Burst`` the seconds of one call.
        rounds: How often each is timed.
        clock: "device": what the device takes, from cold caches; "wall": host and device, caches as they are, for
            whole steps; "host": until the call returns.
    """
    machine = here()
    clocks = {"device": machine.seconds, "wall": machine.wall_seconds, "host": machine.host_seconds}
    host = {name: machine.warm(contestant) for name, contestant in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(machine.rounds(rounds)):
        for name, contestant in contestants.items():
            taken = clocks[clock](contestant, host[name])
            times[name].append(taken / (contestant.calls if isinstance(contestant, Burst) else 1))
    return {name: Seconds.of(taken) for name, taken in times.items()}
