"""A request to erase: which prompts are forgotten, and what is drawn in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pecker_fast.concepts.prompts import TEMPLATES, check_without, fill
from pecker_fast.prompt_text import contains, listed, normal, replace_concepts, split_concepts, unique


@dataclass(frozen=True)
class Erasure:
    """What is erased.

    Attributes:
        concepts: Words for people and for the model card; empty where prompts alone were given.
        forget: Prompts to forget.
        override: What the frozen model is asked for in their place: one prompt for each, one for all, or None.
    """

    concepts: tuple[str, ...]
    forget: tuple[str, ...]
    override: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        concept: str | None = None,
        override_concept: str | None = None,
        *,
        forget: Sequence[str] | None = None,
        override: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> Erasure:
        """From a concept, from prompts, or from both.

        Args:
            concept: What to erase; several are separated by ";". Commas are part of a concept, and warned of.
            override_concept: What takes its place in each forgotten prompt: one for each concept, or one for all.
            forget: Prompts to forget, which must contain the concept if there is one; None fills ``templates``.
            override: Prompts that take their place, one for each or one for all, instead of ``override_concept``.
            templates: With "{}" where the concept stands.

        Raises:
            TypeError: One text where a list of prompts is expected.
            ValueError: Neither a concept nor prompts; an empty prompt; a prompt without the concept; another number
                of overrides; both kinds of override; an override that still has the concept in it.
        """
        concepts = () if concept is None else tuple(unique(split_concepts("the concept to erase", concept)))
        if not concepts and forget is None:
            raise ValueError("nothing to erase: give a concept (--erase_concept) or prompts (--forget_prompts)")
        if forget is None:
            forget = unique(prompt for each in concepts for prompt in fill(templates, each))
        lines = _stripped("forget", forget)
        prompts = unique(lines)
        for prompt in prompts:
            if concepts and not any(contains(prompt, each) for each in concepts):
                raise ValueError(f"prompt {prompt!r} is to be forgotten, but does not contain {_either(concepts)}")
        if override_concept is not None and override is not None:
            raise ValueError("overrides are given twice; give --override_concept or --override_prompts")
        if override_concept is not None:
            return cls(concepts, tuple(prompts), _replaced(prompts, concepts, override_concept))
        if override is None:
            return cls(concepts, tuple(prompts), None)
        given = _stripped("override", override)
        check_without("override", given, concepts)
        if len(given) not in (1, len(lines)):
            raise ValueError(
                f"override prompts: expected one for each of the {len(lines)} forgotten ones, line by line, or one "
                f"for all, got {len(given)}"
            )
        each = given * len(lines) if len(given) == 1 else given
        return cls(concepts, tuple(prompts), _first(lines, each))


def _replaced(prompts: Sequence[str], concepts: tuple[str, ...], text: str) -> tuple[str, ...]:
    if not concepts:
        raise ValueError("an override concept takes the place of a concept; give --erase_concept too")
    targets = split_concepts("the override concept", text)
    if len(targets) not in (1, len(concepts)):
        raise ValueError(
            f"the override concept: expected one, or one for each of the {len(concepts)} erased, got {len(targets)}"
        )
    each = targets * len(concepts) if len(targets) == 1 else targets
    replacements = dict(zip(concepts, each, strict=True))
    for target in targets:
        if named := [concept for concept in concepts if contains(target, concept)]:
            raise ValueError(f"the override concept {target!r} contains {named[0]!r}, which is to be erased")
    return tuple(replace_concepts(prompt, replacements) for prompt in prompts)


def _first(forget: Sequence[str], override: Sequence[str]) -> tuple[str, ...]:
    """The override of each forgotten prompt, in order of its first line."""
    found: dict[str, str] = {}
    for prompt, target in zip(forget, override, strict=True):
        first = found.setdefault(normal(prompt), target)
        if normal(first) != normal(target):
            raise ValueError(f"prompt {prompt!r} has two overrides: {first!r} and {target!r}")
    return tuple(found.values())


def _stripped(what: str, prompts: Sequence[str]) -> list[str]:
    found = listed(f"{what} prompts", prompts)
    if not found:
        raise ValueError(f"{what} prompts: expected at least one, got none")
    if "" in found:
        number = found.index("") + 1
        raise ValueError(f"{what} prompts: prompt {number} is empty; the empty prompt cannot be asked for")
    return found


def _either(concepts: Sequence[str]) -> str:
    return " or ".join(map(repr, concepts))
