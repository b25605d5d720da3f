"""Checks that settings share: what is wrong, what was expected, what was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def check_density(density: float) -> None:
    """Refuse a density outside (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density: expected the share of weights that train, in (0, 1], got {density!r}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def positive_int(name: str, value: object) -> None:
    """Refuse anything but an integer from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def known_keys(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse keys that are no fields of a dataclass."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
