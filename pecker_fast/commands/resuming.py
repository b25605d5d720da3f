"""Training that can be interrupted: checkpoints in the output folder on the way, and where to continue from."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pecker_fast.checkpoint_folders import LATEST, remove_oldest
from pecker_fast.commands.judging import Stop
from pecker_fast.distill_checkpoint import KIND
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.step_metrics import check_finite


@dataclass
class Training:
    """One training, in this process and those that it continues.

    Attributes:
        options: ``output_dir``, ``max_train_steps``, ``checkpointing_steps``, ``checkpoints_total_limit``,
            ``resume_from_checkpoint`` and ``quiet``.
        stop: The check that may end it, and how often it is asked.
        identity: What else a checkpoint must have been saved with, as JSON values: name -> value.
        metrics: Of every step so far, and of its check if there was one.
        seconds: What earlier processes took.
        stopped: The step after which ``stop`` ended it.
    """

    options: argparse.Namespace
    stop: Stop | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: int | None = None
    _started: float = field(default_factory=time.perf_counter)
    _written: Path | None = None

    def check(self) -> None:
        """Refuse settings that do not go together, before anything is done.

        Raises:
            ValueError: A limit on checkpoints, and none are written.
        """
        options = self.options
        if options.checkpoints_total_limit is not None and options.checkpointing_steps is None:
            raise ValueError("--checkpoints_total_limit: there are no checkpoints; give --checkpointing_steps too")

    def resume(self, distiller: MaskedDistiller) -> None:
        """Load the checkpoint that was asked for, if one was.

        Raises:
            FileFormatError: It is missing, unfinished or damaged.
            ValueError: It does not belong to these settings or this model, or is beyond the last step.
        """
        options, wanted = self.options, self.options.resume_from_checkpoint
        if wanted is None:
            return
        loaded = distiller.load_checkpoint(wanted, options.output_dir if wanted == LATEST else None)
        if loaded.step > options.max_train_steps:
            raise ValueError(
                f"--max_train_steps {options.max_train_steps}: {loaded.folder} has done {loaded.step} steps already"
            )
        for name, value in self.identity.items():
            if loaded.extra.get(name) != value:
                raise ValueError(f"{loaded.folder}: was saved with other {name}; resume with those it was saved with")
        self._trim(loaded.folder, distiller)
        self.metrics, self.seconds = list(loaded.extra.get("metrics", [])), loaded.extra.get("seconds", 0.0)
        saved = loaded.extra.get("stop")
        if self.stop is not None and saved is not None and saved["rule"] == str(self.stop.check.rule):
            self.stop.check.load_state_dict(saved)
            self.stopped = saved["stopped"]

    def _trim(self, latest: Path, distiller: MaskedDistiller) -> None:
        """Remove what a process that was killed after it saved had no time to remove."""
        limit = self.options.checkpoints_total_limit
        if limit is not None and distiller.ranks.rank == 0 and self.options.resume_from_checkpoint == LATEST:
            remove_oldest(self.options.output_dir, KIND, latest, limit)

    def run(self, distiller: MaskedDistiller, label: str = "unlearn") -> None:
        """Train up to ``max_train_steps`` or until ``stop`` says so, with a checkpoint every ``checkpointing_steps``.

        With checkpoints, SIGINT and SIGTERM wait for the step to end, and one is written then.

        Raises:
            KeyboardInterrupt: Interrupted; it says what is left.
            NonFiniteError: A loss is NaN or infinite, be it of the last step: what would be saved is no good then.
        """
        every = self.options.checkpointing_steps
        steps = 0 if self.stopped is not None else self.options.max_train_steps - distiller.steps_done
        try:
            with stop_after_step() if every else nullcontext(_never) as interrupted:
                for metrics in distiller.run(steps, progress=not self.options.quiet, label=label):
                    verdict = self._verdict(distiller)  # which waits for the step; a step without one is not waited for
                    self.metrics.append({**metrics, **verdict} if verdict else metrics)
                    leave = every is not None and _anywhere(interrupted(), distiller)
                    if every and (leave or distiller.steps_done % every == 0):
                        self._save(distiller)
                    if leave:
                        raise KeyboardInterrupt
                    if self.stopped is not None:
                        break
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(*self._left()) from interrupt
        self._check_finite()

    def _verdict(self, distiller: MaskedDistiller) -> dict[str, float]:
        """What a check found, if one is due."""
        if self.stop is None or distiller.steps_done % self.stop.every:
            return {}
        verdict = self.stop.check(distiller)
        if verdict.stop:
            self.stopped = distiller.steps_done
        return verdict.values()

    def last_metrics(self) -> Mapping[str, float]:
        """Of the last step; a checkpoint that was not written here may have none."""
        return self.metrics[-1] if self.metrics else {"step": self.options.max_train_steps}

    def total_seconds(self) -> float:
        """Time that the whole training took so far."""
        return self.seconds + time.perf_counter() - self._started

    def _check_finite(self) -> None:
        """Look at what the loop was too early for, on a device that computes behind it."""
        for metrics in self.metrics:
            check_finite(metrics)

    def _save(self, distiller: MaskedDistiller) -> None:
        self._check_finite()
        options = self.options
        extra: dict[str, Any] = {**self.identity, "metrics": self.metrics, "seconds": self.total_seconds()}
        if self.stop is not None:
            check = self.stop.check
            extra["stop"] = {"rule": str(check.rule), "stopped": self.stopped, **check.state_dict()}
        limit = options.checkpoints_total_limit
        self._written = distiller.save_checkpoint(options.output_dir, total_limit=limit, extra=extra)

    def _left(self) -> tuple[str, ...]:
        if self._written is None:
            return ()
        return (f"{self._written} is complete; the same command with --resume_from_checkpoint latest continues",)


@contextmanager
def stop_after_step() -> Iterator[Callable[[], bool]]:
    """Within the block a first SIGINT or SIGTERM is only noted, for a loop to look at; a second one interrupts.

    Yields:
        Whether there was one.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield _never
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _anywhere(flag: bool, distiller: MaskedDistiller) -> bool:
    """Whether it is so in any of the processes that train together: they must leave after the same step."""
    return bool(distiller.ranks.gather(torch.tensor([int(flag)], device="cpu")).any())


def _never() -> bool:
    return False
