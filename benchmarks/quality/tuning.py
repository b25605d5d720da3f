"""Which learning rate each arm gets: the best of those that were tried, by one rule for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

UA, RA = 0.95, 0.9
"""Unlearning and retain accuracy of the target."""


def steps_to_target(curve: Sequence[dict[str, Any]]) -> float:
    """First step at which both accuracies are there and stay; infinite if there is none."""
    reached = float("inf")
    for point in reversed(curve):
        if point["unlearning_accuracy"] < UA or point["retain_accuracy"] < RA:
            break
        reached = point["step"]
    return reached


def best_factors(lines: Sequence[dict[str, Any]], reference: str = "dense", slack: float = 1.25) -> dict[str, float]:
    """Arm -> factor of the learning rate.

    Of the rates that reach the target within ``slack`` times the steps of the reference arm at its best, the one with
    the lowest Fréchet distance; where none does, the one that is there first. The reference arm takes its lowest
    Fréchet distance of those that reach the target.
    """
    arms = dict.fromkeys(line["arm"] for line in lines)
    own = {arm: [line for line in lines if line["arm"] == arm] for arm in arms}
    best = _best(own[reference], float("inf"))
    limit = slack * steps_to_target(best["curve"])
    return {arm: _best(tried, limit)["factor"] for arm, tried in own.items() if arm != reference} | {
        reference: best["factor"]
    }


def _best(lines: Sequence[dict[str, Any]], limit: float) -> dict[str, Any]:
    steps = [steps_to_target(line["curve"]) for line in lines]
    quick = [line for line, needed in zip(lines, steps, strict=True) if needed <= limit and math.isfinite(needed)]
    if quick:
        return min(quick, key=lambda line: line["final"]["frechet_distance"])
    return min(lines, key=lambda line: (steps_to_target(line["curve"]), line["final"]["frechet_distance"]))
