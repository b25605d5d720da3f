"""Files of a data set: mapped into memory, and held against the checksums that lie beside them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer

SUMS_NAME = "SHA256SUMS"
MAX_BYTES = 1 << 34
"""Pixels that a data set may have, 16 GiB: beyond it lies damage, not data for one machine."""


def map_file(file: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, (N,) uint8, read when they are looked at.

    Raises:
        FileFormatError: The file is missing, empty or unreadable.
    """
    refuse_pointer(file)
    try:
        return np.memmap(file, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise FileFormatError(f"{file}: cannot be read ({reason})") from error


def check_sums(root: Path, files: Iterable[Path], checksums: Mapping[str, str] | None) -> None:
    """Hold files against their SHA-256: those of ``checksums``, or of ``root/SHA256SUMS`` if that exists.

    Args:
        root: What the names are relative to.
        files: The files that will be read, below ``root``.
        checksums: Name -> hexadecimal digest.

    Raises:
        FileFormatError: A digest differs, or a file has none: a list that is there is to be complete.
    """
    listed = root / SUMS_NAME
    if checksums is None:
        if not listed.is_file():
            return
        checksums = _read_sums(listed)
    for file in files:
        name = file.relative_to(root).as_posix()
        if name not in checksums:
            raise FileFormatError(f"{file}: has no SHA-256 in {SUMS_NAME} (or checksums); add it there")
        digest = _digest(file)
        if digest != checksums[name].lower():
            raise FileFormatError(
                f"{file}: SHA-256 is {digest}, expected {checksums[name].lower()}; the file is damaged or another one"
            )


def natural(files: Iterable[Path]) -> list[Path]:
    """Files or folders by name, with 2 before 10."""
    return sorted(files, key=lambda file: natural_key(file.name))


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """What names are sorted by wherever their order says which class is which: numbers as numbers, text as text.

    Names that only differ in leading zeros are told apart by the names themselves.
    """
    parts: list[str | tuple[int, str]] = [*re.split("([0-9]+)", name)]  # text and numbers, in turn
    for index, number in enumerate(parts):
        if isinstance(number, str) and index % 2:
            digits = number.lstrip("0")
            parts[index] = len(digits), digits  # as a number, however long it is
    return parts, name


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileFormatError(f"{file}: cannot be read ({error.strerror})") from error


def _read_sums(file: Path) -> dict[str, str]:
    """Lines as ``sha256sum`` writes them: digest, a blank, a blank or an asterisk, name."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file}: cannot be read ({error})") from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef") or not name[1:]:
            raise FileFormatError(f"{file}: line {number}: expected a SHA-256, two blanks and a name")
        sums[name[1:].removeprefix("./")] = digest
    return sums
