"""What the runs of a method say together: means, paired ratios and differences, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pecker_fast.compare.store import Line
from pecker_fast.compare.tuning import RETAIN, UA
from pecker_fast.metrics import mean_interval


class Interval(NamedTuple):
    """An estimate and its 95 % interval, None where one run alone gives none."""

    value: float
    low: float | None
    high: float | None


def at(line: Line, mark: str, name: str) -> float | None:
    """A figure of a run at a mark; None where it failed."""
    value = line.get(mark, {}).get(name)
    return None if value is None else float(value)


def mean(lines: Sequence[Line], mark: str, name: str) -> Interval | None:
    """Of the runs that did not fail; None if all did."""
    values = [value for line in lines if (value := at(line, mark, name)) is not None]
    return Interval(*mean_interval(values)) if values else None


def difference(ours: Sequence[Line], theirs: Sequence[Line], mark: str, name: str) -> Interval | None:
    """Mean of paired differences, run by run of the same seed."""
    pairs = _paired(ours, theirs, mark, name)
    return Interval(*mean_interval([a - b for a, b in pairs])) if pairs else None


def ratio(ours: Sequence[Line], theirs: Sequence[Line], mark: str, name: str) -> Interval | None:
    """Geometric mean of paired ratios."""
    pairs = [(a, b) for a, b in _paired(ours, theirs, mark, name) if a > 0 and b > 0]
    if not pairs:
        return None
    value, low, high = mean_interval([math.log(a / b) for a, b in pairs])
    return Interval(math.exp(value), None if low is None else math.exp(low), None if high is None else math.exp(high))


def steps_to_target(line: Line) -> float:
    """First look at which both accuracies are there and stay; infinite if there is none."""
    reached = math.inf
    for point in reversed(line["curve"]):
        if point["unlearning_accuracy"] < UA or point["retain_accuracy"] < RETAIN:
            break
        reached = point["step"]
    return reached


def failures(lines: Sequence[Line]) -> int:
    """Runs that diverged."""
    return sum("failed" in line for line in lines)


def _paired(ours: Sequence[Line], theirs: Sequence[Line], mark: str, name: str) -> list[tuple[float, float]]:
    other = {line["seed"]: at(line, mark, name) for line in theirs}
    pairs = ((at(line, mark, name), other.get(line["seed"])) for line in ours)
    return [(a, b) for a, b in pairs if a is not None and b is not None]
