"""What killed runs left of files and folders that they were writing: told from what lives, and put away.

What is to become ``model`` is ``.model.tmp-<machine>-<random>`` until it is complete, and its writer holds a lock on it
(flock), which ends with the writer however that ends. So what was made on this machine since it was started, and is
locked by nobody, was left by a run that is dead. Of other machines nothing is known: theirs stay.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>old|tmp)-(?P<mark>(?P<machine>[0-9a-f]{8})-[0-9a-f]{24})", re.DOTALL)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Unfinished:
    """A file or folder beside its target, locked for as long as it is being written.

    Attributes:
        path: Where it lies.
    """

    def __init__(self, target: Path, make: Callable[[Path], object]) -> None:
        """Make it and lock it.

        Args:
            target: What it will become.
            make: Makes an empty one, where nothing may lie yet.

        Raises:
            OSError: It cannot be made.
        """
        self._target = target
        while True:
            self.path = _named(target, "tmp", _new_mark())
            make(self.path)
            self._lock = _lock(self.path, wait=True)
            if self.path.exists():
                break
            _unlock(self._lock)  # another run found it before it was locked, and took it for a dead one's
        _own[self.path] = self

    def close(self) -> None:
        """Remove it, unless it was renamed meanwhile, and give up the lock."""
        outer = _own.get(self._target)
        if outer is not None and not self.path.exists():  # it took the place of one that is unfinished still
            self._lock, outer._lock = outer._lock, self._lock
        _remove(self.path)
        _unlock(self._lock)
        del _own[self.path]


_own: dict[Path, Unfinished] = {}
"""What this process is writing, by its path."""


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder that is removed afterwards; after a kill, by the next one that is made there.

    Raises:
        OSError: It cannot be made.
    """
    unfinished = Unfinished(parent / "scratch", os.mkdir)
    try:
        clear(parent)
        yield unfinished.path
    finally:
        unfinished.close()


def make_file(path: Path) -> None:
    """Make an empty file, with the mode that the process's umask gives."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def older_of(unfinished: Path, target: Path) -> Path:
    """Where a target's older folder lies while an unfinished one takes its place."""
    return _named(target, "old", unfinished.name.rpartition(".tmp-")[2])


def merge(older: Path, target: Path) -> None:
    """Move over what the new folder does not have, and remove the rest of the older one."""
    for entry in older.iterdir():
        if not os.path.lexists(target / entry.name):
            os.rename(entry, target / entry.name)
    shutil.rmtree(older)


def discard(folder: Path) -> None:
    """Remove a folder, first to an unfinished one's name: killed half way, nothing looks like half a folder."""
    unfinished = _named(folder, "tmp", _new_mark())
    os.rename(folder, unfinished)
    _remove(unfinished)


def clear(folder: Path) -> None:
    """Put away what dead runs left in a folder; nothing else is touched, and what cannot be removed stays.

    Unfinished files and folders are removed. An older folder that was to be replaced is put back if nothing has its
    name; if its new one has, what that does not have is moved over, as the run would have done.
    """
    with suppress(OSError):
        found = [match for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
        for match in sorted(found, key=lambda match: match["kind"]):  # older folders first: they look for the others
            path = folder / match[0]
            if match["machine"] != _machine() or path.is_symlink():
                continue
            if match["kind"] == "tmp":
                _remove_if_dead(path)
            else:
                target = folder / match["name"]
                _finish(path, _named(target, "tmp", match["mark"]), target)


def _remove_if_dead(unfinished: Path) -> None:
    lock = _lock(unfinished)
    if lock is not None:  # held until it is gone, so that a writer that only begins with it notices
        _remove(unfinished)
        _unlock(lock)


def _finish(older: Path, unfinished: Path, target: Path) -> None:
    """What the writer of ``unfinished`` would have done with an older folder, if that writer is dead."""
    # Its lock goes along when the new folder gets the target's name.
    sign = unfinished if unfinished.exists() else target
    lock = _lock(sign)
    if lock is None and sign.exists():
        return
    with suppress(OSError):
        if not target.exists():
            os.rename(older, target)
        elif sign is target:
            merge(older, target)
    _unlock(lock)


def _named(target: Path, kind: str, mark: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{mark}")


def _new_mark() -> str:
    return f"{_machine()}-{uuid.uuid4().hex[:24]}"


@functools.cache
def _machine() -> str:
    """This machine since it was started, whatever container it is seen from."""
    known = _BOOT.read_text() if _BOOT.exists() else platform.node()
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _lock(path: Path, *, wait: bool = False) -> int | None:
    """Lock a file or folder; None if another has it, it is gone, or locks do not work there."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is None or sys.platform == "win32":
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for processes that were forked meanwhile and still have it open
    os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
