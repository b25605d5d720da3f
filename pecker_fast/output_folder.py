"""Where a result is written: nothing that this package did not write is ever removed.

All that is written goes into a folder of the user's, which stays what it is: results are made aside in it, put in place
once they are complete, and recorded (`pecker_fast.written`). One run at a time writes a result.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from pecker_fast import written
from pecker_fast.checkpoint import StrPath, atomic_folder
from pecker_fast.errors import FileFormatError
from pecker_fast.locks import LockedError, check_free, held
from pecker_fast.output_check import check_apart, check_entries, check_place
from pecker_fast.written import WHOLE, Result, described, foreign


@dataclass(frozen=True)
class Output:
    """A result that is to be written.

    Attributes:
        folder: Where it goes, links resolved.
        command: What writes it; only results of the same command are replaced.
        writes: Names or patterns of what it puts into the folder, as far as they are known before.
        name: `WHOLE`, or the name of the one file that the result is.
        replace: Whether an older result may go.
        inputs: Files and folders that are read.
        needs_bytes: Room that it takes on the disk, about.
    """

    folder: Path
    command: str
    writes: tuple[str, ...] = ()
    name: str = WHOLE
    replace: bool = False
    inputs: tuple[Path, ...] = ()
    needs_bytes: int = 0

    @classmethod
    def of_file(
        cls, file: StrPath, command: str, *, replace: bool = False, inputs: tuple[Path, ...] = (), needs_bytes: int = 0
    ) -> Output:
        """A result that is one file, in a folder that may hold others."""
        path = Path(os.path.realpath(file))
        return cls(path.parent, command, (escape(path.name),), path.name, replace, inputs, needs_bytes)

    @property
    def place(self) -> Path:
        """What the user calls it."""
        return self.folder if self.name == WHOLE else self.folder / self.name

    def check(self) -> None:
        """Refuse what would lose something, or could not be finished; nothing is written.

        Raises:
            FileFormatError: The target is, holds or lies in an input; it cannot be written, or there is no room for it;
                another run writes there; or something is in the way that must stay.
        """
        for source in self.inputs:
            check_apart(self.place, source)
        if self.name != WHOLE and self.place.is_dir():
            raise FileFormatError(f"{self.place}: is a folder, but a file is to be written; name a file in it")
        if self.name != WHOLE and self.folder.exists() and not self.folder.is_dir():
            raise FileFormatError(f"{self.place}: cannot write into {self.folder}, a file; choose another folder")
        check_place(self.folder, self.needs_bytes)
        with self._others_named():
            check_free(self._own("lock"))
        self._check_entries(self.writes)

    @contextmanager
    def claimed(self) -> Iterator[Path]:
        """Keep other runs out, and put in place what the block writes; when it fails, all is as it was.

        Yields:
            An empty folder to write into, on the same disk.

        Raises:
            FileFormatError: As `check` says; or something came into the way meanwhile: the result is kept beside it.
        """
        with self._held():
            ready = self._own("ready")
            with atomic_folder(ready) as staged:
                yield staged
            try:
                self._put_in_place(ready)
            except FileFormatError as error:
                kept = self.folder / f"complete-{uuid.uuid4().hex[:8]}"
                os.rename(ready, kept)  # it may have taken hours; nothing removes that name
                raise FileFormatError(f"{error}; what was to be written is complete in {kept}") from error

    @contextmanager
    def opened(self, *, anew: bool = False) -> Iterator[Path]:
        """Keep other runs out of a folder that results grow in, such as one line a run.

        Args:
            anew: Whether an older result is removed first; else it is gone on with.

        Yields:
            The folder itself.

        Raises:
            FileFormatError: As `check` says.
        """
        with self._held():
            if anew:
                self._remove({top for top in self._older_tops() if os.path.lexists(self.folder / top)})
            growing = dict.fromkeys(self.writes) | dict.fromkeys(self._older_tops())
            self._keep(Result(self.command, growing))
            try:
                yield self.folder
            finally:
                self._keep(described(self.command, self.folder, growing))

    @contextmanager
    def extended(self) -> Iterator[Path]:
        """Add files to the finished result, or replace some of its own, as the block writes them.

        Yields:
            An empty folder to write into, with the paths that the files are to have.

        Raises:
            FileFormatError: A file of the user's is in the way, or another run writes there.
        """
        with self._held():
            ready = self._own("ready")
            with atomic_folder(ready) as staged:
                yield staged
            more, older = described(self.command, ready), self._result()
            files = [name for name, found in more.entries.items() if found]
            self._check_names(files, older)
            self._keep(more.merged(older))  # either is ours until the last one is in place
            for name in files:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(ready / name, self.folder / name)
            self._keep(more if older is None else Result(self.command, {**older.entries, **more.entries}))
            shutil.rmtree(ready)

    # -- the parts ---------------------------------------------------------------------------------

    def _own(self, what: str) -> Path:
        """A name in the folder that no result has."""
        return self.folder / (f".pecker_fast.{what}" if self.name == WHOLE else f".pecker_fast.file.{self.name}.{what}")

    def _result(self) -> Result | None:
        return written.read(self.folder).get(self.name)

    def _older_tops(self) -> set[str]:
        older = self._result()
        return set() if older is None else older.tops

    def _keep(self, result: Result) -> None:
        written.keep(self.folder, self.name, result)

    def _check_entries(self, writes: tuple[str, ...]) -> None:
        check_entries(self.folder, self.name, self.command, writes, self.replace)

    def _check_names(self, files: list[str], older: Result | None) -> None:
        for name in files:
            if (wrong := foreign(self.folder, (name,), older)) is not None:
                raise FileFormatError(f"{wrong[0]}: {wrong[1]}, and {self.command} would write there; move it away")

    @contextmanager
    def _others_named(self) -> Iterator[None]:
        try:
            yield
        except LockedError as error:
            raise FileFormatError(
                f"{self.place}: another run writes there ({error}); wait for it, or choose another name"
            ) from error
        except OSError as error:
            raise FileFormatError(
                f"{self.place}: cannot write into {self.folder} ({error.strerror}); choose another folder"
            ) from error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The checks, the folder, the lock; what a killed run left is tidied up."""
        self.check()
        with ExitStack() as stack:
            stack.enter_context(_made(self.folder))
            with self._others_named():
                stack.enter_context(held(self._own("lock")))
            self._tidy_up()
            self._check_entries(self.writes)
            yield

    def _tidy_up(self) -> None:
        shutil.rmtree(self._own("ready"), ignore_errors=True)
        older = self._own("older")
        for entry in list(older.iterdir()) if older.is_dir() else ():
            if not os.path.lexists(self.folder / entry.name):
                os.rename(entry, self.folder / entry.name)
        self._remove_older()

    def _put_in_place(self, ready: Path) -> None:
        """Rename entry by entry; each is the old one, the new one, or, for a moment, neither."""
        for record in ready.rglob(written.NAME):
            record.unlink()  # of a model that was copied, or of the functions that wrote the parts
        new, old = described(self.command, ready), self._result()
        self._check_entries(tuple(map(escape, new.tops)))  # hours may have passed
        self._keep(new.merged(old))  # from here on either is ours, whenever we are killed
        moved: list[Callable[[], None]] = []
        try:
            self._move_aside(new.tops | self._older_tops(), moved)
            for top in sorted(new.tops):
                _rename(ready / top, self.folder / top, moved)
        except BaseException as error:
            for back in reversed(moved):
                back()
            if isinstance(error, OSError):
                raise FileFormatError(f"{self.place}: cannot be put in place ({error})") from error
            raise
        self._keep(new)
        ready.rmdir()
        self._remove_older()

    def _move_aside(self, tops: set[str], moved: list[Callable[[], None]]) -> None:
        aside = self._own("older")
        for top in sorted(tops):
            if os.path.lexists(self.folder / top):
                aside.mkdir(exist_ok=True)
                _rename(self.folder / top, aside / top, moved)

    def _remove(self, tops: set[str]) -> None:
        self._move_aside(tops, [])
        self._remove_older()

    def _remove_older(self) -> None:
        """What was moved aside was looked at just before: it is ours, all of it."""
        shutil.rmtree(self._own("older"), ignore_errors=True)


def claim(
    folder: StrPath, command: str, writes: tuple[str, ...] = (), *, replace: bool = False
) -> AbstractContextManager[Path]:
    """Write a result into a folder, for functions that know no inputs: see `Output.claimed`."""
    return Output(Path(os.path.realpath(folder)), command, writes, replace=replace).claimed()


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, with the parents that it lacks; what was made and stays empty is removed again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):  # there is something in it now
                place.rmdir()


def _rename(source: Path, target: Path, moved: list[Callable[[], None]]) -> None:
    os.rename(source, target)
    moved.append(lambda: os.rename(target, source))
