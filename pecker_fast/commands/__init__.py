"""What each command of ``pecker-fast`` does: one file each, ``run(options) -> Outcome``.

Nothing here parses arguments or prints, and nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command has to say.

    Attributes:
        values: For machines, plain JSON values.
        text: For people; None lists ``values``.
        shown: Name of a value -> what that list has in its place.
        warning: What went wrong without harm to the rest; always told, on stderr.
        notes: What the readers of data had to say: which split was taken, what was left out.
    """

    values: Mapping[str, Any]
    text: str | None = None
    shown: Mapping[str, str] = field(default_factory=dict)
    warning: str | None = None
    notes: tuple[str, ...] = ()


def dry_run(settings: Mapping[str, Any], parameters: Mapping[str, int], writes: list[str]) -> Outcome:
    """What a command would do: resolved settings, parameter counts, and the files it would write."""
    return Outcome({"dry_run": True, "settings": settings, "parameters": parameters, "would_write": writes})
