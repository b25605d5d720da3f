"""PromptPlan: each prompt is a row of a table, and a label is the number of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pecker_fast.concepts.prompts import check_without, normal, unique
from pecker_fast.concepts.request import Erasure

_PARTS = ("forget", "override", "retain", "negative")


@dataclass(frozen=True)
class PromptPlan:
    """Which prompts there are, and which part each plays. The null prompt "" is the row after the last one.

    Attributes:
        texts: Prompts, each once but for the negative one.
        forget: Labels of those to forget.
        override: What the frozen model is asked for in their place: one label for each, or None.
        retain: Labels of those that are kept; the empty prompt, where none is given.
        negative: What takes the null prompt's place in guidance for forgotten ones: one label, or None.
    """

    texts: tuple[str, ...]
    forget: tuple[int, ...]
    override: tuple[int, ...] | None
    retain: tuple[int, ...]
    negative: tuple[int, ...] | None = None

    @classmethod
    def of(cls, erasure: Erasure, retain: Sequence[str] = (), negative: str | None = None) -> PromptPlan:
        """Number the prompts: forgotten ones first, then the rest in the order of first use.

        Raises:
            ValueError: A prompt is empty, is both forgotten and retained, or is an override that is forgotten too; a
                retained or override prompt contains a concept. Upper and lower case are the same, and so are spaces.
        """
        kept = unique(retain)
        if "" in kept:
            raise ValueError("retained prompts: one is empty; the empty prompt cannot be asked for")
        kept = kept or [""]  # something has to be kept where a method looks at none
        known = {normal(prompt) for prompt in kept}
        if both := [prompt for prompt in erasure.forget if normal(prompt) in known]:
            raise ValueError(
                f"prompt {both[0]!r} is to be forgotten and to be retained; leave it out of one of the two"
            )
        check_without("retained", kept, erasure.concepts)
        gone = {normal(prompt) for prompt in erasure.forget}
        for target in erasure.override or ():
            if normal(target) in gone:
                raise ValueError(f"override prompt {target!r} is itself to be forgotten; name another one")
        check_without("override", erasure.override or (), erasure.concepts)
        if negative is not None and not negative.strip():
            raise ValueError("the negative prompt is empty; without one the null prompt is in its place")
        rows: dict[str, int] = {}
        spelled: list[str] = []

        def number(text: str) -> int:
            if (key := normal(text)) not in rows:
                rows[key] = len(rows)
                spelled.append(text)
            return rows[key]

        forget = tuple(map(number, erasure.forget))
        retained = tuple(map(number, kept))
        override = None if erasure.override is None else tuple(map(number, erasure.override))
        texts = tuple(spelled)
        if negative is None:
            return cls(texts, forget, override, retained)
        # A row of its own: it often has the words of what is forgotten, and no label may be both.
        return cls((*texts, negative.strip()), forget, override, retained, (len(texts),))

    @property
    def num_classes(self) -> int:
        """Prompts; also the label of the null prompt."""
        return len(self.texts)

    @property
    def rows(self) -> tuple[str, ...]:
        """What is embedded: all prompts, then the null prompt."""
        return (*self.texts, "")

    @property
    def retained_texts(self) -> tuple[str, ...]:
        """What is kept, as it was given."""
        return tuple(self.texts[label] for label in self.retain if self.texts[label])

    @property
    def labels(self) -> dict[str, Any]:
        """Fields of ``DistillConfig``: ``num_classes`` and the labels by part."""
        return {"num_classes": self.num_classes} | {name: getattr(self, name) for name in _PARTS}

    def named(self, labels: Sequence[int] | None) -> list[str] | None:
        """The texts of labels."""
        return None if labels is None else [self.texts[label] for label in labels]

    def to_dict(self) -> dict[str, Any]:
        """Texts by label, and which part they play, as JSON holds them."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return {"texts": list(self.texts), **{name: labels and list(labels) for name, labels in parts.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptPlan:
        """From ``to_dict``.

        Raises:
            KeyError, TypeError, IndexError: It is something else.
        """
        texts = tuple(str(text) for text in values["texts"])
        parts = {name: values[name] for name in _PARTS}
        labels = {name: None if part is None else tuple(int(label) for label in part) for name, part in parts.items()}
        for part in labels.values():
            for label in part or ():
                texts[label]
        return cls(texts, **labels)  # type: ignore[arg-type]
