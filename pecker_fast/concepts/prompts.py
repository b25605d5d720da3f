"""Prompts: out of files and templates, and with one concept in the place of another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pecker_fast.errors import FileFormatError

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
_MAX_BYTES = 64 * 1024 * 1024


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line of a UTF-8 text; empty lines and those that begin with # do not count.

    Raises:
        FileFormatError: The file is missing, not text, longer than 64 MiB, or has no prompt.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileFormatError(f"{path}: is longer than 64 MiB; expected a text with one prompt a line")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: is not text in UTF-8 ({error.reason}); write one prompt a line") from error
    if "\0" in text:
        raise FileFormatError(f"{path}: is not text, it has null bytes; write one prompt a line")
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise FileFormatError(f"{path}: has no prompt; write one a line")
    return prompts


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
