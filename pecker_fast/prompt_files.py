"""Prompts with their seeds, from the files that people have: text, tables, and captions of COCO."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pecker_fast.checkpoint import StrPath
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_text import tidy

MAX_BYTES = 256 << 20
"""Of a file; the captions of COCO's training images are 92 MB."""
MAX_PROMPTS = 1_000_000
MAX_CHARACTERS = 10_000
"""Of a prompt."""
SEEDS = ("evaluation_seed", "sd_seed", "seed")
"""Columns of a table that may hold the seed; the first that is there does."""
GUIDANCES = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale")
_LINE_END = re.compile("\r\n|\r|\n")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_QUOTED = 60


@dataclass(frozen=True)
class EvaluationPrompt:
    """One image to draw.

    Attributes:
        text: The prompt.
        seed: Of the noise; None if the file names none (see ``with_seeds``).
        guidance_scale: What the file asks for, if it does.
        concept: What it is a prompt of, for tables; None if unknown.
        label: The class that a classifier should see, if there is one.
    """

    text: str
    seed: int | None = None
    guidance_scale: float | None = None
    concept: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and where they come from.

    Attributes:
        prompts: One an image.
        source: The file's path, or a protocol's name.
        sha256: Of the file.
    """

    prompts: tuple[EvaluationPrompt, ...]
    source: str
    sha256: str


def read_prompts(path: StrPath, *, limit: int | None = None, sample_seed: int | None = None) -> PromptSet:
    """Read a file of prompts.

    ``.txt`` holds one a line; empty lines and those that begin with # do not count. ``.csv`` and ``.tsv`` have a column
    ``prompt``; ``evaluation_seed``, ``sd_seed`` or ``seed`` and ``evaluation_guidance``, ``sd_guidance_scale`` or
    ``guidance_scale`` are read where they are there, as the tables of I2P and of published evaluations have them, and
    so are ``concept`` and ``label``. ``.json`` is COCO's captions: the first of each image, in the file's order.

    Args:
        path: The file, UTF-8.
        limit: At most so many prompts; None takes all.
        sample_seed: Of the draw of ``limit`` prompts (they keep their order); None takes the first ones.

    Raises:
        FileFormatError: The file is missing, too long, malformed, or without a prompt; it and the line are named.
        ValueError: The limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    file = Path(path)
    content = _content(file)
    rows = tuple(_reader(file)(file, _decoded(file, content)))
    if not 1 <= len(rows) <= MAX_PROMPTS:
        raise FileFormatError(f"{file}: expected 1 to {MAX_PROMPTS} prompts, got {len(rows)}")
    return PromptSet(_limited(rows, limit, sample_seed), str(file), hashlib.sha256(content).hexdigest())


def with_seeds(prompts: Iterable[EvaluationPrompt], seeds: Sequence[int]) -> tuple[EvaluationPrompt, ...]:
    """Every prompt with every seed; prompts that name their own keep it, once.

    Raises:
        ValueError: A prompt has no seed, and none are given.
    """
    drawn: list[EvaluationPrompt] = []
    for prompt in prompts:
        if prompt.seed is None and not seeds:
            raise ValueError(f"the prompt {_cut(prompt.text)} has no seed, and no seeds are given")
        drawn += [prompt] if prompt.seed is not None else [replace(prompt, seed=seed) for seed in seeds]
    return tuple(drawn)


def check_prompt(where: str, text: object) -> str:
    """A prompt as ``prompt_text.tidy`` leaves it.

    Raises:
        FileFormatError: It is no text, empty, too long, or has control characters.
    """
    if not isinstance(text, str) or not (given := tidy(text)):
        raise FileFormatError(f"{where}: expected a prompt, got {_cut(text)}")
    text = given
    if len(text) > MAX_CHARACTERS:
        raise FileFormatError(f"{where}: expected at most {MAX_CHARACTERS} characters, got {len(text)}")
    if any(ord(character) < 32 and not character.isspace() for character in text):
        raise FileFormatError(f"{where}: the prompt has control characters: {_cut(text)}")
    return text


def _reader(file: Path) -> Callable[[Path, str], Iterator[EvaluationPrompt]]:
    readers = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _captions}
    if file.suffix.lower() not in readers:
        raise FileFormatError(f"{file}: expected a file that ends in {', '.join(readers)}, got {file.suffix!r}")
    return readers[file.suffix.lower()]


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileFormatError(f"{file}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise FileFormatError(f"{file}: longer than {MAX_BYTES} bytes; cut it down to the prompts that are drawn")
    return content


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileFormatError(f"{file}, line {line}: not UTF-8; save it as UTF-8 text") from error


def _lines(file: Path, text: str) -> Iterator[EvaluationPrompt]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if (words := tidy(line)) and not words.startswith("#"):
            yield EvaluationPrompt(check_prompt(f"{file}, line {number}", line))


def _table(file: Path, text: str) -> Iterator[EvaluationPrompt]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[file.suffix.lower()], strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if header is None:
                header = _checked_header(where, [tidy(name) for name in row])
            elif row:
                yield _row(where, header, row)
    except csv.Error as error:
        raise FileFormatError(f"{file}, line {rows.line_num}: not a table that can be read ({error})") from error


def _checked_header(where: str, header: list[str]) -> list[str]:
    if "prompt" not in header:
        raise FileFormatError(f"{where}: expected a column named prompt, got {_cut(', '.join(header))}")
    doubled = {name for name in header if name and header.count(name) > 1}
    if doubled:
        raise FileFormatError(f"{where}: a column comes twice: {_cut(', '.join(sorted(doubled)))}")
    return header


def _row(where: str, header: list[str], row: list[str]) -> EvaluationPrompt:
    if len(row) != len(header):
        raise FileFormatError(f"{where}: expected {len(header)} columns, got {len(row)}")
    values = dict(zip(header, row, strict=True))
    return EvaluationPrompt(
        check_prompt(where, values["prompt"]),
        _integer(where, values, SEEDS, 2**63 - 1),
        _guidance(where, values),
        tidy(values.get("concept", "")) or None,
        _integer(where, values, ("label",), 2**31 - 1),
    )


def _integer(where: str, values: Mapping[str, str], names: Sequence[str], largest: int) -> int | None:
    name = next((name for name in names if name in values), None)
    if name is None:
        return None
    # Tables with gaps elsewhere are often stored with 7.0 for 7.
    digits = values[name].strip().removesuffix(".0")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and int(digits) <= largest):
        raise FileFormatError(f"{where}: {name}: expected an integer from 0 to {largest}, got {_cut(values[name])}")
    return int(digits)


def _guidance(where: str, values: Mapping[str, str]) -> float | None:
    name = next((name for name in GUIDANCES if name in values), None)
    if name is None:
        return None
    try:
        value = float(values[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1000:
        raise FileFormatError(f"{where}: {name}: expected a number from 0 to 1000, got {_cut(values[name])}")
    return value


def _captions(file: Path, text: str) -> Iterator[EvaluationPrompt]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: not JSON that can be read ({_cut(error)})") from error
    annotations = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(annotations, list):
        raise FileFormatError(f"{file}: expected COCO's captions, an object with a list named annotations")
    seen = set()
    for index, annotation in enumerate(annotations):
        where = f"{file}, annotations[{index}]"
        image = annotation.get("image_id") if isinstance(annotation, dict) else None
        if isinstance(image, bool) or not isinstance(image, int | str):
            raise FileFormatError(f"{where}: expected an object with image_id and caption, got {_cut(annotation)}")
        if image not in seen:
            seen.add(image)
            yield EvaluationPrompt(check_prompt(where, annotation.get("caption")))


def _limited(
    rows: tuple[EvaluationPrompt, ...], limit: int | None, sample_seed: int | None
) -> tuple[EvaluationPrompt, ...]:
    if limit is None or limit >= len(rows):
        return rows
    if sample_seed is None:
        return rows[:limit]
    return tuple(rows[index] for index in sorted(random.Random(sample_seed).sample(range(len(rows)), limit)))


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
