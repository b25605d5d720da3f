"""The classes of a model, a judge or a data set: what they are called, and which of them were never seen.

Two that meet must mean the same by a number: `check_same` compares names, and numbers alone only where names are
missing. What people call a class is looked up by `Classes.find`.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pecker_fast.errors import PeckerFastWarning

ClassLabel = int | str
"""A class as it is asked for: its number, or its name."""

_ATTRIBUTE = "_pecker_classes"
"""Where a module keeps its classes; copies of the module have them too."""
_NAMES, _UNSEEN = "class_names", "classes_without_images"
CLASS_KEYS = frozenset((_NAMES, _UNSEEN))
"""What ``to_dict`` may have."""
_NUMBERED = re.compile(r"([0-9]+)(?:[\W_].*)?", re.DOTALL)
"""A name that is a number, or begins with one as ``0_airplane`` does."""
_LISTED = 20


class ClassWarning(PeckerFastWarning):
    """Something about classes that is worth knowing, and stops nothing: no images, or no names to compare."""


class Labelled(Protocol):
    """What is asked of an ``ImageData``."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        ...


@dataclass(frozen=True)
class Classes:
    """Classes by their numbers, 0 to ``count - 1``.

    Attributes:
        count: How many there are.
        names: One a class; None where they are not known, as in folders of older versions.
        unseen: Classes of which there was not one image. A model that was trained so knows nothing of them.

    Raises:
        ValueError: Names or numbers do not fit ``count``, or two classes have one name.
    """

    count: int
    names: tuple[str, ...] | None = None
    unseen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.names is not None:
            texts = all(isinstance(name, str) and name for name in self.names)
            if not texts or len(set(self.names)) != len(self.names) or len(self.names) != self.count:
                raise ValueError(
                    f"{_NAMES}: expected {self.count} different names, one a class, got {str(self.names)[:200]}"
                )
        if not all(type(label) is int and 0 <= label < self.count for label in self.unseen):
            raise ValueError(f"{_UNSEEN}: expected some of the classes 0 to {self.count - 1}, got {self.unseen}")

    # -- where they come from ----------------------------------------------------------------------

    @classmethod
    def of_images(cls, data: Labelled) -> Classes:
        """Those of labelled images."""
        count = len(data.class_names)
        seen = set(data.labels.unique().tolist())
        return cls(count, data.class_names, tuple(label for label in range(count) if label not in seen))

    @classmethod
    def of_module(cls, module: nn.Module) -> Classes | None:
        """What ``put_on`` left; None where nobody did."""
        found: Classes | None = vars(module).get(_ATTRIBUTE)
        return found

    def put_on(self, module: nn.Module) -> None:
        """Let a network carry them: its copies have them, and its folder is written with them."""
        vars(module)[_ATTRIBUTE] = self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], count: int) -> Classes:
        """From what ``to_dict`` gave; keys that are missing leave names unknown and all classes seen.

        Raises:
            ValueError: They are damaged, or do not fit ``count``.
        """
        names, unseen = values.get(_NAMES), values.get(_UNSEEN, [])
        if not isinstance(names, list | None) or not isinstance(unseen, list):
            raise ValueError(f"{_NAMES}, {_UNSEEN}: expected lists, got {names!r:.80} and {unseen!r:.80}")
        return cls(count, None if names is None else tuple(names), tuple(unseen))

    @classmethod
    def listed_in(cls, values: Mapping[str, Any]) -> Classes | None:
        """From what ``to_dict`` gave, where nothing else says how many there are; None if there are no names.

        Raises:
            ValueError: They are damaged.
        """
        names = values.get(_NAMES)
        return None if names is None else cls.from_dict(values, len(names) if isinstance(names, list) else 0)

    def to_dict(self) -> dict[str, Any]:
        """Entries of a ``config.json``; what is not known is left out."""
        names = {} if self.names is None else {_NAMES: list(self.names)}
        return names | ({_UNSEEN: list(self.unseen)} if self.unseen else {})

    # -- what they are called ----------------------------------------------------------------------

    @property
    def named(self) -> bool:
        """Whether names say more than the numbers do."""
        return self.names is not None and self.names != tuple(map(str, range(self.count)))

    def names_of(self, labels: Iterable[int]) -> list[str] | None:
        """Names of some classes; None where they are not known."""
        return None if self.names is None else [self.names[label] for label in labels]

    def text(self, labels: Iterable[int]) -> str:
        """Classes for a sentence, such as "3 (cat), 5 (dog)"."""
        names = self.names if self.named else None
        return ", ".join(str(label) if names is None else f"{label} ({names[label]})" for label in labels)

    def find(self, flag: str, asked: Iterable[ClassLabel]) -> tuple[int, ...]:
        """Numbers of classes that are asked for by number or by name.

        A number that is another class's name, such as 2 where the classes are "1" to "10", is refused: ``index:2`` and
        ``name:2`` say which is meant.

        Args:
            flag: What asks, for messages.
            asked: Numbers and names.

        Raises:
            ValueError: There is no such class, or a number may mean two of them.
        """
        return tuple(self._find(flag, one) for one in asked)

    def check_seen(self, flag: str, labels: Iterable[int], where: str = "among those of its training") -> None:
        """Refuse classes that there was no image of: nothing to forget, to draw, or to tell apart.

        Raises:
            ValueError: One of them is such a class.
        """
        for label in labels:
            if label in self.unseen:
                raise ValueError(
                    f"{flag}: class {self.text([label])} has no image {where}, as {self.unseen_text()}; name another "
                    f"class, or train again on images of this one"
                )

    def unseen_text(self) -> str:
        """How many classes have no image, and which."""
        rest = len(self.unseen) - _LISTED
        more = f" and {rest} more" if rest > 0 else ""
        return f"{len(self.unseen)} of {self.count} classes have none: {self.text(self.unseen[:_LISTED])}{more}"

    def retained(self, forget: Sequence[int]) -> tuple[int, ...]:
        """All classes that are not forgotten, and that were seen."""
        return tuple(label for label in range(self.count) if label not in forget and label not in self.unseen)

    def _find(self, flag: str, asked: ClassLabel) -> int:
        text = str(asked)
        kind, _, rest = text.partition(":")
        by_name = self._by_name(text)
        if by_name is None and kind == "index" and rest.isdecimal():
            return self._in_range(flag, int(rest))
        if by_name is None and kind == "name":
            asked, by_name = rest, self._by_name(rest)
        if isinstance(asked, str):
            if by_name is None:
                raise ValueError(f"{flag}: unknown class {asked!r}; {self._expected(asked)}")
            return by_name
        if by_name is None:
            by_name = self._by_number(asked)
        if by_name is None or by_name == asked:
            return self._in_range(flag, asked)
        if not 0 <= asked < self.count:
            return by_name
        raise ValueError(
            f"{flag} {asked}: class {self.text([asked])} has this number, class {self.text([by_name])} this name; "
            f"say index:{asked} or name:{(self.names or ())[by_name]}"
        )

    def _by_name(self, text: str) -> int | None:
        names = [] if self.names is None else [*map(_normal, self.names)]
        return names.index(_normal(text)) if _normal(text) in names else None

    def _by_number(self, number: int) -> int | None:
        """The class whose name is this number, or begins with it."""
        for label, name in enumerate(self.names or ()):
            match = _NUMBERED.fullmatch(name)
            if match and match[1].lstrip("0") == (str(number) if number else ""):
                return label
        return None

    def _in_range(self, flag: str, label: int) -> int:
        if not 0 <= label < self.count:
            raise ValueError(f"{flag}: unknown class {label}; {self._expected(str(label))}")
        return label

    def _expected(self, text: str) -> str:
        numbers = f"the model has classes 0 to {self.count - 1}"
        if self.names is None:
            return f"{numbers}, whose names are not known"
        if not self.named:
            return numbers
        lower = {name.lower(): name for name in self.names}
        near = difflib.get_close_matches(text.lower(), lower, 1)
        hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
        return f"{numbers}: {_listed(self.names)}{hint}"


def check_same(sides: Mapping[str, Classes]) -> str | None:
    """Refuse sides that do not have the same classes in the same order; names are compared as Unicode NFC.

    Args:
        sides: What each is called in messages -> its classes.

    Returns:
        None, or where names are missing, and only the number of classes could be compared: what to tell people.

    Raises:
        ValueError: Two differ; the first class that does is named, with both lists.
    """
    (first, classes), *others = sides.items()
    for name, other in others:
        if other.count != classes.count:
            raise ValueError(f"{name}: expected {classes.count} classes, those of {first}, got {other.count}")
    named = [(name, side) for name, side in sides.items() if side.named]
    for name, side in named[1:]:
        _check_names(*named[0], name, side)
    unnamed = [name for name, side in sides.items() if not side.named]
    if not named and len({side.names for side in sides.values()}) == 1 and classes.names is not None:
        return None  # all are numbered alike
    if not unnamed:
        return None
    return (
        f"no names of classes: {', '.join(unnamed)}; only the number of classes was compared ({_NAMES} in config.json "
        f"or an npz gives them)"
    )


def check_networks(networks: Mapping[str, nn.Module | None]) -> None:
    """Refuse networks that carry classes, but not the same; those that carry none are not looked at.

    Raises:
        ValueError: Two differ.
    """
    carried = {name: Classes.of_module(network) for name, network in networks.items() if network is not None}
    known = {name: classes for name, classes in carried.items() if classes is not None}
    if known:
        check_same(known)


def _check_names(first: str, one: Classes, second: str, other: Classes) -> None:
    ours, theirs = ([*map(_normal, side.names or ())] for side in (one, other))
    for label, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        if mine == its:
            continue
        same = sorted(ours) == sorted(theirs)
        why = "the same classes in another order" if same else "if two names mean one class, give it one name"
        raise ValueError(
            f"{second}: class {label} is {its!r}, in {first} it is {mine!r}; expected the same classes in the same "
            f"order ({why}). {first}: {_listed(ours)}. {second}: {_listed(theirs)}"
        )


def _normal(name: str) -> str:
    """As it looks: macOS writes accents apart."""
    return unicodedata.normalize("NFC", name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
