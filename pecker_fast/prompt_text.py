"""When two texts are one prompt: by what CLIP's tokenizer makes of a text before it cuts it up, and by what is seen."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence

from pecker_fast.errors import PeckerFastWarning

SEPARATOR = ";"
"""Between concepts of one text."""
_OTHER_SEPARATORS = re.compile("[,|\n\u3001\uff0c\uff1b]")  # also those of Chinese and Japanese keyboards
_INVISIBLE = str.maketrans("", "", "\u00ad\u200b\u200e\u200f\u2060\ufeff")
"""Soft hyphens, zero-width spaces, direction marks and byte order marks: copied along, never meant. Joiners stay: they
are part of words in some scripts, and of pictures."""


def tidy(text: str) -> str:
    """A text in NFC, without characters that nobody sees and without white space around it.

    To CLIP's tokenizer, which normalizes to NFC itself, nothing changes but that.
    """
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()


def normal(prompt: str) -> str:
    """A prompt as CLIP's tokenizer normalizes it: NFC, single spaces, lower case.

    Prompts of one normal form are one prompt: they have the same embedding once they are tidy.
    """
    # Letter by letter, as the tokenizer does it: in a whole word Python ends "ΣΑΣ" with another sigma.
    return " ".join("".join(map(str.lower, tidy(prompt))).split())


def unique(prompts: Iterable[str]) -> list[str]:
    """Each prompt once, as it is first spelled."""
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(normal(prompt), tidy(prompt))
    return list(found.values())


def listed(what: str, texts: Sequence[str]) -> list[str]:
    """The texts of a list, tidy.

    Raises:
        TypeError: It is one text, of which each letter would be taken for a prompt, or holds something else.
    """
    if isinstance(texts, str):
        raise TypeError(f"{what}: expected a list of texts, got one, {texts!r}; put it into a list")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{what}: expected texts, got {type(text).__name__}")
    return [tidy(text) for text in texts]


def split_concepts(what: str, text: str) -> tuple[str, ...]:
    """The concepts of a text, which ``;`` separates; a comma does not, and a warning says so.

    Args:
        what: Their kind, for messages.
        text: The concepts.

    Raises:
        TypeError: It is no text.
        ValueError: One is empty.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what}: expected a text, several concepts separated by ';', got {type(text).__name__}")
    parts = [tidy(part) for part in text.split(SEPARATOR)]
    if not all(parts):
        raise ValueError(f"{what}: expected words, or several concepts separated by ';', got {text!r}")
    for part in parts:
        if _OTHER_SEPARATORS.search(part):
            each = "; ".join(filter(None, map(str.strip, _OTHER_SEPARATORS.split(part))))
            warn_of_one(what, part, f"several are separated by ';': {each!r}")
    return tuple(parts)


def warn_of_one(what: str, text: str, how: str) -> None:
    """Say that ``text``, which looks like a list, is taken for one; ``how`` tells how several are given."""
    warnings.warn(f"{what}: {text!r} is taken for one; {how}", PeckerFastWarning, stacklevel=4)


def looks_like_several(text: str) -> bool:
    """Whether a text has what separates lists somewhere: ``;``, a comma, a bar, or a line's end."""
    return SEPARATOR in text or _OTHER_SEPARATORS.search(text) is not None


def contains(prompt: str, concept: str) -> bool:
    """Whether the words of ``concept`` stand in ``prompt``, as whole words, in any spelling of the same letters."""
    return _pattern(concept).search(tidy(prompt)) is not None


def replace_concepts(prompt: str, replacements: Mapping[str, str]) -> str:
    """``prompt`` with each concept replaced wherever it stands, as whole words, in any spelling of the same letters.

    Longer concepts come first, so that "new york city" is not taken for "new york".
    """
    prompt = tidy(prompt)
    for concept in sorted(replacements, key=len, reverse=True):
        literal = replacements[concept].replace("\\", r"\\")
        prompt = _pattern(concept).sub(literal, prompt)
    return prompt


def _pattern(concept: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, tidy(concept).split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
