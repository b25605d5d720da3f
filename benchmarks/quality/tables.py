"""The tables of docs/quality.md, from benchmarks/results/cpu/quality.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from statistics_of_runs import Interval, Line, at, interval, paired, ratio, target_steps, worst_retained

PUBLISHED, DENSE = "published", "dense"
EQUAL_SECONDS = 40
"""Steps of the published recipe whose seconds all arms get in the comparison at equal seconds."""
HEAD = [
    "",
    "FLOPs",
    "seconds",
    "steps to target",
    "unlearned",
    "retained",
    "Fréchet distance, equal steps",
    "equal seconds",
    "verdict",
]


def switches(results: dict[str, Any]) -> str:
    """Every switch and preset against the published recipe, learning rate and all else the same."""
    return _against(results, results["switches"], PUBLISHED, [])


def masked(results: dict[str, Any]) -> str:
    """The masks of the speed table against the published dense recipe, learning rates tuned on the same grid."""
    return _against(results, results["masked"], PUBLISHED, results["switches"])


def density(results: dict[str, Any]) -> str:
    """Density and kind of mask against the dense run, learning rates tuned on the same grid."""
    lines = results["density"]
    head = [
        "",
        "density",
        "mass",
        "learning rate",
        "steps to target",
        "times dense",
        "worst retained",
        "Fréchet distance",
    ]
    head += ["met"]
    reference = [line for line in lines if line["arm"] == DENSE]
    dense_steps = statistics.median(target_steps(reference))
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        pairs = paired(lines, arm, DENSE)
        steps, times = statistics.median(target_steps(own)), distance(pairs)
        met = _met(own[0]["density"], steps / dense_steps, worst_retained(own), times.value)
        rows.append(
            [
                arm,
                f"{own[0]['density']:.3g}",
                "" if own[0]["mass"] is None else f"{statistics.fmean(line['mass'] for line in own):.2f}",
                f"{statistics.fmean(line['generator_lr'] for line in own):.2g}",
                _steps(steps),
                "" if arm == DENSE else f"{steps / dense_steps:.2f}",
                f"{worst_retained(own):.1%}",
                f"{statistics.fmean(line['final']['frechet_distance'] for line in own):.2f}"
                if arm == DENSE
                else _times(times),
                "" if arm == DENSE else met,
            ]
        )
    return _markdown(head, rows)


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    """Arm -> "harmless", or what it hurts."""
    found = {}
    for study in ("switches", "masked"):
        lines = [*results["switches"], *results[study]]
        for arm in dict.fromkeys(line["arm"] for line in results[study]):
            if arm != PUBLISHED:
                found[arm] = _verdict(paired(lines, arm, PUBLISHED), speed_of(results, arm))
    return found


def _against(results: dict[str, Any], lines: Sequence[Line], reference: str, others: Sequence[Line]) -> str:
    everything = [*others, *lines]
    theirs = [line for line in everything if line["arm"] == reference]
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        pairs, faster = paired(everything, arm, reference), speed_of(results, arm)
        flops = own[0]["flops"]["step"] / theirs[0]["flops"]["step"]
        row = [arm, f"{flops:.2f}", f"{1 / faster:.2f}", _steps(statistics.median(target_steps(own)))]
        for name in ("unlearning_accuracy", "retain_accuracy"):
            row.append(f"{interval([line['final'][name] for line in own]).value:.1%}")
        if arm == reference:
            row += [f"{statistics.fmean(line['final']['frechet_distance'] for line in own):.2f}", "", ""]
        else:
            row += [_times(distance(pairs)), _times(distance(pairs, faster)), _verdict(pairs, faster)]
        rows.append(row)
    return _markdown(HEAD, rows)


def speed_of(results: dict[str, Any], arm: str) -> float:
    seconds = results["machine"]["seconds_of_a_step"]
    return float(seconds[PUBLISHED] / seconds[arm])


def distance(pairs: Sequence[tuple[Line, Line]], faster: float | None = None) -> Interval:
    """Fréchet distances as ratios, after the last step or after equal seconds."""
    name = "frechet_distance"
    if faster is None:
        return ratio([a["final"][name] for a, _ in pairs], [b["final"][name] for _, b in pairs])
    ours = [at(a, EQUAL_SECONDS * faster, name) for a, _ in pairs]
    return ratio(ours, [at(b, EQUAL_SECONDS, name) for _, b in pairs])


def _verdict(pairs: Sequence[tuple[Line, Line]], faster: float) -> str:
    """What is worse beyond its interval."""
    worse = []
    for name, what in (("unlearning_accuracy", "unlearning"), ("retain_accuracy", "retaining")):
        if interval([a["final"][name] - b["final"][name] for a, b in pairs]).high < 0:
            worse.append(what)
    if distance(pairs).low > 1:
        worse.append("distance at equal steps")
    if distance(pairs, faster).low > 1:
        worse.append("distance at equal seconds")
    return "hurts " + ", ".join(worse) if worse else "harmless"


def _met(density: float, steps: float, worst: float, distance: float) -> str:
    missed = [] if steps <= 1.25 else ["steps"]
    missed += [] if worst >= 0.9 else ["retained"]
    missed += [] if distance <= (1.25 if density > 0.2 else 1.5) else ["distance"]
    return "yes" if not missed else "no: " + ", ".join(missed)


def _steps(steps: float) -> str:
    return "not reached" if steps == float("inf") else f"{steps:g}"


def _times(found: Interval) -> str:
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
