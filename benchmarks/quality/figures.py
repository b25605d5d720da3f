"""Draw docs/quality_switches.png and docs/quality_density.png from benchmarks/results/cpu/quality.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from statistics_of_runs import Interval, paired, target_steps
from tables import DENSE, PUBLISHED, distance, equal_steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu" / "quality.json"
# Okabe and Ito's palette: told apart by colour-blind readers, and by their markers in print.
_STYLES = {
    "random": ("#E69F00", "o"),
    "noise_prediction": ("#56B4E9", "v"),
    "noise_prediction, by layer": ("#0072B2", "^"),
    "distillation, by layer": ("#D55E00", "D"),
}


def draw_switches(results: dict[str, Any], path: Path) -> None:
    """Fréchet distance of every arm over the published recipe's, with intervals."""
    runs = [*results["switches"], *results["masked"]]
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in runs) if arm != PUBLISHED]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(arms) + 1.3), layout="constrained")
    for row, arm in enumerate(reversed(arms)):
        pairs = paired(runs, arm, PUBLISHED)
        _bar(axes, row + 0.13, distance(pairs), "#0072B2", "o", "equal steps" if row == 0 else None)
        faster = distance(pairs, equal_steps(results, arm))
        _bar(axes, row - 0.13, faster, "#D55E00", "D", "equal seconds" if row == 0 else None)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set(yticks=range(len(arms)), yticklabels=list(reversed(arms)), xscale="log")
    ticks = [0.5, 0.7, 1, 1.4, 2, 3]
    axes.set(xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
    axes.set_xlabel("Fréchet distance over the published recipe's")
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper right")
    _write(figure, path)


def draw_density(results: dict[str, Any], path: Path) -> None:
    """Steps to the target and Fréchet distance over the dense run's, against density, for every kind of mask."""
    lines = results["density"]
    dense = statistics.median(target_steps([line for line in lines if line["arm"] == DENSE]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, (colour, marker) in _STYLES.items():
        arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm.rpartition(" ")[0] == name]
        asked = [float(arm.rpartition(" ")[2]) for arm in arms]
        steps = [
            statistics.median(target_steps([line for line in lines if line["arm"] == arm])) / dense for arm in arms
        ]
        found = [distance(paired(lines, arm, DENSE)) for arm in arms]
        style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.5}
        left.plot(asked, steps, label=name, **style)
        right.plot(asked, [each.value for each in found], label=name, **style)
    left.axhline(1.25, color="#444444", linestyle=":", linewidth=1.2)
    right.plot([0.5, 0.2, 0.2, 0.05], [1.25, 1.25, 1.5, 1.5], color="#444444", linestyle=":", linewidth=1.2)
    for axes, what in ((left, "steps to target"), (right, "Fréchet distance")):
        axes.axhline(1, color="#444444", linewidth=1)
        axes.set(xscale="log", xlabel="density", ylabel=f"{what} over the dense run's")
        axes.set(xticks=[0.5, 0.25, 0.1, 0.05], xticklabels=["0.5", "0.25", "0.1", "0.05"])
        axes.minorticks_off()
        axes.invert_xaxis()
    left.legend(frameon=False, fontsize=9)
    _write(figure, path)


def _bar(axes: Any, row: float, found: Interval, colour: str, marker: str, label: str | None) -> None:
    axes.plot([found.low, found.high], [row, row], color=colour, linewidth=2)
    axes.plot([found.value], [row], marker, color=colour, markersize=6, label=label)


def _write(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw_switches(measured, DOCS / "quality_switches.png")
    draw_density(measured, DOCS / "quality_density.png")
