"""What is refused before anything is written: no room, no permission, an input in the way, files of the user's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from pecker_fast.errors import FileFormatError
from pecker_fast.written import WHOLE, foreign, read

LEAST = 1 << 20
"""Bytes that must be free whatever is written: its record, its settings."""


def check_apart(target: Path, source: Path) -> None:
    """Refuse a target that is an input, holds it or lies in it; links are followed.

    Raises:
        FileFormatError: It does.
    """
    what, where = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if not where.exists():  # whoever reads it says so
        return
    if _same(what, where):
        relation, other = "is the input", "another name"
    elif any(_same(parent, where) for parent in what.parents):
        relation, other = "lies in the input", "a place outside of it"
    elif any(_same(what, parent) for parent in where.parents):
        relation, other = "holds the input", "a folder of its own"
    else:
        return
    raise FileFormatError(f"{target}: {relation} {source}, which is only read and must stay as it is; choose {other}")


def check_place(folder: Path, needs_bytes: int) -> None:
    """Refuse a folder that cannot be written or made, or lies on a disk that is too full.

    Raises:
        FileFormatError: It is.
    """
    if folder.exists() and not folder.is_dir():
        raise FileFormatError(f"{folder}: is a file, but a folder is to be written; choose another name")
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise FileFormatError(f"{folder}: cannot write into {there}; choose another folder, or get permission to write")
    needed, free = max(needs_bytes, LEAST), shutil.disk_usage(there).free
    if free < needed:
        raise FileFormatError(
            f"{folder}: needs about {_mebibytes(needed)}, but the disk has {_mebibytes(free)} left; make room, or "
            f"choose a folder on another disk"
        )


def check_entries(folder: Path, name: str, command: str, writes: Iterable[str], replace: bool) -> None:
    """Refuse to write over what the user made or changed, or over a result that is to stay.

    Args:
        folder: Where the result goes.
        name: Of the result there, `WHOLE` or that of its one file.
        command: What writes it.
        writes: Names or patterns of what it puts into the folder.
        replace: Whether an older result of the same command may go.

    Raises:
        FileFormatError: Something is in the way.
    """
    if not folder.is_dir():
        return
    results, where = read(folder), folder if name == WHOLE else folder / name
    own = results.get(name)
    older = set() if own is None else {top for top in own.tops if os.path.lexists(folder / top)}
    if own is not None and older and own.command != command:
        raise FileFormatError(
            f"{where}: holds a result of {own.command}, and {command} replaces only its own; choose another name"
        )
    names = older | set(_existing(folder, writes))
    for other, result in results.items():
        if other != name and (shared := names & result.tops):
            raise FileFormatError(
                f"{folder / min(shared)}: was written by {result.command}, and {command} replaces only its own; choose "
                f"another folder, or move it away"
            )
    found = foreign(folder, names, own)
    if found is not None:
        raise FileFormatError(
            f"{found[0]}: {found[1]}, and {command} would write there; move it away, or choose another folder"
        )
    if older and not replace:
        raise FileFormatError(
            f"{where}: holds a result of {command} already; give --overwrite (overwrite=True in Python), or "
            f"choose another name"
        )


def _existing(folder: Path, writes: Iterable[str]) -> Iterator[str]:
    patterns = [name.rstrip("/") for name in writes]
    return (entry.name for entry in folder.iterdir() if any(fnmatchcase(entry.name, each) for each in patterns))


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
