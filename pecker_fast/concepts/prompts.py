"""Prompts: out of files and templates, and with one concept in the place of another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pecker_fast import prompt_files

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a portrait of {}",
    "a drawing of {}",
    "{} in the street",
    "{} at night",
)
"""What a concept is put into where no prompts are given."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The texts of a file of prompts: lines, a table, or captions (see ``prompt_files.read_prompts``).

    Raises:
        FileFormatError: The file is missing, malformed, too long, or has no prompt.
    """
    return tuple(prompt.text for prompt in prompt_files.read_prompts(path).prompts)


def fill(templates: Sequence[str], concept: str) -> tuple[str, ...]:
    """``concept`` in the place of ``{}`` in each template.

    Raises:
        ValueError: A template has no ``{}``.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"prompt templates: {template!r} has no {{}} for the concept to stand in")
    return tuple(template.replace("{}", concept) for template in templates)


def normal(prompt: str) -> str:
    """What CLIP's tokenizer makes of a prompt before it cuts it up: lower case, single spaces.

    Prompts of one normal form are one prompt: they have the same embedding.
    """
    return " ".join(prompt.lower().split())


def unique(prompts: Iterable[str]) -> list[str]:
    """Each prompt once, as it is first spelled."""
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(normal(prompt), prompt.strip())
    return list(found.values())


def check_without(what: str, prompts: Iterable[str], concepts: Sequence[str]) -> None:
    """Refuse prompts that contain a concept which is to be erased.

    Args:
        what: Kind of the prompts, for the message.
        prompts: The prompts.
        concepts: The concepts.

    Raises:
        ValueError: One does; both are named.
    """
    for prompt in prompts:
        for concept in concepts:
            if contains(prompt, concept):
                raise ValueError(f"{what} prompt {prompt!r} contains {concept!r}, which is to be erased; take another")


def contains(prompt: str, concept: str) -> bool:
    """Whether the words of ``concept`` stand in ``prompt``, as whole words, in upper or lower case."""
    return _pattern(concept).search(prompt) is not None


def replace_concepts(prompt: str, replacements: Mapping[str, str]) -> str:
    """``prompt`` with each concept replaced wherever it stands, as whole words, in upper or lower case.

    Longer concepts come first, so that "new york city" is not taken for "new york".
    """
    for concept in sorted(replacements, key=len, reverse=True):
        literal = replacements[concept].replace("\\", r"\\")
        prompt = _pattern(concept).sub(literal, prompt)
    return prompt


def _pattern(concept: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, concept.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
