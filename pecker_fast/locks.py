"""Lock files: one process at a time holds one, and the system gives it back when that process dies, however it dies."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pecker_fast.errors import PeckerFastWarning

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockedError(Exception):
    """Another process holds the lock; the text says which, if it is known."""


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock until the block ends; its file is removed then.

    Args:
        path: The lock file, made if it is not there; one that a killed process left is taken over.
        wait: Whether to wait for another process rather than to raise.

    Raises:
        LockedError: Another process holds it.
        OSError: The file cannot be made.
    """
    descriptor = _acquire(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held; whoever opened it before sees below that it is gone
        os.close(descriptor)


def check_free(path: Path) -> None:
    """Look whether anybody holds a lock, and make no file.

    Raises:
        LockedError: Another process does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # no such file, or none that we may read: whoever wants the lock will see
        return
    try:
        _lock(descriptor, path, shared=True)
    finally:
        os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path, wait=wait)
            if _is_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process before us removed it when it was done


def _lock(descriptor: int, path: Path, *, wait: bool = False, shared: bool = False) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _TAKEN:
            raise LockedError(os.pread(descriptor, 200, 0).decode(errors="replace") or "another process") from error
        text = f"{path}: this file system locks no files ({error.strerror}); see to it that only one run writes here"
        warnings.warn(text, PeckerFastWarning, stacklevel=2)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
