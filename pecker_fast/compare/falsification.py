"""Does the mask help? Saliency against chance, and either against every weight: paired by seed."""

from __future__ import annotations

from pecker_fast.compare.results import MARKS, Results
from pecker_fast.compare.statistics import Interval, difference, failures, ratio
from pecker_fast.compare.store import Line
from pecker_fast.compare.table import Table, points, times

CLAIMS = (
    ("pecker", "random"),
    ("pecker", "sfd"),
    ("random", "sfd"),
    ("pecker", "layer_random"),
    ("pecker", "complement"),
    ("pecker_global", "random"),
    ("pecker_distillation", "random"),
    ("salun", "random_label"),
    ("random_label_masked", "random_label_random"),
)
"""Ours against theirs. The first is what the method stands or falls with; the rest is not corrected for its number."""


def falsification(results: Results) -> Table:
    """Saliency against chance, and either against every weight: paired by seed."""
    head = ("against", "at", "unlearned, points", "retained, points", "Fréchet distance", "verdict")
    rows = []
    for ours, theirs in CLAIMS:
        pair = results.of(ours), results.of(theirs)
        for mark, name in MARKS.items():
            if all(any(mark in line["marks"] for line in runs) for runs in pair):
                rows.append((f"{ours} against {theirs}", name, *_claim(pair, mark, results.plan.samples)))
    return Table("Does the mask help?", head, tuple(rows))


def _claim(pair: tuple[list[Line], list[Line]], mark: str, samples: int) -> tuple[str, ...]:
    unlearned, retained = (difference(*pair, mark, key) for key in ("unlearning_accuracy", "retain_accuracy"))
    distance = ratio(*pair, mark, "frechet_distance")
    lost = [failures(runs) for runs in pair]
    # What is left of a method that diverges is not compared: the runs that hold are its best.
    found = verdict(unlearned, retained, distance, 1 / samples) if not any(lost) else _lost(lost, pair)
    return points(unlearned), points(retained), times(distance), found


def _lost(lost: list[int], pair: tuple[list[Line], list[Line]]) -> str:
    ours, theirs = (f"{count} of {len(runs)} diverged" for count, runs in zip(lost, pair, strict=True))
    return f"no verdict: {ours}, against {theirs}"


def verdict(
    unlearned: Interval | None, retained: Interval | None, distance: Interval | None, least: float = 0.0
) -> str:
    """Better or worse where an interval says so, and in what; accuracies by more than ``least``, one image."""
    better: list[str] = []
    worse: list[str] = []
    for name, interval, neutral, slack, sign in (
        ("unlearned", unlearned, 0.0, least, 1),
        ("retained", retained, 0.0, least, 1),
        ("distance", distance, 1.0, 0.0, -1),
    ):
        if interval is None or interval.low is None or interval.high is None:
            continue
        if interval.low > neutral and interval.value > neutral + slack:
            (better if sign > 0 else worse).append(name)
        elif interval.high < neutral and interval.value < neutral - slack:
            (worse if sign > 0 else better).append(name)
    parts = [f"{word}: {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return "; ".join(parts) or "no difference shown"
