"""The page and the table of a comparison of runs: text only, standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pecker_fast.html_page import figure_of, table_of, write_page

BEFORE = "before"
_NONE = "–"
_Run = Mapping[str, Any]


def table(metrics: Mapping[str, Any]) -> str:
    """The model before and every run as plain text, one line each, columns aligned."""
    head, *rows = _cells(metrics)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def html(path: str | os.PathLike[str], metrics: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
    """Write one page that needs nothing else: no network, no script, no other file.

    Args:
        path: The page to write.
        metrics: What ``metrics.json`` of the demo holds.
        pictures: Heading -> PNG file, which is copied into the page.

    Raises:
        FileFormatError: The page cannot be written, or a picture cannot be read.
    """
    forgotten, override = (_listed(metrics.get(key) or ()) for key in ("forget_class", "override_class"))
    body = _BODY.format(
        forgotten=escape(forgotten),
        override=escape(override or "a random retained class"),
        seed=escape(str(metrics.get("seed", _NONE))),
        table=table_of(_cells(metrics)),
        pictures="\n".join(figure_of(heading, at, _CAPTIONS.get(heading, "")) for heading, at in pictures.items()),
        meanings="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _MEANINGS.items()),
        settings=escape(json.dumps(metrics.get("settings", {}), indent=2)),
        versions=_pairs(metrics.get("versions", {})),
    )
    write_page(path, f"Forgetting {forgotten}", body)


def _cells(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Heading, then a row for the model before and for every run, as text."""
    runs = {BEFORE: metrics["before"], **metrics["runs"]} if metrics.get("before") else metrics["runs"]
    return [
        ["run", *_COLUMNS],
        *([name, *(cell(run) for cell in _COLUMNS.values())] for name, run in runs.items()),
    ]


def _number(key: str, form: str) -> Callable[[_Run], str]:
    return lambda run: _NONE if run.get(key) is None else format(run[key], form)


def _with_interval(run: _Run) -> str:
    text = f"{run['unlearning_accuracy']:.1%}"
    interval = run.get("unlearning_accuracy_ci95")
    return f"{text} [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else text


def _worst(run: _Run) -> str:
    worst = run.get("worst_after_target")
    return f"{worst['unlearning_accuracy']:.0%} / {worst['retain_accuracy']:.0%}" if worst else _NONE


_COLUMNS: dict[str, Callable[[_Run], str]] = {
    "unlearning accuracy [95 % CI]": _with_interval,
    "retain accuracy": _number("retain_accuracy", ".1%"),
    "Fréchet distance": _number("frechet_distance", ".3g"),
    "trained weights": _number("trainable_parameters", ","),
    "density": _number("density", ".1%"),
    "steps to target": _number("steps_to_target", "d"),
    "worst after": _worst,
    "seconds": _number("seconds", ".1f"),
    "FLOPs": _number("flops", ".2e"),
    "learning rate": _number("learning_rate", ".1e"),
}

_MEANINGS = {
    "Unlearning accuracy": "Share of the images asked for as a forgotten class that the judge does not "
    "recognise as one. 100 % is complete. The interval is Wilson's: it covers the number of images, not "
    "another seed.",
    "Retain accuracy": "Share of the images of other classes that the judge takes for what was asked for.",
    "Fréchet distance": "Distance between generated and real images of the retained classes in the judge's "
    "features; less is better. It is not FID, and compares only within this page.",
    "Steps to target": "First evaluation at which both accuracies are 95 % or more. "
    "“Worst after” are the lowest unlearning and retain accuracy seen from there on.",
    "Trained weights, density": "Weights of the generator that train, and their share of all. "
    "All others stay bit-identical.",
    "Seconds, FLOPs": "Time and floating-point operations of training with the choice of the mask, without "
    "evaluation. On a busy machine seconds vary from run to run; FLOPs do not.",
    "Learning rate": "Of the generator. Fewer moving weights take larger steps, so each run has its own.",
}


_CAPTIONS = {
    "Before and after": "Samples of the one-step generator from the same noise, before training and after "
    "the masked run; one row a class, the forgotten ones framed.",
    "On the way": "What was measured during the three runs, against steps and against seconds.",
    "Where the mask lies": "Share of each layer's weights that trains, in the order of the network.",
}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in values.items())


def _listed(labels: Sequence[Any]) -> str:
    *most, last = [str(label) for label in labels] or [""]
    return f"{', '.join(most)} and {last}" if most else last


_BODY = """<p>A diffusion model was made to forget class {forgotten}: asked for it, it is to draw {override} instead.
It was distilled into a one-step generator whose active weights alone train (PECKER, arXiv 2604.05634).
Three runs had the same number of steps and the same seed ({seed}): <b>masked</b> trains the weights that
matter most to the forgotten class, <b>random</b> as many weights drawn by chance, <b>dense</b> all of them.
Random is the control: what masked does no better than random is not owed to the choice of the weights.</p>
<h2>Results</h2>
<div class="wide">
{table}
</div>
<p>The judge is a small classifier trained on real images only. One seed is one sample: differences of a few
points between runs are within chance. That a judge no longer recognises a class does not prove that its
traces are gone from the weights.</p>
{pictures}
<h2>What the numbers mean</h2>
<dl>
{meanings}
</dl>
<details>
<summary>Settings</summary>
<pre>{settings}</pre>
</details>
<footer><p>{versions}</p></footer>"""
