"""Pointers of Git LFS: what a clone holds in place of a large file that was not fetched."""

from __future__ import annotations

import os
from pathlib import Path

from pecker_fast.errors import FileFormatError

_BEGIN = b"version https://git-lfs.github.com/spec/"


def is_pointer(content: bytes) -> bool:
    """Whether a file that begins so is a pointer."""
    return content.startswith(_BEGIN)


def refuse_pointer(path: str | os.PathLike[str], content: bytes | None = None) -> None:
    """Name a pointer as what it is; anything else, also what cannot be read, passes.

    Args:
        path: The file.
        content: Its first bytes; None looks at the file.

    Raises:
        FileFormatError: It is a pointer.
    """
    if content is None and Path(path).is_file():
        with open(path, "rb") as file:
            content = file.read(len(_BEGIN))
    if content is not None and is_pointer(content):
        raise FileFormatError(
            f"{path}: is a Git LFS pointer, a few lines in place of the file itself; fetch it with git lfs pull"
        )
