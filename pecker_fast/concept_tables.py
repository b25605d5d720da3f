"""Measures of images, one column each: summed up before and after, by set and by neighbour, and as rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pecker_fast.detectors.detector import Pixels, Values
from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import mean_interval, wilson_interval
from pecker_fast.prompt_files import PromptSet
from pecker_fast.prompt_text import normal, tidy

CHANGE = "change"
"""Whose columns compare the images themselves, beside the detectors'."""


@dataclass(frozen=True)
class Column:
    """One measure of all images.

    Attributes:
        values: (N,) float64, NaN where there is no number.
        share: Whether they are 0 and 1.
    """

    values: Values
    share: bool

    def at(self, part: Any) -> Column:
        """Of some images."""
        return Column(self.values[part], self.share)

    def summary(self) -> dict[str, Any]:
        """How many, their share with Wilson's 95 % interval or their mean with Student's."""
        numbers = self.values[~np.isnan(self.values)].tolist()
        name, count = "share" if self.share else "mean", len(numbers)
        if not numbers:
            return {"n": 0, name: None, "ci95": [None, None]}
        if self.share:
            return {"n": count, name: sum(numbers) / count, "ci95": list(wilson_interval(int(sum(numbers)), count))}
        mean, low, high = mean_interval(numbers)
        return {"n": count, name: mean, "ci95": [low, high]}


Columns = dict[str, dict[str, Column]]
"""Detector -> measure -> column."""


def collect(columns: Columns, name: str, measured: Mapping[str, Values], positions: Sequence[int], count: int) -> None:
    """Put what a detector gave for a batch into its columns.

    Raises:
        ValueError: It is not one boolean or floating-point number an image.
        NonFiniteError: A number is infinite.
    """
    for measure, given in measured.items():
        values = np.ma.asarray(given)
        if values.shape != (len(positions),) or values.dtype.kind not in "bf":
            raise ValueError(
                f"{name}: {measure}: expected {len(positions)} booleans or floating-point numbers, "
                f"got {values.dtype} of shape {values.shape}"
            )
        numbers = np.ma.filled(values.astype(np.float64), np.nan)
        if np.isinf(numbers).any():
            raise NonFiniteError(f"{name}: {measure}: infinite for some of the images {list(positions)}")
        known = columns.setdefault(name, {})
        column = known.setdefault(measure, Column(np.full(count, np.nan), values.dtype.kind == "b"))
        column.values[positions] = numbers


def change(before: Pixels, after: Pixels) -> dict[str, Values]:
    """How far two stacks of images are apart, image by image.

    Args:
        before: (N, H, W, 3).
        after: (N, H, W, 3).

    Returns:
        "changed" (any value differs), "mean_absolute_difference" and "squared_error", of a range of 1: (N,) each.
    """
    gap = (before.astype(np.float64) - after).reshape(len(before), -1) / 255
    return {
        "changed": (gap != 0).any(1),
        "mean_absolute_difference": np.abs(gap).mean(1),
        "squared_error": np.square(gap).mean(1),
    }


def set_values(chosen: PromptSet, start: int, sides: Mapping[str, Columns]) -> dict[str, Any]:
    """A set of prompts in the result, as plain JSON values.

    Args:
        chosen: The set.
        start: Position of its first image.
        sides: Columns "after", and perhaps "before".
    """
    drawn = [(tidy(prompt.text), prompt.seed, prompt.guidance_scale) for prompt in chosen.prompts]
    everything = np.arange(start, start + len(drawn))
    values = {
        "images": len(drawn),
        "prompts": len({normal(text) for text, _, _ in drawn}),
        "seeds": list(dict.fromkeys(seed for _, seed, _ in drawn)),
        "source": chosen.source,
        "source_sha256": chosen.sha256,
        "drawn_sha256": hashlib.sha256(json.dumps(drawn).encode()).hexdigest(),
        **_compared(sides, everything),
    }
    concepts = np.array([tidy(prompt.concept or "") for prompt in chosen.prompts])
    names = [name for name in dict.fromkeys(concepts.tolist()) if name]
    if len(names) > 1:
        groups = {name: everything[concepts == name] for name in names}
        values["by_concept"] = {
            name: {"images": len(group), **_compared(sides, group)} for name, group in groups.items()
        }
    return values


def rows(prompt_sets: Mapping[str, PromptSet], sides: Mapping[str, Columns]) -> Iterator[dict[str, Any]]:
    """One mapping an image: its set, its prompt, and what was measured on it."""
    drawn = ((name, prompt) for name, chosen in prompt_sets.items() for prompt in chosen.prompts)
    for index, (name, prompt) in enumerate(drawn):
        yield {"set": name, **asdict(prompt), **{side: _at(columns, index) for side, columns in sides.items()}}


def _compared(sides: Mapping[str, Columns], part: Values) -> dict[str, Any]:
    """Every measure before and after, and the change of the images."""
    before = sides.get("before", {})
    measures = {
        name: {
            measure: _pair(before.get(name, {}).get(measure), column, part)
            for measure, column in found.items()
            if not (column.share and np.isnan(column.values[part]).all())  # a share that says nothing of these images
        }
        for name, found in sides["after"].items()
    }
    return {"measures": measures, CHANGE: _change_values(before[CHANGE], part) if CHANGE in before else None}


def _pair(before: Column | None, after: Column, part: Values) -> dict[str, Any]:
    if before is None:
        return {"before": None, "after": after.at(part).summary(), "difference": None}
    # Of the same prompts and seeds, so that its interval is narrower than those of the two suggest.
    difference = Column(after.values - before.values, share=False).at(part).summary()
    if after.share:
        difference["ci95"] = [None, None]  # Student's has no width where all differences agree, as shares' do
    return {"before": before.at(part).summary(), "after": after.at(part).summary(), "difference": difference}


def _change_values(columns: Mapping[str, Column], part: Values) -> dict[str, Any]:
    error = float(columns["squared_error"].values[part].mean())
    return {
        "changed": columns["changed"].at(part).summary(),
        "mean_absolute_difference": columns["mean_absolute_difference"].at(part).summary(),
        "psnr_db": None if error == 0 else -10 * math.log10(error),
    }


def _at(columns: Columns, index: int) -> dict[str, Any]:
    return {name: {key: _plain(column, index) for key, column in found.items()} for name, found in columns.items()}


def _plain(column: Column, index: int) -> bool | float | None:
    value = float(column.values[index])
    if math.isnan(value):
        return None
    return bool(value) if column.share else value
