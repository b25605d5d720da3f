"""The comparison as tables: rows of text, for the terminal, Markdown and the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pecker_fast.compare import timing
from pecker_fast.compare.falsification import falsification
from pecker_fast.compare.judging import RELEARN_STEPS
from pecker_fast.compare.methods import REFERENCE
from pecker_fast.compare.results import MARKS, Results
from pecker_fast.compare.statistics import failures, mean, ratio, steps_to_target
from pecker_fast.compare.store import Line
from pecker_fast.compare.table import Table, plain, share, times

_NONE = ""


def every(results: Results) -> list[Table]:
    """All tables that have rows."""
    qualities = (quality(results, mark) for mark in MARKS)
    made = [falsification(results), *qualities, privacy(results), cost(results), rates(results), diagnostics(results)]
    return [table for table in made if table.rows]


def markdown(tables: Sequence[Table]) -> str:
    """One after the other, with their titles."""
    return "\n\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables if table.rows) + "\n"


# -- what came out ---------------------------------------------------------------------------------


def quality(results: Results, mark: str) -> Table:
    """What came out, at a mark: means of runs and half the width of their 95 % intervals."""
    head = (
        "method",
        "steps",
        "unlearned",
        "retained",
        "Fréchet distance",
        "over sfd's",
        "IS",
        "precision",
        "recall",
        "coverage",
        "steps to target",
    )
    keys = ("inception_score", "precision", "recall", "coverage")
    rows = [_before(results)] if results.before() else []
    for name in results.methods:
        runs = results.of(name)
        if not runs or mark not in runs[0]["marks"]:
            continue
        steps = f"{runs[0]['marks'][mark]}{' (its own)' if results.known[name].own_length else ''}"
        accuracies = (share(mean(runs, mark, key)) for key in ("unlearning_accuracy", "retain_accuracy"))
        reference = results.of(REFERENCE) if name != REFERENCE else []
        over = times(ratio(runs, reference, mark, "frechet_distance")) if reference else _NONE
        rest = (plain(mean(runs, mark, key)) for key in keys)
        distance = plain(mean(runs, mark, "frechet_distance"))
        rows.append((_named(name, runs), steps, *accuracies, distance, over, *rest, _target(runs)))
    return Table(f"Quality at {MARKS[mark]}", head, tuple(rows))


def _before(results: Results) -> tuple[str, ...]:
    line: Line = results.before() or {}
    point = line["equal_steps"]
    shares = (f"{point[key]:.1%}" for key in ("unlearning_accuracy", "retain_accuracy"))
    rest = (f"{point[key]:.3g}" for key in ("inception_score", "precision", "recall", "coverage"))
    return ("before", _NONE, *shares, f"{point['frechet_distance']:.3g}", _NONE, *rest, _NONE)


def _named(name: str, runs: Sequence[Line]) -> str:
    failed = failures(runs)
    return f"{name} ({failed} of {len(runs)} diverged)" if failed else name


def _target(runs: Sequence[Line]) -> str:
    """Median of the looks from which on both accuracies hold."""
    return _median([steps_to_target(line) for line in runs if "failed" not in line], "not held")


def _median(values: Sequence[float], beyond: str) -> str:
    """Of values of which some may be infinite: not seen within what was looked at."""
    if not values:
        return "failed"
    middle = statistics.median_low(values)
    return beyond if math.isinf(middle) else f"{middle:g}"


# -- what is left in the weights -------------------------------------------------------------------


def privacy(results: Results) -> Table:
    """What is left of the class in the weights, after the last step of each run."""
    head = (
        "method",
        "entropy",
        "p(forgotten)",
        "MIA AUC (of these images)",
        "TPR at 1 % FPR",
        "steps to relearn",
        "seen from other noise or weights",
    )
    before = results.before()
    rows = [_privacy("before", [{**before, "marks": {"equal_steps": 0}}])] if before else []
    for name in results.methods:
        runs = [line for line in results.of(name) if "attacks" in line]
        if runs:
            rows.append(_privacy(name, runs))
    return Table("What is left in the weights", head, tuple(rows))


def _privacy(name: str, runs: Sequence[Line]) -> tuple[str, ...]:
    entropy, left = (plain(mean(runs, _last(runs[0]), key)) for key in ("entropy", "forgotten_probability"))
    found = [line["attacks"] for line in runs if "failed" not in line["attacks"]]
    if not found:
        return (name, entropy, left, *["failed"] * 4)
    # Over seeds the images are the same: how sure one can be is a matter of their number.
    auc, low, high = (_average(found, key) for key in ("mia_auc", "mia_auc_low", "mia_auc_high"))
    bounds = _NONE if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    back = [math.inf if line["relearning_steps"] is None else line["relearning_steps"] for line in found]
    seen = statistics.fmean(max(p["recognised"] for p in line["probes"] if p["probe"] in _SHARED) for line in found)
    rate = _average(found, "mia_tpr") or 0.0
    cells = (f"{auc:.2f}{bounds}", f"{rate:.1%}", _median(back, f"more than {RELEARN_STEPS}"), f"{seen:.0%}")
    return (name, entropy, left, *cells)


_SHARED = ("noise_scale", "weights")
"""Ways of asking that generators and diffusion models have in common."""


def _average(found: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in found if line[key] is not None]
    return statistics.fmean(values) if values else None


def _last(line: Line) -> str:
    marks: dict[str, int] = line["marks"]
    return max(marks, key=marks.__getitem__)


# -- what it costs ---------------------------------------------------------------------------------


def cost(results: Results) -> Table:
    """What a run costs, timed in turns."""
    head = (
        "method",
        "trained",
        "learning rate x",
        "step",
        "over sfd's",
        "before the first",
        "FLOPs a step",
        "FLOPs before",
        "peak memory",
        "data",
    )
    timings, rows = timing.of(results.lines), []
    for name in results.methods:
        if name not in timings:
            continue
        own, reference = timings[name], timings.get(REFERENCE)
        over = f"{own['step_seconds'] / reference['step_seconds']:.2f}x" if reference else _NONE
        flops = (f"{own['flops'][key] / 1e9:.3g} G" for key in ("step", "setup"))
        seconds = f"{1e3 * own['step_seconds']:.3g} ms", over, f"{own['setup_seconds']:.2g} s"
        rate, needs = _rate(results, name), results.known[name].needs
        rows.append((name, f"{own['mask_density']:.1%}", rate, *seconds, *flops, f"{own['peak_mib']:.0f} MiB", needs))
    return Table("Cost", head, tuple(rows))


def _rate(results: Results, name: str) -> str:
    """The factor that was chosen; a star says that it is the smallest or largest that was tried."""
    factors, runs = results.plan.factors, results.of(name)
    if not runs or results.known[name].own_length:
        return _NONE
    factor = runs[0]["factor"]
    edge = len(factors) > 1 and factor in (min(factors), max(factors)) and not results.known[name].tuned_as
    return f"{factor:g}{' *' if edge else ''}"


def rates(results: Results) -> Table:
    """What the learning rates were chosen by."""
    tried = [line for line in results.lines if line["phase"] == "tuning"]
    head = ("method", *(f"x {factor:g}" for factor in results.plan.factors))
    names = dict.fromkeys(line["method"] for line in tried)
    rows = []
    for name in (name for name in results.known if name in names):
        cells = (
            _tried([line for line in tried if line["method"] == name and line["factor"] == factor])
            for factor in results.plan.factors
        )
        rows.append((name, *cells))
    return Table("Tuning: unlearned, retained, Fréchet distance", head, tuple(rows))


def _tried(runs: Sequence[Line]) -> str:
    mark = "equal_seconds" if runs and "equal_seconds" in runs[0]["marks"] else "equal_steps"
    keys = ("unlearning_accuracy", "retain_accuracy", "frechet_distance")
    found = [mean(runs, mark, key) for key in keys]
    if failures(runs) or None in found:
        return "diverged" if runs else _NONE
    ua, retain, distance = (interval.value for interval in found if interval is not None)
    return f"{ua:.0%}, {retain:.0%}, {distance:.3g}"


def diagnostics(results: Results) -> Table:
    """What the gradients of the generator's loss look like at the end of the runs."""
    keys = ("cosine", "cosine_active", "mass_forget", "mass_retain", "signal_forget", "signal_retain")
    head = (
        "method",
        "cosine forget, retain",
        "on active weights",
        "mass, forget",
        "mass, retain",
        "signal, forget",
        "signal, retain",
    )
    rows = []
    for name in results.methods:
        looked = [line for line in results.of(name) if "diagnostics" in line]
        if looked:
            rows.append((name, *(plain(mean(looked, "diagnostics", key)) for key in keys)))
    return Table("Gradients", head, tuple(rows))
