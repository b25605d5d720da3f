"""The tables of docs/quality.md, from benchmarks/results/cpu/quality.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from statistics_of_runs import Interval, Line, at, interval, paired, ratio, target_steps, worst_retained

PUBLISHED, DENSE = "published", "dense"
MARGIN, FARTHEST = 0.02, 1.25
"""Loss of accuracy and ratio of distances that a harmless switch stays below for sure."""
JUDGED = ("unlearning_accuracy", "retain_accuracy", "frechet_distance")
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


def erasures(results: dict[str, Any]) -> str:
    """Requests from the distilled generator against one-stage dense runs, pair by pair."""
    runs = results["erasures"]["race"]
    head = ["", "steps", "seconds", "of which checks", "target met", "unlearned", "retained", "Fréchet distance"]
    rows = []
    for kind, what in (("request", "request, masked"), ("dense", "one dense run")):
        own = [line for line in runs if line["kind"] == kind]
        middle = [statistics.median(line[name] for line in own) for name in ("steps", "seconds", "checking")]
        judged = [statistics.fmean(line["final"][name] for line in own) for name in JUDGED]
        met = f"{sum(line['met'] for line in own)} of {len(own)}"
        row = [what, f"{middle[0]:g}", f"{middle[1]:.1f}", f"{middle[2]:.1f}", met]
        rows.append([*row, f"{judged[0]:.1%}", f"{judged[1]:.1%}", f"{judged[2]:.2f}"])
    missed = {(tuple(line["forget"]), line["seed"]) for line in runs if line["kind"] == "request" and not line["met"]}
    runs = [line for line in runs if (tuple(line["forget"]), line["seed"]) not in missed]
    times = _pairs(runs, "seconds")
    apart = _pairs([{**line, "training": line["seconds"] - line["checking"]} for line in runs], "training")
    start = statistics.fmean(line["start"] for line in runs)
    found = (
        f"A request takes **{1 / times.value:.1f}x** less time ({1 / times.high:.1f} to {1 / times.low:.1f}), "
        f"{1 / apart.value:.1f}x without the checks: geometric means of {len(runs) // 2} pairs, in turns on one "
        f"machine, without the {len(missed)} whose request missed the target. Dense runs that miss it count with "
        f"the seconds of all their steps. The distilled generator is at {start:.2f}."
    )
    return f"{_markdown(head, rows)}\n\n{found}"


def _pairs(runs: Sequence[Line], name: str) -> Interval:
    requests, dense = (
        {(tuple(line["forget"]), line["seed"]): line[name] for line in runs if line["kind"] == kind}
        for kind in ("request", "dense")
    )
    return ratio([requests[key] for key in requests], [dense[key] for key in requests])


def stacked(results: dict[str, Any]) -> str:
    """What the judge sees with every subset of three deltas."""
    runs = results["erasures"]["stack"]
    labels = list(runs[0]["recognised"])
    head = ["deltas applied", *(f"seen as {label}" for label in labels), "other digits retained", "Fréchet distance"]
    head.append("same bits in any order")
    rows = []
    for line in runs:
        recognised = [f"{line['recognised'][label]:.1%}" for label in labels]
        applied = ", ".join(map(str, line["deltas"])) or "none"
        same = "yes" if line["same_in_any_order"] else "NO"
        rows.append([applied, *recognised, f"{line['others']:.1%}", f"{line['frechet_distance']:.2f}", same])
    return _markdown(head, rows)


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """Arm -> whether its quality holds: a switch hurts nothing beyond its interval, a mask meets its targets."""
    found = {}
    for arm in dict.fromkeys(line["arm"] for line in results["switches"]):
        if arm != PUBLISHED:
            pairs = paired(results["switches"], arm, PUBLISHED)
            found[arm] = not _verdict(pairs, equal_steps(results, arm)).startswith("hurts")
    for arm in dict.fromkeys(line["arm"] for line in results["masked"]):
        found[arm] = _targets(results, arm) == "yes"
    return found


def _targets(results: dict[str, Any], arm: str) -> str:
    """Whether a mask of the speed table costs no more than it may, against the published recipe."""
    own = [line for line in results["masked"] if line["arm"] == arm]
    steps = statistics.median(target_steps(own))
    theirs = statistics.median(target_steps([line for line in results["switches"] if line["arm"] == PUBLISHED]))
    pairs = paired([*results["switches"], *results["masked"]], arm, PUBLISHED)
    return _met(own[0]["density"], steps / theirs, worst_retained(own), distance(pairs).value)


def _against(results: dict[str, Any], lines: Sequence[Line], reference: str, others: Sequence[Line]) -> str:
    everything = [*others, *lines]
    theirs = [line for line in everything if line["arm"] == reference]
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        pairs, faster = paired(everything, arm, reference), speed_of(results, arm)
        steps = equal_steps(results, arm)
        flops = own[0]["flops"]["step"] / theirs[0]["flops"]["step"]
        row = [arm, f"{flops:.2f}", f"{1 / faster:.2f}", _steps(statistics.median(target_steps(own)))]
        for name in ("unlearning_accuracy", "retain_accuracy"):
            row.append(f"{interval([line['final'][name] for line in own]).value:.1%}")
        if arm == reference:
            row += [f"{statistics.fmean(line['final']['frechet_distance'] for line in own):.2f}", "", ""]
        else:
            verdict = f"targets met: {_targets(results, arm)}" if others else _verdict(pairs, steps)
            row += [_times(distance(pairs)), _times(distance(pairs, steps)), verdict]
        rows.append(row)
    return _markdown(HEAD, rows)


def speed_of(results: dict[str, Any], arm: str) -> float:
    """Steps for one of the published recipe's."""
    seconds = results["machine"]["seconds_of_a_step"]
    return float(seconds[PUBLISHED] / seconds[arm])


def equal_steps(results: dict[str, Any], arm: str) -> float:
    """Steps that an arm has done when the published recipe has done ``EQUAL_SECONDS``, its masks made first."""
    machine = results["machine"]
    budget = EQUAL_SECONDS * machine["seconds_of_a_step"][PUBLISHED] - machine["seconds_of_the_masks"][arm]
    return max(0.0, float(budget / machine["seconds_of_a_step"][arm]))


def distance(pairs: Sequence[tuple[Line, Line]], steps: float | None = None) -> Interval:
    """Fréchet distances as ratios: after the last step, or when ours has done ``steps`` in equal seconds."""
    name = "frechet_distance"
    if steps is None:
        return ratio([a["final"][name] for a, _ in pairs], [b["final"][name] for _, b in pairs])
    last = pairs[0][0]["curve"][-1]["step"]
    if steps > last:
        raise ValueError(f"equal seconds: {steps:.0f} steps are needed, the runs have {last}; lower EQUAL_SECONDS")
    return ratio([at(a, steps, name) for a, _ in pairs], [at(b, EQUAL_SECONDS, name) for _, b in pairs])


def _verdict(pairs: Sequence[tuple[Line, Line]], steps: float) -> str:
    """What is worse beyond its interval; else whether all of it is within the margins for sure."""
    worse, sure = [], True
    for name, what in (("unlearning_accuracy", "unlearning"), ("retain_accuracy", "retaining")):
        apart = interval([a["final"][name] - b["final"][name] for a, b in pairs])
        worse += [f"{what} by {-apart.value:.1%}"] if apart.high < 0 else []
        sure &= apart.low >= -MARGIN
    for found, what in ((distance(pairs), "equal steps"), (distance(pairs, steps), "equal seconds")):
        worse += [f"distance at {what}"] if found.low > 1 else []
        sure &= found.high <= FARTHEST
    if worse:
        return f"hurts {', '.join(worse)}"
    return "harmless" if sure else "no harm shown"


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
