"""The comparison as tables: rows of text, for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pecker_fast.compare import timing
from pecker_fast.compare.methods import REFERENCE, Method
from pecker_fast.compare.statistics import Interval, difference, mean, ratio
from pecker_fast.compare.store import Line

_NONE = ""
MARKS = {"equal_steps": "equal steps", "equal_seconds": "equal seconds"}


@dataclass(frozen=True)
class Table:
    """Text, ready to be laid out.

    Attributes:
        title: What it is about.
        head: Column names.
        rows: Cells.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As GitHub lays it out."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def text(self) -> str:
        """Columns aligned, for the terminal."""
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        lines = (
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in (self.head, *self.rows)
        )
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Results:
    """What is kept of a comparison, and what its methods are.

    Attributes:
        lines: Timing, tuning and reported runs.
        methods: Names, in order.
        known: All methods.
    """

    lines: Sequence[Line]
    methods: tuple[str, ...]
    known: Mapping[str, Method]

    def of(self, name: str) -> list[Line]:
        """Reported runs of a method."""
        return [line for line in self.lines if line["phase"] == "reported" and line["method"] == name]

    def before(self) -> Line | None:
        """The model before anything is forgotten."""
        return next((line for line in self.lines if line["phase"] == "before"), None)


def quality(results: Results, mark: str) -> Table:
    """What came out, at a mark: means of runs with 95 % intervals."""
    head = ("method", "steps", "unlearned", "retained", "Fréchet distance", "over sfd's", "IS", "precision", "recall")
    rows = [_before(results)] if results.before() else []
    for name in results.methods:
        runs = results.of(name)
        if not runs:
            continue
        steps = runs[0]["marks"][mark]
        accuracies = (_share(mean(runs, mark, key)) for key in ("unlearning_accuracy", "retain_accuracy"))
        times = _NONE if name == REFERENCE else _times(ratio(runs, results.of(REFERENCE), mark, "frechet_distance"))
        rest = (_plain(mean(runs, mark, key)) for key in ("inception_score", "precision", "recall"))
        rows.append(
            (_named(name, runs), str(steps), *accuracies, _plain(mean(runs, mark, "frechet_distance")), times, *rest)
        )
    return Table(f"Quality at {MARKS[mark]}", head, tuple(rows))


def privacy(results: Results) -> Table:
    """What is left of the class in the weights, after the last step of each run."""
    head = (
        "method",
        "entropy",
        "p(forgotten)",
        "MIA AUC",
        "TPR at 1 % FPR",
        "steps to relearn",
        "seen from other starts",
    )
    rows = []
    for name in results.methods:
        runs = [line for line in results.of(name) if "attacks" in line]
        if not runs:
            continue
        entropy, left = (_plain(mean(runs, _last(runs[0]), key)) for key in ("entropy", "forgotten_probability"))
        found = (_plain(mean(runs, "attacks", key)) for key in ("mia_auc", "mia_tpr"))
        rows.append((name, entropy, left, *found, _relearned(runs), _seen(runs)))
    return Table("What is left in the weights", head, tuple(rows))


def cost(results: Results) -> Table:
    """What a run costs, timed in turns."""
    head = (
        "method",
        "trained",
        "learning rate x",
        "step",
        "over sfd's",
        "setup",
        "FLOPs a step",
        "peak memory",
        "images",
    )
    timings, rows = timing.of(results.lines), []
    for name in results.methods:
        if name not in timings:
            continue
        own, reference = timings[name], timings.get(REFERENCE)
        over = f"{own['step_seconds'] / reference['step_seconds']:.2f}x" if reference else _NONE
        factor = next((f"{line['factor']:g}" for line in results.of(name)), _NONE)
        rows.append(
            (
                name,
                f"{own['mask_density']:.0%}",
                factor,
                f"{1e3 * own['step_seconds']:.1f} ms",
                over,
                f"{own['setup_seconds']:.1f} s",
                f"{own['flops']['step'] / 1e9:.3g} G",
                f"{own['peak_mib']:.0f} MiB",
                results.known[name].needs,
            )
        )
    return Table("Cost", head, tuple(rows))


def falsification(results: Results) -> Table:
    """Saliency against chance, and either against every weight: paired by seed."""
    head = ("against", "at", "unlearned", "retained", "Fréchet distance", "verdict")
    rows = []
    for ours, theirs in CLAIMS:
        if not (results.of(ours) and results.of(theirs)):
            continue
        for mark, name in MARKS.items():
            pair = results.of(ours), results.of(theirs)
            unlearned = difference(*pair, mark, "unlearning_accuracy")
            retained = difference(*pair, mark, "retain_accuracy")
            distance = ratio(*pair, mark, "frechet_distance")
            found = verdict(unlearned, retained, distance)
            cells = (_points(unlearned), _points(retained), _times(distance), found)
            rows.append((f"{ours} against {theirs}", name, *cells))
    return Table("Does the mask help?", head, tuple(rows))


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
        looked = [
            {"last": line["diagnostics"][-1], "seed": line["seed"]}
            for line in results.of(name)
            if line.get("diagnostics")
        ]
        if looked:
            rows.append((name, *(_plain(mean(looked, "last", key)) for key in keys)))
    return Table("Gradients", head, tuple(rows))


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


def verdict(unlearned: Interval | None, retained: Interval | None, distance: Interval | None) -> str:
    """Better or worse where an interval says so, and in what."""
    better: list[str] = []
    worse: list[str] = []
    for name, interval, neutral, sign in (
        ("unlearned", unlearned, 0.0, 1),
        ("retained", retained, 0.0, 1),
        ("distance", distance, 1.0, -1),
    ):
        if interval is None or interval.low is None or interval.high is None:
            continue
        if interval.low > neutral:
            (better if sign > 0 else worse).append(name)
        elif interval.high < neutral:
            (worse if sign > 0 else better).append(name)
    parts = [f"{word}: {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return "; ".join(parts) or "no difference shown"


def markdown(tables: Sequence[Table]) -> str:
    """One after the other, with their titles."""
    return "\n\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables if table.rows) + "\n"


def every(results: Results) -> list[Table]:
    """All tables that have rows."""
    made = [falsification(results), *(quality(results, mark) for mark in MARKS), privacy(results), cost(results)]
    made.append(diagnostics(results))
    return [table for table in made if table.rows]


def _before(results: Results) -> tuple[str, ...]:
    line: Line = results.before() or {}
    point = line["equal_steps"]
    shares = (f"{point[key]:.1%}" for key in ("unlearning_accuracy", "retain_accuracy"))
    rest = (f"{point[key]:.3g}" for key in ("inception_score", "precision", "recall"))
    return ("before", "", *shares, f"{point['frechet_distance']:.3g}", _NONE, *rest)


def _last(line: Line) -> str:
    marks: dict[str, int] = line["marks"]
    return max(marks, key=marks.__getitem__)


def _named(name: str, runs: Sequence[Line]) -> str:
    failed = sum("failed" in line for line in runs)
    return f"{name} ({failed} of {len(runs)} diverged)" if failed else name


def _relearned(runs: Sequence[Line]) -> str:
    steps = sorted(line["attacks"]["relearning_steps"] or float("inf") for line in runs)
    middle = steps[len(steps) // 2]
    return "not in time" if middle == float("inf") else f"{middle:g}"


def _seen(runs: Sequence[Line]) -> str:
    """The start from which the forgotten class shows most, mean over runs of each run's worst."""
    worst = [max((probe["recognised"] for probe in line["attacks"]["probes"]), default=None) for line in runs]
    shares = [share for share in worst if share is not None]
    return f"{sum(shares) / len(shares):.0%}" if shares else _NONE


def _plain(interval: Interval | None) -> str:
    return _mean(interval, "{:.3g}")


def _share(interval: Interval | None) -> str:
    return _mean(interval, "{:.1f}%", 100)


def _points(interval: Interval | None) -> str:
    return _mean(interval, "{:+.1f}", 100)


def _mean(interval: Interval | None, form: str, scale: float = 1) -> str:
    """A mean and half the width of its interval."""
    if interval is None:
        return "failed"
    value = form.format(scale * interval.value)
    if interval.low is None or interval.high is None:
        return value
    half = (
        form.replace("+", "").replace("%", "").replace(".3g", ".2g").format(scale * (interval.high - interval.low) / 2)
    )
    return f"{value} ± {half}"


def _times(interval: Interval | None) -> str:
    """A ratio and its bounds, which are not as far from it on both sides."""
    if interval is None:
        return "failed"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}x"
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"
