"""What an erasure from a pipeline will take, for a dry run: memory by part, and time."""

from __future__ import annotations

from typing import Any

from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_training import sketch
from pecker_fast.memory_estimate import describe, estimate_memory
from pecker_fast.time_estimate import By, estimate_seconds

_LARGE = 50_000_000
"""Weights of a network that a CPU takes minutes to run once."""


def estimate(job: Job) -> tuple[dict[str, Any], str]:
    """Of the job's trainer, with a mask by chance and weights that nobody has set: as JSON has it, and for people.

    On a GPU a network of that size is run there once; on a CPU a large one is not run, and the time is a bound.
    """
    trainer = sketch(job)
    memory = estimate_memory(trainer, job.device.type)
    by: By = "matmul" if job.device.type == "cpu" and job.base.parameters > _LARGE else "network"
    time = estimate_seconds(trainer, job.options.max_train_steps, by=by)
    values = {"memory_bytes": memory.to_dict(), "seconds": time.seconds, "step_seconds": time.step_seconds}
    return values, describe(memory, time)
