"""Folders ``checkpoint-{step}`` below one root: their names, which is the latest, and which may go."""

from __future__ import annotations

import re
from pathlib import Path

from pecker_fast.checkpoint import StrPath
from pecker_fast.errors import FileFormatError
from pecker_fast.leftovers import discard
from pecker_fast.manifest import has_manifest

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def folder_of(root: StrPath, step: int) -> Path:
    """``root/checkpoint-{step}``."""
    return Path(root) / f"checkpoint-{step}"


def finished(root: StrPath, kind: str) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint of this kind below ``root``, by step; none where there is no root."""
    if not Path(root).is_dir():
        return {}
    named = {int(match[1]): path for path in Path(root).iterdir() if (match := _NAME.fullmatch(path.name))}
    return {step: named[step] for step in sorted(named) if has_manifest(named[step], kind)}


def resolve(checkpoint: StrPath, root: StrPath | None, kind: str) -> Path:
    """The folder that a path, or "latest" of ``root``, means.

    Raises:
        FileFormatError: "latest" is asked for, and ``root`` has no finished checkpoint.
        ValueError: "latest" is asked for without a ``root``.
    """
    if checkpoint != LATEST:
        return Path(checkpoint) if root is None else Path(root) / checkpoint
    if root is None:
        raise ValueError('"latest": expected root=, the folder that the checkpoints are in')
    found = finished(root, kind)
    if not found:
        raise FileFormatError(f"{root}: has no finished checkpoint-*; start anew, or name another folder")
    return found[max(found)]


def remove_oldest(root: StrPath, kind: str, keep: Path, limit: int) -> None:
    """Remove finished checkpoints of the lowest steps until at most ``limit`` are left, of which ``keep`` is one."""
    others = [path for path in finished(root, kind).values() if path != keep]
    for path in others[: max(0, len(others) + 1 - limit)]:
        discard(path)
