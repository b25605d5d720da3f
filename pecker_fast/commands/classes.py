"""Classes that a command is asked for, and whether all that meet in it have the same."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pecker_fast import models
from pecker_fast.classes import Classes, ClassWarning, Labelled, check_same
from pecker_fast.errors import FileFormatError

_DIGITS = ((1, 8, 8), 10)


@dataclass(frozen=True)
class Chosen:
    """What the flags of a command name.

    Attributes:
        forget: Classes to forget.
        override: What takes their place, as it was given.
        retain: Classes that are kept; None where that was left open.
    """

    forget: tuple[int, ...]
    override: tuple[int, ...] | None
    retain: tuple[int, ...] | None


def chosen(options: argparse.Namespace, classes: Classes) -> Chosen:
    """``--forget_class``, ``--override_class`` and ``--retain_class``, by number or by name.

    Raises:
        ValueError: An unknown class, a number that may mean two, or a class that the model never saw.
    """
    found = {}
    for flag in ("forget_class", "override_class", "retain_class"):
        asked = getattr(options, flag, None)
        found[flag] = None if asked is None else classes.find(f"--{flag}", asked)
        classes.check_seen(f"--{flag}", found[flag] or ())
    return Chosen(found["forget_class"] or (), found["override_class"], found["retain_class"])


def retain_of(classes: Classes, forget: Sequence[int], asked: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Classes to keep: those that are asked for, or all others that the model ever saw; None are all others."""
    return classes.retained(forget) if asked is None and classes.unseen else asked


def classes_of(model: nn.Module) -> Classes:
    """Of a network that `pecker_fast.models` made."""
    return Classes.of_module(model) or Classes(int(model.config["num_classes"]))  # type: ignore[index]


def classes_at(folder: Path) -> Classes:
    """Of a model folder, without its weights.

    Raises:
        FileFormatError: It is missing or damaged.
    """
    return models.classes_in(models.load_config(folder))


def same_classes(sides: Mapping[str, Classes]) -> None:
    """Refuse sides whose classes differ, and say where names are missing; a text is said once.

    Args:
        sides: What each is called in messages -> its classes.

    Raises:
        FileFormatError: Two differ.
    """
    try:
        untold = check_same(sides)
    except ValueError as error:
        raise FileFormatError(str(error)) from error
    if untold is not None:
        warnings.warn(untold, ClassWarning, stacklevel=1)


def name_unseen(what: str, data: Labelled) -> Classes:
    """The classes of a data set; those without an image are told."""
    classes = Classes.of_images(data)
    tell_unseen(what, classes)
    return classes


def tell_unseen(what: str, classes: Classes) -> None:
    """Warn of classes without an image, if there are any."""
    if classes.unseen:
        text = f"not every class has an image in {what}: {classes.unseen_text()}"
        warnings.warn(f"{text}; labels begin at 0, and none of them means no class", ClassWarning, stacklevel=1)


def is_of_digits(sample_shape: Sequence[int], classes: Classes) -> bool:
    """Whether images of this shape and these classes may be the built-in digits."""
    return (tuple(sample_shape), classes.count) == _DIGITS and not classes.named
