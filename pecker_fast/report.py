"""What a comparison of runs looks like: pictures, a table for the terminal, and one self-contained page.

Needs matplotlib, which is imported only when a picture is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecker_fast.report_page import html, table

__all__ = ["before_after", "curves", "html", "new_figure", "saliency", "table", "write_figure", "write_report"]

StrPath = str | os.PathLike[str]

# Okabe and Ito's palette: told apart by colour-blind readers, and by their dashes in print.
_COLOURS = {"masked": "#0072B2", "random": "#E69F00", "dense": "#444444"}
_DASHES = {"masked": "-", "random": "--", "dense": ":"}
_MARKED = "#D55E00"
_METRICS = {
    "unlearning_accuracy": "unlearning accuracy",
    "retain_accuracy": "retain accuracy",
    "frechet_distance": "Fréchet distance",
}
_DPI = 150
_GAP = 0.14  # between two images, as a share of their size


def before_after(
    path: StrPath, before: Tensor, after: Tensor, forget: Sequence[int], class_names: Sequence[str]
) -> None:
    """Draw samples of the same noise before (left) and after (right), one row a class, forgotten rows framed.

    Args:
        path: The PNG to write.
        before: (classes, samples, C, H, W) in [-1, 1], C being 1 or 3.
        after: Of the same shape.
        forget: Forgotten classes.
        class_names: One name a class.

    Raises:
        ValueError: Shapes differ or do not fit ``class_names``.
        ImportError: matplotlib is not installed.
    """
    if before.shape != after.shape or before.ndim != 5 or len(before) != len(class_names):
        raise ValueError(
            f"before and after: expected two tensors of shape ({len(class_names)}, samples, C, H, W), "
            f"got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    classes, samples, _, height, width = before.shape
    row, column = height + _gap(height), width + _gap(width)
    half_width = 3.6
    figure = new_figure((2 * half_width + 1.3, half_width * classes * row / (samples * column) + 0.4))
    from matplotlib.patches import Rectangle

    for index, (title, images) in enumerate({"before": before, "after": after}.items()):
        axes = figure.add_subplot(1, 2, 1 + index)
        grid = _mosaic(images)
        # Edges at whole pixels: row i of images starts at i * row.
        axes.imshow(grid, extent=(0, grid.shape[1], grid.shape[0], 0), interpolation="nearest")
        axes.set_title(title, fontsize=13, fontweight="bold")
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=12)
        _name_rows(axes, forget, class_names if index == 0 else [""] * classes, row, height)
        for i in forget:
            rim = _gap(height) / 2
            corner, size = (-rim, i * row - rim), (grid.shape[1] + 2 * rim, height + 2 * rim)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_MARKED, linewidth=3, clip_on=False))
    write_figure(figure, path)


def curves(path: StrPath, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw what each run measured on its way, against steps and against seconds.

    Args:
        path: The PNG to write.
        runs: Name of the run -> its points, each with "step", "seconds", "unlearning_accuracy",
            "retain_accuracy" and "frechet_distance".

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure((9, 8.4))
    grid = figure.subplots(3, 2, sharex="col", sharey="row")
    for row, (metric, title) in zip(grid, _METRICS.items(), strict=True):
        for axes, unit in zip(row, ("step", "seconds"), strict=True):
            for name, points in runs.items():
                axes.plot(
                    [point[unit] for point in points],
                    [point[metric] for point in points],
                    label=name,
                    color=_COLOURS.get(name),
                    linestyle=_DASHES.get(name, "-"),
                    linewidth=2,
                    marker="o",
                    markersize=3,
                )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(title, fontsize=11)
        if metric == "frechet_distance":
            row[0].set_yscale("log")
            row[0].yaxis.set_major_formatter("{x:g}")
            row[0].yaxis.set_minor_formatter("{x:g}")
        else:
            row[0].set_ylim(-0.04, 1.04)
    grid[-1][0].set_xlabel("steps")
    grid[-1][1].set_xlabel("seconds of training, the mask included")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False, fontsize=11)
    write_figure(figure, path)


def saliency(path: StrPath, densities: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the share of active weights of every layer, in the order of the network.

    Args:
        path: The PNG to write.
        densities: Name of the run -> name of each weight -> its active share. A layer's bar is that of its
            ``weight``; a bias is too small to matter.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = {name: _by_layer(shares) for name, shares in densities.items()}
    names = list(next(iter(layers.values()), {}))
    figure = new_figure((8.5, 1.6 + 0.18 * len(names)))
    axes = figure.add_subplot()
    thickness = 0.8 / max(1, len(layers))
    for index, (run, shares) in enumerate(layers.items()):
        places = [i + (index - (len(layers) - 1) / 2) * thickness for i in range(len(names))]
        values = [100 * shares.get(name, 0.0) for name in names]
        axes.barh(places, values, height=thickness, label=run, color=_COLOURS.get(run))
    axes.set_yticks(range(len(names)), names, fontsize=8, family="monospace")
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.set_xlabel("active share of the layer's weights")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=max(1, len(layers)), frameon=False, fontsize=11)
    write_figure(figure, path)


def write_report(
    folder: StrPath,
    metrics: Mapping[str, Any],
    before: Tensor,
    after: Tensor,
    curves_by_run: Mapping[str, Sequence[Mapping[str, Any]]],
    densities: Mapping[str, Mapping[str, float]],
    class_names: Sequence[str],
) -> None:
    """Write ``report.html`` and its pictures, ``before_after.png`` and the like, into a folder.

    Args:
        folder: Where to; it exists.
        metrics: What ``metrics.json`` of the demo holds.
        before: Samples before, as ``before_after`` takes them.
        after: Samples of the masked run, from the same noise.
        curves_by_run: As ``curves`` takes them.
        densities: As ``saliency`` takes them.
        class_names: One name a class.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    before_after(folder / "before_after.png", before, after, metrics["forget_class"], class_names)
    curves(folder / "curves.png", curves_by_run)
    saliency(folder / "saliency.png", densities)
    pictures = {
        "Before and after": folder / "before_after.png",
        "On the way": folder / "curves.png",
        "Where the mask lies": folder / "saliency.png",
    }
    html(folder / "report.html", metrics, pictures)


def new_figure(inches: tuple[float, float]) -> Any:
    """A figure of its own, without pyplot: no window system and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing pictures needs matplotlib, which is not installed; run: pip install pecker_fast[demo]"
        ) from error
    return Figure(figsize=inches, dpi=_DPI, layout="constrained")


def write_figure(figure: Any, path: StrPath) -> None:
    """Write a PNG."""
    figure.savefig(path, format="png", facecolor="white")


def _name_rows(axes: Any, forget: Sequence[int], names: Sequence[str], row: int, height: int) -> None:
    labels = [f"forgotten: {name}" if name and i in forget else name for i, name in enumerate(names)]
    axes.set_yticks([i * row + height / 2 for i in range(len(names))], labels)
    for i in forget:
        axes.get_yticklabels()[i].set(color=_MARKED, fontweight="bold")


def _gap(size: int) -> int:
    return max(1, round(_GAP * size))


def _mosaic(images: Tensor) -> npt.NDArray[np.float32]:
    """(rows, columns, C, H, W) in [-1, 1] as one (height, width, 3) image in [0, 1] with white gaps."""
    rows, columns, channels, height, width = images.shape
    row, column = height + _gap(height), width + _gap(width)
    grid = np.ones((rows * row - _gap(height), columns * column - _gap(width), 3), dtype=np.float32)
    pixels = images.detach().float().cpu().clamp(-1, 1).add(1).div(2).permute(0, 1, 3, 4, 2).numpy()
    for i in range(rows):
        for j in range(columns):
            grid[i * row : i * row + height, j * column : j * column + width] = pixels[i, j]
    return grid


def _by_layer(shares: Mapping[str, float]) -> dict[str, float]:
    """Active share of each module's ``weight``, or of what it has instead, in the order of the network."""
    layers: dict[str, float] = {}
    for name, share in shares.items():
        module, _, own = name.rpartition(".")
        if own == "weight" or module not in layers:
            layers[module] = share
    return layers
