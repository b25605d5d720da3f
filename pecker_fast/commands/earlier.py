"""Requests for erasure that were served before: what they changed, and which classes they were for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pecker_fast.checkpoint import read_json
from pecker_fast.delta import Delta
from pecker_fast.errors import FileFormatError

RECORD = "request.json"
"""Beside what a request left: the classes that it was for, where ``distill_config.json`` has those of all."""


@dataclass(frozen=True)
class Earlier:
    """A request that was served before, from its output folder.

    Attributes:
        folder: The folder.
        delta: What it changed.
        targets: Class that it forgot -> what takes its place; None leaves that to chance.
    """

    folder: Path
    delta: Delta
    targets: Mapping[int, int | None]

    @classmethod
    def read(cls, folder: Path) -> Earlier:
        """What ``unlearn`` wrote, or ``MaskedDistiller.save``.

        Raises:
            FileFormatError: A file is missing or damaged.
        """
        delta = Delta.load(folder / "delta")
        record = folder / RECORD
        values = read_json(record if record.is_file() else folder / "distill_config.json")
        if record.is_file() and values.get("delta") != mark_of(delta):
            raise FileFormatError(f"{record}: is of another run than the delta beside it; remove it, or ask again")
        try:
            targets = targets_of(values["forget"], values["override"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{folder}: its record of forgotten classes is damaged: {error!r}") from error
        return cls(folder, delta, targets)


def mark_of(delta: Delta) -> str:
    """What tells one delta from others."""
    return f"{delta.fingerprints.before:016x} {delta.fingerprints.after:016x}"


def targets_of(forget: Sequence[int], override: Sequence[int] | None) -> dict[int, int | None]:
    """Class -> override, of which there is one for each or one for all.

    Raises:
        ValueError: There is another number of them, or a class is named twice.
    """
    if len(set(forget)) != len(forget):
        raise ValueError(f"--forget_class: a class is named twice in {tuple(forget)}")
    if override is None:
        return dict.fromkeys(forget)
    if len(override) not in (1, len(forget)):
        raise ValueError(
            f"--override_class: expected one class, or one for each of the {len(forget)} forgotten, got {len(override)}"
        )
    each = override if len(override) == len(forget) else [override[0]] * len(forget)
    return dict(zip(forget, each, strict=True))


def resolved(label: int, targets: Mapping[int, int | None]) -> int | None:
    """What takes the place of ``label`` when its own override may be forgotten too.

    Raises:
        ValueError: Classes take the place of each other.
    """
    target, seen = targets[label], [label]
    while target is not None and target in targets:
        if target in seen:
            raise ValueError(f"--earlier: classes {' and '.join(map(str, seen))} are to take the place of each other")
        seen.append(target)
        target = targets[target]
    return target
