"""The comparison as one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pecker_fast.compare.results import Results
from pecker_fast.compare.table import Table
from pecker_fast.html_page import figure_of, table_of, write_page


def write(
    path: Path, results: Results, tables: Sequence[Table], pictures: Mapping[str, Path], settings: Mapping[str, Any]
) -> None:
    """Write ``report.html``.

    Raises:
        FileFormatError: It cannot be written, or a picture cannot be read.
    """
    forget = settings["forgotten"]
    what = "".join(f"<dt>{escape(name)}</dt><dd>{escape(results.known[name].about)}</dd>" for name in results.methods)
    body = [
        f"<p>{escape(_INTRODUCTION.format(forget=forget, seeds=len(settings['seeds']), task=settings['task']))}</p>",
        *(f'<h2>{escape(table.title)}</h2>\n<div class="wide">\n{_laid_out(table)}\n</div>' for table in tables),
        *(figure_of(heading, picture, _CAPTIONS.get(heading, "")) for heading, picture in pictures.items()),
        f"<h2>The methods</h2>\n<dl>{what}</dl>",
        f"<h2>What the numbers mean</h2>\n<dl>{_meanings()}</dl>",
        f"<details><summary>Settings</summary><pre>{escape(json.dumps(settings, indent=2))}</pre></details>",
    ]
    write_page(path, f"Forgetting {settings['task']} {forget}: {len(results.methods)} methods", "\n".join(body))


def _laid_out(table: Table) -> str:
    return table_of([table.head, *table.rows])


def _meanings() -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _MEANINGS.items())


_INTRODUCTION = (
    "Every method made the same model of {task} forget class {forget}, with {seeds} seeds. Learning rates were chosen "
    "for each on the same grid, with other seeds than those reported. Equal steps are as many as sfd takes, equal "
    "seconds as many as its seconds are good for, with all that comes before the first step. Intervals are Student's, "
    "95 %; differences and ratios are paired by seed, and there are many: the question that this page is about is the "
    "first one, and the others are not corrected for their number."
)
_CAPTIONS = {
    "What came out": "Means over seeds with 95 % intervals: circles at equal steps, squares at equal seconds.",
    "On the way": "Means over seeds, of a quarter of the images that the tables have, which makes distances larger. "
    "Diffusion models start from the model that is to forget, generators from a step of it.",
    "Samples": "From the same noise in every row; the forgotten classes are framed.",
}
_MEANINGS = {
    "Unlearned": "Share of the images asked for as a forgotten class that the judge takes for none.",
    "Retained": "Share of the images of other classes that the judge takes for what was asked for.",
    "Fréchet distance": "Of the retained classes' features, generated against real, in the judge's features: not FID.",
    "IS, precision, recall": "Of the retained classes, in the judge's predictions and features.",
    "Entropy, p(forgotten)": "Of the judge's prediction, in nats, and what it leaves to the forgotten classes.",
    "MIA AUC": "How well the model's noise prediction tells images of the forgotten class that the original model was "
    "trained on from images that it never saw: 0.5 is blind. The interval is that of these images. Where it holds 0.5 "
    "before anything is forgotten, this attack cannot show anything.",
    "Steps to relearn": "Steps of training on ten images of the class until the judge sees it in half of the samples; "
    " compare with retrain, which never knew it.",
    "Seen from other noise or weights": "The largest share of the forgotten class that the judge sees when sampling "
    "starts from smaller or larger noise, or has the weights without their running average.",
    "Learning rate x": "The factor that was chosen; a star marks the end of the grid.",
    "Cosine, mass, signal": "Of the gradients of the generator's loss on forgotten and on retained classes: how they "
    "lie to each other, how much of their magnitude is on active weights, how much of them batches agree on.",
}
