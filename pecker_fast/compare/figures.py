"""The comparison as pictures: what came out, how it came about, and what the samples look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pecker_fast.compare import timing
from pecker_fast.compare.results import Results
from pecker_fast.compare.statistics import Interval, mean
from pecker_fast.compare.store import Line
from pecker_fast.data.npz import read_arrays
from pecker_fast.report import new_figure, write_figure

_FIGURES = (
    ("unlearning_accuracy", "unlearning accuracy"),
    ("retain_accuracy", "retain accuracy"),
    ("frechet_distance", "Fréchet distance"),
)
# Okabe and Ito's palette, for those that are asked about first; all others are grey.
_COLOURS = {
    "sfd": "#444444",
    "pecker": "#0072B2",
    "random": "#E69F00",
    "complement": "#CC79A7",
    "layer_random": "#009E73",
}
_COLOURS |= {"salun": "#D55E00", "random_label": "#56B4E9"}
_GREY = "#999999"
_MARKERS = {"equal_steps": "o", "equal_seconds": "s"}


def write(results: Results, folder: Path, class_names: Sequence[str], forget: Sequence[int]) -> dict[str, Path]:
    """Draw what there is; heading -> PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = [name for name in results.methods if any("equal_seconds" in line for line in results.of(name))]
    pictures: dict[str, Path] = {}
    if not names:
        return pictures
    pictures["What came out"] = _points(results, names, folder / "quality.png")
    pictures["On the way"] = _curves(results, names, folder / "curves.png")
    samples = {name: path for name in ("before", *names) if (path := folder / "samples" / f"{name}.npz").exists()}
    if samples:
        pictures["Samples"] = _samples(samples, folder / "samples.png", class_names, forget)
    return pictures


def _points(results: Results, names: Sequence[str], path: Path) -> Path:
    """One row a method: means and intervals at both marks."""
    drawn = new_figure((11, 1.6 + 0.36 * len(names)))
    for axes, (key, title) in zip(drawn.subplots(1, 3, sharey=True), _FIGURES, strict=True):
        for row, name in enumerate(names):
            for shift, (mark, marker) in zip((-0.14, 0.14), _MARKERS.items(), strict=True):
                _point(axes, mean(results.of(name), mark, key), row + shift, _COLOURS.get(name, _GREY), marker)
        axes.set_title(title, fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "frechet_distance":
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            axes.set_xlim(None, 1.02)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    labels = ("equal steps", "equal seconds")
    handles = [
        axes.plot([], [], marker, color=_GREY, label=label)[0] for marker, label in zip("os", labels, strict=True)
    ]
    drawn.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    write_figure(drawn, path)
    return path


def _point(axes: Any, found: Interval | None, height: float, colour: str, marker: str) -> None:
    if found is None:
        return
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [height, height], color=colour, linewidth=2, alpha=0.6)
    axes.plot(found.value, height, marker, color=colour, markersize=6)


def _curves(results: Results, names: Sequence[str], path: Path) -> Path:
    """Means over seeds against the seconds that the steps take, timed in turns, the setup included."""
    timings = timing.of(results.lines)
    drawn = new_figure((9, 9))
    rows = drawn.subplots(3, 1, sharex=True)
    for name in [name for name in names if name in _COLOURS]:
        own, runs = timings[name], [line for line in results.of(name) if "failed" not in line]
        for axes, (key, title) in zip(rows, _FIGURES, strict=True):
            steps, values = _mean_curve(runs, key)
            seconds = [own["setup_seconds"] + step * own["step_seconds"] for step in steps]
            axes.plot(seconds, values, marker=".", linewidth=2, color=_COLOURS[name], label=name)
            axes.set_ylabel(title)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_yscale("log")
    _plain_ticks(rows[-1].yaxis)
    rows[-1].set_xlabel("seconds of training, what comes before it included")
    handles, labels = rows[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    write_figure(drawn, path)
    return path


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _mean_curve(runs: Sequence[Line], key: str) -> tuple[list[int], list[float]]:
    steps = sorted({point["step"] for line in runs for point in line["curve"]})
    values = {step: [p[key] for line in runs for p in line["curve"] if p["step"] == step] for step in steps}
    return steps, [fmean(values[step]) for step in steps]


def _samples(files: Mapping[str, Path], path: Path, class_names: Sequence[str], forget: Sequence[int]) -> Path:
    """One row a method, one column a class, from the same noise."""
    drawn = new_figure((1.8 + 0.55 * len(class_names), 0.5 + 0.55 * len(files)))
    grid = drawn.subplots(len(files), len(class_names), squeeze=False)
    for row, (name, file) in zip(grid, files.items(), strict=True):
        images = read_arrays(file)["images"]
        for label, axes in enumerate(row):
            picture = images[label]
            axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set(visible=label in forget, color="#D55E00", linewidth=2.5)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axes, name in zip(grid[0], class_names, strict=True):
        axes.set_title(name, fontsize=9)
    write_figure(drawn, path)
    return path
