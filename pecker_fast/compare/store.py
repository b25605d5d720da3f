"""Lines that are kept: one JSON object a run, appended whole, so that a comparison goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.errors import FileFormatError
from pecker_fast.locks import LockedError, held

Line: TypeAlias = dict[str, Any]
"""One run, or the timing of one method."""

SETTINGS, RUNS, LOCK = "compare.json", "runs.jsonl", ".runs.lock"


class Store:
    """The folder of a comparison.

    Args:
        folder: Where it is; made if it is not there.
        settings: What the comparison depends on, JSON values; a folder with others is refused.

    Raises:
        FileFormatError: The folder cannot be written, or holds something damaged.
        ValueError: It holds another comparison.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        known = json.loads(json.dumps(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileFormatError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        if (folder / SETTINGS).exists():
            _check_same(read_json(folder / SETTINGS), known, folder)
        else:
            write_json(folder / SETTINGS, known)

    def __enter__(self) -> Store:
        """Keep the folder for this process, until the block ends.

        Raises:
            ValueError: Another one works in it.
        """
        self._lock = ExitStack()
        try:
            self._lock.enter_context(held(self.folder / LOCK))
        except LockedError as error:
            raise ValueError(f"{self.folder}: another process works in it; wait for it, or choose another") from error
        return self

    def __exit__(self, *unused: object) -> None:
        self._lock.close()

    def lines(self) -> list[Line]:
        """All that is kept; a last line that was cut short does not count.

        Raises:
            FileFormatError: Another line is not JSON.
        """
        return read_lines(self.folder / RUNS)

    def append(self, line: Line) -> None:
        """Keep a line, and wait until it is on the disk.

        Raises:
            FileFormatError: It cannot be written.
        """
        path = self.folder / RUNS
        try:
            _drop_cut_line(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be written ({error.strerror})") from error


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, none if it is not there.

    Raises:
        FileFormatError: A line that was written to its end is not a JSON object.
    """
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise FileFormatError(
                f"{path}: line {number} is not JSON ({error}); remove it to have it run again"
            ) from error
        if not isinstance(lines[-1], dict):
            raise FileFormatError(f"{path}: line {number} is not a JSON object; remove it to have it run again")
    return lines


def _drop_cut_line(path: Path) -> None:
    """Of a process that was killed while it wrote."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def _check_same(kept: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    for name in {**kept, **asked}:
        if kept.get(name) != asked.get(name):
            raise ValueError(
                f"{folder}: holds a comparison with {name} = {_short(kept.get(name))}, asked for is "
                f"{_short(asked.get(name))}; choose another folder"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
