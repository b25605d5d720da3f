"""What this package wrote into a folder: ``.pecker_fast.json`` lists every file with its size and SHA-256.

A folder holds at most one result of its own (a model, an erasure), and any number of results that are one file (drawn
images, a mask). What the record does not list, or lists otherwise, is the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pecker_fast.checkpoint import atomic_file, read_json, write_json
from pecker_fast.errors import FileFormatError
from pecker_fast.locks import held
from pecker_fast.manifest import describe

NAME = ".pecker_fast.json"
KIND, VERSION = "pecker_fast.written", 1
WHOLE = "."
"""The result that is the folder's own; any other is the file of that name."""

Described: TypeAlias = Mapping[str, Any]
"""Size and SHA-256 of a file."""


@dataclass(frozen=True)
class Result:
    """One result.

    Attributes:
        command: What wrote it.
        entries: Path in the folder -> what may lie there: descriptions of a file, none for a folder. None stands for
            anything: it is being written.
    """

    command: str
    entries: Mapping[str, tuple[Described, ...] | None]

    @property
    def tops(self) -> set[str]:
        """The names directly in the folder."""
        return {name.partition("/")[0] for name in self.entries}

    def merged(self, other: Result | None) -> Result:
        """Where either of two may lie: while one takes the other's place."""
        if other is None:
            return self
        both = {**other.entries, **self.entries}
        for name in other.entries.keys() & self.entries.keys():
            old, new = other.entries[name], self.entries[name]
            both[name] = None if old is None or new is None else (*new, *(one for one in old if one not in new))
        return Result(self.command, both)


def described(command: str, folder: Path, names: Iterable[str] | None = None) -> Result:
    """A result as it lies in ``folder``: all of it, or what is below ``names``."""
    tops = sorted(entry.name for entry in folder.iterdir()) if names is None else sorted(names)
    paths = [path for top in tops if top != NAME for path in below(folder / top)]
    return Result(command, {_relative(path, folder): () if path.is_dir() else (describe(path),) for path in paths})


def foreign(folder: Path, names: Iterable[str], result: Result | None) -> tuple[Path, str] | None:
    """The first entry below ``names`` that ``result`` did not leave there, and what is wrong with it."""
    entries = {} if result is None else result.entries
    for top in sorted(names):
        if top in entries and entries[top] is None:
            continue
        for path in below(folder / top):
            allowed = entries.get(_relative(path, folder), None)
            if allowed is None:
                return path, "was not written by pecker_fast, or by a version that kept no record of it"
            same = path.is_dir() if not allowed else path.is_file() and describe(path) in allowed
            if path.is_symlink() or not same:
                return path, "was changed since pecker_fast wrote it"
    return None


def below(path: Path) -> Iterator[Path]:
    """An entry and all that it holds, links not followed; nothing where there is none."""
    if path.is_symlink() or path.exists():
        yield path
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from below(entry)


def read(folder: Path) -> dict[str, Result]:
    """All results in a folder by name; none where it has no record.

    Raises:
        FileFormatError: The record is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        if (values["format"], values["version"]) != (KIND, VERSION):
            raise ValueError(f"expected {KIND!r} version {VERSION}")
        return {name: _result(stored) for name, stored in values["results"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{path}: is damaged ({error}), so that what pecker_fast wrote there cannot be told from what is yours; "
            f"choose another folder, or move this one away"
        ) from error


def keep(folder: Path, name: str, result: Result) -> None:
    """Put one result on the record, or take it off if it has no entries; the others there stay.

    Raises:
        FileFormatError: The record is damaged or cannot be written.
    """
    path = folder / NAME
    with held(path.with_name(f"{NAME}.lock"), wait=True):
        results = {each: of for each, of in (read(folder) | {name: result}).items() if of.entries}
        if not results:
            path.unlink(missing_ok=True)
            return
        stored = {each: {"command": of.command, "entries": of.entries} for each, of in sorted(results.items())}
        with atomic_file(path) as unfinished:
            write_json(unfinished, {"format": KIND, "version": VERSION, "results": stored})


def _result(stored: Mapping[str, Any]) -> Result:
    entries = {
        str(name): None if found is None else tuple(map(dict, found)) for name, found in stored["entries"].items()
    }
    for name in entries:
        if not all(part not in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{name!r} is no path in the folder")
    return Result(str(stored["command"]), entries)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
