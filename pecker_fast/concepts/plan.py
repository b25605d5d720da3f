"""PromptPlan: each prompt is a row of a table, and a label is the number of its row."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pecker_fast.concepts.prompts import check_without
from pecker_fast.concepts.request import Erasure
from pecker_fast.prompt_text import listed, looks_like_several, normal, tidy, unique, warn_of_one

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
            TypeError: One text where a list of prompts is expected.
            ValueError: A prompt is empty, is both forgotten and retained, or is an override that is forgotten too; a
                retained or override prompt contains a concept. Spellings that CLIP's tokenizer takes for one are one:
                upper and lower case, spaces, composed and decomposed letters.
        """
        kept = unique(listed("retained prompts", retain))
        if "" in kept:
            raise ValueError("retained prompts: one is empty; the empty prompt cannot be asked for")
        if len(kept) == 1 and looks_like_several(kept[0]):
            warn_of_one("retained prompts", kept[0], "several are one a line, in Python a list: neither ',' nor ';'")
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
        if negative is not None and not tidy(negative):
            raise ValueError("the negative prompt is empty; without one the null prompt is in its place")
        rows: dict[str, int] = {}
        spelled: list[str] = []

        def number(text: str) -> int:
            if (key := normal(text)) not in rows:
                rows[key] = len(rows)
                spelled.append(tidy(text))
            return rows[key]

        forget = tuple(map(number, erasure.forget))
        retained = tuple(map(number, kept))
        override = None if erasure.override is None else tuple(map(number, erasure.override))
        texts = tuple(spelled)
        if negative is None:
            return cls(texts, forget, override, retained)
        # A row of its own: it often has the words of what is forgotten, and no label may be both.
        return cls((*texts, tidy(negative)), forget, override, retained, (len(texts),))

    def check_apart(self, tokens: Sequence[Hashable]) -> None:
        """Refuse prompts that are kept, or take another's place, and are forgotten ones to the pipeline's tokenizer.

        Args:
            tokens: What it makes of each of ``texts``: ``PipelineFolder.token_ids``.

        Raises:
            ValueError: There are such; both spellings are named.
        """
        gone = {tokens[label]: self.texts[label] for label in self.forget}
        for what, labels in (("retained", self.retain), ("override", self.override or ())):
            for label in labels:
                if (same := gone.get(tokens[label])) is not None:
                    raise ValueError(
                        f"{what} prompt {self.texts[label]!r} has the tokens of {same!r}, which is to be forgotten; "
                        f"leave it out of one of the two"
                    )

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
