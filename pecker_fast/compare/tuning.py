"""Which learning rate each method gets: the best of those that were tried, by one rule for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pecker_fast.compare.store import Line

UA, RETAIN = 0.95, 0.9
"""Unlearning and retain accuracy that a rate must reach."""


def best_factors(lines: Sequence[Line], factors: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Method -> factor: judged at equal seconds (at equal steps without any), over all tuning runs at that rate.

    Of the rates whose worst run reaches the target, the one with the lowest mean Fréchet distance; where none does, the
    one whose worst accuracy, of unlearning and retaining, is highest. With one rate there is no choice.

    Raises:
        ValueError: A method has no tuning run.
    """
    if len(factors) == 1:
        return dict.fromkeys(names, factors[0])
    tried = [line for line in lines if line["phase"] == "tuning"]
    chosen = {}
    for name in names:
        own = [factor for factor in factors if any(_of(line, name, factor) for line in tried)]
        if not own:
            raise ValueError(f"{name}: no tuning run; its learning rate is not chosen yet")
        chosen[name] = max(own, key=lambda factor: _rank([line for line in tried if _of(line, name, factor)]))  # noqa: B023
    return chosen


def _of(line: Line, name: str, factor: float) -> bool:
    return bool(line["method"] == name and line["factor"] == factor)


def _rank(lines: Sequence[Line]) -> tuple[bool, float]:
    if any("failed" in line for line in lines):
        return False, -math.inf
    found: list[Mapping[str, float]] = [line.get("equal_seconds") or line["equal_steps"] for line in lines]
    ua, retain = (min(point[name] for point in found) for name in ("unlearning_accuracy", "retain_accuracy"))
    if ua >= UA and retain >= RETAIN:
        return True, -fmean(point["frechet_distance"] for point in found)
    return False, min(ua, retain)
