"""What the runs of an arm say together: means, paired ratios, intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from tuning import steps_to_target

# 97.5 % quantiles of Student's t by degrees of freedom; the normal one beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Line = dict[str, Any]
"""One run."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean of runs with Student's interval; no interval of a single run."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Geometric mean of paired ratios."""
    logs = interval([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    return Interval(*(math.exp(bound) for bound in logs))


def paired(lines: Sequence[Line], arm: str, reference: str) -> list[tuple[Line, Line]]:
    """Runs of two arms with the same classes and the same seed."""
    by_key = {(tuple(line["forget"]), line["seed"]): line for line in lines if line["arm"] == reference}
    own = [line for line in lines if line["arm"] == arm]
    return [(line, by_key[key]) for line in own if (key := (tuple(line["forget"]), line["seed"])) in by_key]


def at(line: Line, step: float, name: str) -> float:
    """What the judge said at a step, between two looks by interpolation."""
    points = line["curve"]
    if step <= points[0]["step"]:
        return float(points[0][name])
    for before, after in zip(points, points[1:], strict=False):
        if step <= after["step"]:
            share = (step - before["step"]) / (after["step"] - before["step"])
            return float(before[name] + share * (after[name] - before[name]))
    return float(points[-1][name])


def target_steps(lines: Sequence[Line]) -> list[float]:
    """Steps to a target that is kept, each run's."""
    return [steps_to_target(line["curve"]) for line in lines]


def worst_retained(lines: Sequence[Line]) -> float:
    """Lowest retain accuracy on the way, of all runs."""
    return min(point["retain_accuracy"] for line in lines for point in line["curve"])
