"""Checks that settings share: what is wrong, what was expected, what was given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_OR_NONE = " or None"
_KINDS: Mapping[str, tuple[type, Callable[[Any], bool]]] = MappingProxyType(
    {
        "an integer": (int, lambda value: True),
        "an integer >= 0": (int, lambda value: value >= 0),
        "a positive integer": (int, lambda value: value > 0),
        "an integer from 0 to 2**63 - 1": (int, lambda value: 0 <= value < 2**63),
        "a finite number": (float, lambda value: -math.inf < value < math.inf),
        "a number >= 0": (float, lambda value: 0 <= value < math.inf),
        "a positive number": (float, lambda value: 0 < value < math.inf),
        "a number in [0, 1)": (float, lambda value: 0 <= value < 1),
        "a number in (0, 1]": (float, lambda value: 0 < value <= 1),
    }
)


def is_number(value: object, kind: str) -> bool:
    """Whether a value is of a kind that has a name here, as "a number >= 0"; True and False are no numbers."""
    cls, fits = _KINDS[kind]
    return isinstance(value, int | cls) and not isinstance(value, bool) and fits(value)


def check_numbers(settings: object, kinds: Mapping[str, str]) -> None:
    """Refuse a dataclass with fields that are not of their kinds, which may end in "or None"."""
    for name, kind in kinds.items():
        value = getattr(settings, name)
        left_out = value is None and kind.endswith(_OR_NONE)
        if not left_out and not is_number(value, kind.removesuffix(_OR_NONE)):
            raise ValueError(f"{type(settings).__name__}.{name}: expected {kind}, got {value!r}")


def check_density(density: float, name: str = "density") -> None:
    """Refuse a density outside (0, 1]."""
    if not is_number(density, "a number in (0, 1]"):
        raise ValueError(f"{name}: expected the share of weights that train, in (0, 1], got {density!r}")


def to_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """A list or any other iterable as a tuple."""
    try:
        return tuple(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected a list or tuple, got {value!r}") from error


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def known_keys(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse keys that are no fields of a dataclass."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")


def check_classes(owner: str, forget: tuple[Any, ...], override: tuple[Any, ...] | None, num_classes: int) -> None:
    """Refuse classes that a model does not have, that are named twice, or that leave nothing to retain."""
    _check_known(f"{owner}.forget", forget, num_classes)
    if len(forget) == num_classes:
        raise ValueError(f"{owner}.forget: every class is forgotten; at least one must be retained")
    check_substitutes(f"{owner}.override", override, forget, num_classes)


def check_substitutes(
    name: str, substitutes: tuple[Any, ...] | None, forget: tuple[Any, ...], num_classes: int
) -> None:
    """Refuse what cannot take the place of forgotten classes: forgotten ones, unknown ones, too many or too few."""
    if substitutes is None:
        return
    _check_known(name, substitutes, num_classes, twice=True)
    if both := set(substitutes) & set(forget):
        raise ValueError(f"{name}: class {min(both)} is to be forgotten; name a retained class")
    if len(substitutes) not in (1, len(forget)):
        raise ValueError(
            f"{name}: expected one class, or one for each of the {len(forget)} forgotten, got {len(substitutes)}"
        )


def check_retained(owner: str, retain: tuple[Any, ...] | None, forget: tuple[Any, ...], num_classes: int) -> None:
    """Refuse classes to retain that a model does not have, that are named twice or forgotten, or none at all."""
    if retain is None:
        return
    _check_known(f"{owner}.retain", retain, num_classes)
    if not retain:
        raise ValueError(f"{owner}.retain: expected at least one class, or None for all that are not forgotten; got ()")
    if both := set(retain) & set(forget):
        raise ValueError(f"{owner}.retain: class {min(both)} is to be forgotten; name it once")


def _check_known(name: str, labels: tuple[Any, ...], num_classes: int, *, twice: bool = False) -> None:
    for label in labels:
        if not is_number(label, "an integer") or not 0 <= label < num_classes:
            raise ValueError(f"{name}: unknown class {label!r}; the model has classes 0 to {num_classes - 1}")
    if not twice and len(set(labels)) != len(labels):
        raise ValueError(f"{name}: a class is named twice in {labels}")


def retained_classes(retain: tuple[int, ...] | None, forget: tuple[int, ...], num_classes: int) -> tuple[int, ...]:
    """Those that are named, or all that are not forgotten."""
    if retain is not None:
        return retain
    forgotten = set(forget)
    return tuple(label for label in range(num_classes) if label not in forgotten)
