"""What a comparison found: the lines of what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pecker_fast.compare.methods import Method
from pecker_fast.compare.plan import Job, Plan
from pecker_fast.compare.store import Line

MARKS = {"equal_steps": "equal steps", "equal_seconds": "equal seconds"}


@dataclass(frozen=True)
class Results:
    """What a comparison found.

    Attributes:
        lines: Timing, tuning and reported runs of what is asked for.
        plan: What was asked for.
        known: All methods.
    """

    lines: Sequence[Line]
    plan: Plan
    known: Mapping[str, Method]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, in order."""
        return self.plan.methods

    def of(self, name: str) -> list[Line]:
        """Reported runs of a method."""
        return [line for line in self.lines if line["phase"] == "reported" and line["method"] == name]

    def before(self) -> Line | None:
        """The model before anything is forgotten."""
        return next((line for line in self.lines if line["phase"] == "before"), None)


def selected(lines: Sequence[Line], jobs: Sequence[Job]) -> list[Line]:
    """The lines of these jobs, each once, and all that are of no run."""
    runs = {json.dumps(job.key): job for job in jobs}
    found: dict[str, Line] = {}
    for line in lines:
        key = json.dumps({name: line.get(name) for name in Job.__dataclass_fields__})
        if line["phase"] != "reported":
            found[f"{len(found)}"] = line
        elif key in runs:
            found.setdefault(key, line)
    return list(found.values())
