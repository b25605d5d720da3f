"""Where a command writes, as its flags say: refused before it trains, kept from other runs while it does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast import checkpoint_folders, config_file
from pecker_fast.commands.together import is_first
from pecker_fast.errors import FileFormatError
from pecker_fast.evaluate_flags import BUILT_IN
from pecker_fast.output_check import check_apart
from pecker_fast.output_folder import Output

_NOT_INPUTS = ("config", "output_dir", "output", "output_file", "cache_dir", "resume_from_checkpoint")
_PATHS = ("DIR", "FILE", "PATH")
"""What flags that take a path call it."""
_WORDS = ("digits", BUILT_IN)
"""What some of them take instead: judges and detectors that come along."""
_STATE = 4
"""Weights, two moments and a running average: float32 numbers of a checkpoint for each weight that trains."""


@dataclass(frozen=True)
class Destination:
    """Where a command writes.

    Attributes:
        options: Its flags: ``output_dir``, or the file ``output`` or ``output_file``; ``overwrite``; all inputs.
        writes: What it puts into its folder, by names or patterns; of a file nothing.
        needs_bytes: Room that it takes, about.
        checkpoints: Kind of the checkpoints that it leaves there on the way.
    """

    options: argparse.Namespace
    writes: Sequence[str] = ()
    needs_bytes: int = 0
    checkpoints: str | None = None

    def check(self) -> None:
        """Refuse what would lose something, or could not be finished.

        Raises:
            FileFormatError: See `Output.check`; or checkpoints there are of another run, or hold something else.
        """
        resumed = self.options.resume_from_checkpoint if self.checkpoints else None
        if resumed not in (None, checkpoint_folders.LATEST) and not self._continues:
            check_apart(self._place, Path(resumed))
        if self._keeps_checkpoints and resumed is None and not self.options.overwrite:
            self._check_no_checkpoints()
        self._output.check()
        if self._keeps_checkpoints:
            checkpoint_folders.check_own(self._place, str(self.checkpoints))

    def _check_no_checkpoints(self) -> None:
        if older := checkpoint_folders.finished(self._place, str(self.checkpoints)):
            raise FileFormatError(
                f"{self._place}: has checkpoints of an earlier run, the last of step {max(older)}; continue it with "
                f"--resume_from_checkpoint latest, start anew with --overwrite, or choose another folder"
            )

    def planned(self, *more: str) -> list[str]:
        """What a dry run says would be written, once it is checked; ``more`` is written too.

        Raises:
            FileFormatError: As `check`.
        """
        self.check()
        if self._is_file:
            return [str(self._place)]
        return [str(self._place / name) for name in (*self.writes, *more, config_file.NAME)]

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder to write into, put in place when the block ends well, with ``config.yaml``; see `Output.claimed`.

        Of several processes the first one has it, the others a name that nothing is written to.

        Raises:
            FileFormatError: As `check`.
        """
        if not is_first(self.options):
            yield self._place
            return
        self.check()
        with self._output.claimed() as folder:
            if self._keeps_checkpoints and self.options.overwrite and not self.options.resume_from_checkpoint:
                checkpoint_folders.remove_all(self._place, str(self.checkpoints))
            yield folder
            if not self._is_file:
                self._write_flags(folder)

    @contextmanager
    def grown(self) -> Iterator[Path]:
        """The folder itself, for what grows in it and is gone on with; see `Output.opened`.

        Raises:
            FileFormatError: As `check`.
        """
        with self._output.opened(anew=self.options.overwrite) as folder:
            yield folder
            self._write_flags(folder)

    def extended(self) -> AbstractContextManager[Path]:
        """See `Output.extended`; there was room for the result, and what is added is small."""
        return replace(self._output_with(replace=True), needs_bytes=0).extended()

    @property
    def file_name(self) -> str:
        """Of the one file that it writes: where a link leads, what it is called there."""
        return self._output.name

    # -- from flags --------------------------------------------------------------------------------

    @property
    def _is_file(self) -> bool:
        return not hasattr(self.options, "output_dir")

    @property
    def _place(self) -> Path:
        flag = next(name for name in ("output_dir", "output_file", "output") if hasattr(self.options, name))
        place: Path = getattr(self.options, flag)
        return place

    @property
    def _keeps_checkpoints(self) -> bool:
        return self.checkpoints is not None and any(
            getattr(self.options, name, None) is not None for name in ("checkpointing_steps", "max_train_seconds")
        )

    @property
    def _continues(self) -> bool:
        """Whether it goes on from a checkpoint in its own folder."""
        resumed: str | None = getattr(self.options, "resume_from_checkpoint", None)
        if resumed is None or resumed == checkpoint_folders.LATEST:
            return resumed is not None
        root = os.path.dirname(os.path.abspath(resumed))
        return os.path.realpath(root) == os.path.realpath(self._place)

    @property
    def _output(self) -> Output:
        return self._output_with(replace=self.options.overwrite or self._continues)

    def _output_with(self, *, replace: bool) -> Output:
        options = self.options
        rest: dict[str, Any] = {"replace": replace, "inputs": inputs_of(options), "needs_bytes": self.needs_bytes}
        if self._is_file:
            return Output.of_file(self._place, options.command, **rest)
        writes = (*self.writes, config_file.NAME)
        return Output(Path(os.path.realpath(self._place)), options.command, writes, **rest)

    def _write_flags(self, folder: Path) -> None:
        """As they were given, but for ``--overwrite``: who runs them again is to be asked again."""
        asked = getattr(self.options, "asked", self.options)
        again = argparse.Namespace(**vars(asked) | {"overwrite": False})
        config_file.write(folder, asked.parser, again, shown=self._place)


def inputs_of(options: argparse.Namespace) -> tuple[Path, ...]:
    """Files and folders that the flags of a command name to be read."""
    found: list[Path] = []
    for action in options.parser._actions:
        if action.dest in _NOT_INPUTS or action.metavar not in _PATHS:
            continue
        value = getattr(options, action.dest)
        found += [Path(one) for one in (value if isinstance(value, list) else [value]) if one not in (None, *_WORDS)]
    return tuple(found)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Room that they take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_in(folders: Iterable[Path]) -> int:
    """Room that all files in some folders take."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def bytes_of_checkpoints(options: argparse.Namespace, trained: int) -> int:
    """Of all that lie there at the end, where ``trained`` weights of all networks change."""
    if options.checkpointing_steps is None:
        return 0
    count = max(1, options.max_train_steps // options.checkpointing_steps)
    return int(min(count, options.checkpoints_total_limit or count) * _STATE * 4 * trained)
