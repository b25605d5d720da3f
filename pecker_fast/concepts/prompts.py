"""Prompts out of files and templates, and which of them must be free of a concept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pecker_fast import prompt_files
from pecker_fast.prompt_text import contains, listed

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
        TypeError: The templates are one text.
        ValueError: A template has no ``{}``.
    """
    templates = listed("prompt templates", templates)
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"prompt templates: {template!r} has no {{}} for the concept to stand in")
    return tuple(template.replace("{}", concept) for template in templates)


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
