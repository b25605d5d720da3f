"""The scheduler of a pipeline folder, as two pieces of text that are put in and taken out again byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pecker_fast.errors import FileFormatError
from pecker_fast.models.one_step_scheduler import one_step_t_init
from pecker_fast.models.pipeline_files import INDEX, SCHEDULER, index_with_scheduler, scheduler_entry

METADATA = "scheduler"
"""Key in a delta's metadata: ``{"before": ..., "after": ...}`` where the training changed the scheduler too."""


@dataclass(frozen=True)
class PipelineScheduler:
    """Which scheduler a pipeline has.

    Attributes:
        library: As the index names it, "diffusers" for example.
        class_name: Its class.
        config: The text of ``scheduler/scheduler_config.json``.
    """

    library: str
    class_name: str
    config: str

    @classmethod
    def read(cls, pipeline: Path) -> PipelineScheduler:
        """That of a folder.

        Raises:
            FileFormatError: The index names none, or its settings are missing or damaged.
        """
        library, class_name = scheduler_entry(pipeline)
        file = pipeline / SCHEDULER
        try:
            found = cls(library, class_name, file.read_bytes().decode("utf-8"))
            found.settings()
        except OSError as error:
            raise FileFormatError(f"{file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise FileFormatError(f"{file}: truncated or not JSON ({error})") from error
        return found

    @classmethod
    def of(cls, scheduler: Any) -> PipelineScheduler:
        """A scheduler of diffusers, as its ``save_pretrained`` writes it."""
        return cls("diffusers", type(scheduler).__name__, scheduler.to_json_string())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PipelineScheduler:
        """From ``to_dict``.

        Raises:
            TypeError, ValueError: It is something else.
        """
        found = cls(**values)
        if not all(isinstance(value, str) for value in asdict(found).values()):
            raise TypeError("expected texts")
        found.settings()
        return found

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """Its settings, without what diffusers notes down about itself."""
        values = json.loads(self.config)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        return {name: value for name, value in values.items() if not name.startswith("_")}

    def same_as(self, other: PipelineScheduler) -> bool:
        """Whether both sample alike."""
        return self.class_name == other.class_name and self.settings() == other.settings()

    def is_one_step(self, t_init: int) -> bool:
        """Whether it makes the one step of a generator that starts at ``t_init``."""
        return one_step_t_init(json.loads(self.config)) == t_init

    def put_in(self, pipeline: Path) -> None:
        """Make it the scheduler of a folder, in place.

        Raises:
            FileFormatError: The index names none, or a file cannot be written.
        """
        index = index_with_scheduler(pipeline, self.library, self.class_name)
        try:
            (pipeline / INDEX).write_text(index, encoding="utf-8", newline="")
            (pipeline / SCHEDULER).write_bytes(self.config.encode("utf-8"))
        except OSError as error:
            raise FileFormatError(f"{pipeline}: cannot be written ({error.strerror})") from error


def scheduler_change(before: PipelineScheduler, after: PipelineScheduler) -> dict[str, Any]:
    """What a delta from one pipeline to another keeps in its metadata; empty where both sample alike."""
    return {} if before.same_as(after) else {METADATA: {"before": before.to_dict(), "after": after.to_dict()}}


def switched(current: PipelineScheduler, metadata: Mapping[str, Any], applied: bool) -> PipelineScheduler:
    """The scheduler that a pipeline needs once a delta with this metadata was applied to it, or reverted from it.

    Raises:
        ValueError: It has neither the scheduler that the delta's base has nor the one that the result needs; or the
            delta does not know the scheduler that its one-step generator needs, and the pipeline has another.
    """
    change = metadata.get(METADATA)
    if change is None:
        if applied:
            _check_one_step(current, metadata)
        return current
    try:
        before, after = (PipelineScheduler.from_dict(change[key]) for key in ("before", "after"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the delta's metadata has a damaged scheduler ({error!r}); get the delta again") from error
    if not applied:
        return before if current.same_as(after) else current  # somebody's own choice stays
    if current.same_as(before) or current.same_as(after):
        return after
    raise ValueError(
        f"the delta also changes the scheduler, from {before.class_name} to {after.class_name}, and the pipeline has "
        f"{_described(current)}, which would be lost; put that of the delta's base back (it is in the delta's "
        f"pecker_config.json), and choose your own after applying"
    )


def _check_one_step(current: PipelineScheduler, metadata: Mapping[str, Any]) -> None:
    one_step, t_init = _generation(metadata)
    if one_step and not (isinstance(t_init, int) and current.is_one_step(t_init)):
        raise ValueError(
            f"the delta makes a generator that draws in one step from timestep {t_init}, and the pipeline has "
            f"{_described(current)}, with which it would draw noise; extract the delta from two pipeline folders: it "
            f"takes the scheduler along then"
        )


def _generation(metadata: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether the result draws in one step, and from which timestep."""
    generation = metadata.get("generation")
    if isinstance(generation, Mapping):
        return generation.get("kind") == "one_step", generation.get("t_init")
    return metadata.get("one_step") is True, metadata.get("t_init")


def _described(scheduler: PipelineScheduler) -> str:
    return f"{scheduler.class_name} of {scheduler.settings().get('num_train_timesteps')} timesteps"
