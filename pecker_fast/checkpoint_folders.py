"""Folders ``checkpoint-{step}`` below one root: their names, which is the latest, and which may go."""

from __future__ import annotations

import re
from pathlib import Path

from pecker_fast.checkpoint import StrPath
from pecker_fast.errors import FileFormatError
from pecker_fast.leftovers import discard
from pecker_fast.manifest import has_manifest, sizes_of

LATEST = "latest"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def folder_of(root: StrPath, step: int) -> Path:
    """``root/checkpoint-{step}``."""
    return Path(root) / f"checkpoint-{step}"


def finished(root: StrPath, kind: str) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint of this kind below ``root``, by step; none where there is no root."""
    named = _named(root)
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


def check_own(root: StrPath, kind: str) -> None:
    """Refuse a root where checkpoints that are to be written, or removed, would take something of the user's along.

    Raises:
        FileFormatError: A folder ``checkpoint-*`` is of something else, or holds something else.
    """
    for folder in _named(root).values():
        if (other := foreign_in(folder, kind)) is not None:
            raise FileFormatError(
                f"{other}: is of no checkpoint that this command wrote; move it away, or choose another folder"
            )


def foreign_in(folder: Path, kind: str) -> Path | None:
    """What in a checkpoint was not written with it; the folder itself if it is no finished checkpoint of this kind."""
    if folder.is_symlink() or not has_manifest(folder, kind):
        return folder
    sizes = sizes_of(folder)
    return next((path for path in sorted(folder.iterdir()) if not _is_of(path, sizes)), None)


def check_replaced(folder: Path, kind: str) -> None:
    """Refuse to write a checkpoint where there is something else than one of this kind.

    Raises:
        FileFormatError: There is.
    """
    if (folder.exists() or folder.is_symlink()) and (other := foreign_in(folder, kind)) is not None:
        raise FileFormatError(f"{other}: is of no checkpoint that was written here; move it away")


def remove_all(root: StrPath, kind: str) -> None:
    """Remove the finished checkpoints of this kind that hold nothing else."""
    for folder in finished(root, kind).values():
        _remove(folder, kind)


def remove_oldest(root: StrPath, kind: str, keep: Path, limit: int) -> None:
    """Remove finished checkpoints of the lowest steps until at most ``limit`` are left, of which ``keep`` is one."""
    others = [path for path in finished(root, kind).values() if path != keep]
    for path in others[: max(0, len(others) + 1 - limit)]:
        _remove(path, kind)


def _remove(folder: Path, kind: str) -> None:
    if foreign_in(folder, kind) is None:
        discard(folder)


def _named(root: StrPath) -> dict[int, Path]:
    if not Path(root).is_dir():
        return {}
    return {int(match[1]): path for path in Path(root).iterdir() if (match := _NAME.fullmatch(path.name))}


def _is_of(path: Path, sizes: dict[str, int]) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == sizes.get(path.name, -1)
