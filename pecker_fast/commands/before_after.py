"""Pictures of an erasure that is on the disk already: where its training started, and what came out."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.output import Destination
from pecker_fast.concepts.card import PICTURE, Card
from pecker_fast.concepts.pictures import Drawing, draw, grid
from pecker_fast.config import DistillConfig
from pecker_fast.models.one_step_scheduler import one_step_scheduler


@dataclass(frozen=True)
class Pictures:
    """What became of them.

    Attributes:
        file: Where they are; None if there are none.
        failed: Why there are none though they were asked for.
    """

    file: Path | None = None
    failed: str | None = None


def add_pictures(job: Job, output: Destination, card: Card, tensors: Mapping[str, Tensor]) -> Pictures:
    """Draw them into ``model/`` of the finished result, and say so in its card; what is there stays, come what may.

    Args:
        job: What was done.
        output: Where it is.
        card: As it was written, without pictures.
        tensors: The weights that the training started from.

    Raises:
        FileFormatError: The card cannot be written.
        KeyboardInterrupt: Interrupted; it says what is there.
    """
    options = job.options
    if options.num_validation_images == 0:
        return Pictures()
    gc.collect()  # the networks that trained
    model = options.output_dir / "model"
    try:
        picture = _draw(job, model, tensors)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"{options.output_dir} is complete, but for pictures") from interrupt
    except (
        Exception
    ) as error:  # of the libraries that draw, or no memory left: no reason to lose what trained for hours
        _write(output, replace(card, undrawn=type(error).__name__), None)
        return Pictures(failed=f"{type(error).__name__}: {error}")
    _write(output, replace(card, picture=_caption(job)), picture)
    return Pictures(model / PICTURE)


def _write(output: Destination, card: Card, picture: Any | None) -> None:
    with output.extended() as folder:
        (folder / "model").mkdir()
        card.write(folder / "model")
        if picture is not None:
            picture.save(folder / "model" / PICTURE, format="png")


def _draw(job: Job, model: Path, tensors: Mapping[str, Tensor]) -> Any:
    options = job.options
    drawing = Drawing(
        tuple(options.validation_prompts or [*job.erasure.forget[:2], *job.plan.retained_texts[:2]]),
        2 if options.num_validation_images is None else options.num_validation_images,
        options.seed or 0,
        _many(job),
        device=job.device,
        dtype=job.dtype,
    )
    before = draw(job.start.path, drawing, one_step=_one_step_before(job), parts=_parts(job, tensors))
    after = draw(model, drawing, one_step=job.one_step)
    left = "before" if job.start is job.base and not job.earlier else "start"
    titles = f"{left}, {_steps(job, _one_step_before(job))}", f"after, {_steps(job, job.one_step)}"
    return grid(drawing.prompts, before, after, titles)


def _parts(job: Job, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the training started from and no folder has: weights with the deltas of earlier erasures."""
    if not job.earlier:
        return {}
    parts: dict[str, Any] = {"unet": job.base.unet(dict(tensors), job.dtype)}
    if isinstance(job.config, DistillConfig):
        parts["scheduler"] = one_step_scheduler(job.base.schedule(), job.config.t_init, job.base.prediction_type)
    return parts


def _one_step_before(job: Job) -> bool:
    return job.start.t_init is not None or (job.one_step and bool(job.earlier))


def _caption(job: Job) -> str:
    what = "the base model" if job.start is job.base else "the generator that the training started from"
    what += " with the earlier erasures" if job.earlier else ""
    left, right = _steps(job, _one_step_before(job)), _steps(job, job.one_step)
    return f"Left: {what}, in {left}. Right: this model, in {right}."


def _steps(job: Job, one_step: bool) -> str:
    count = 1 if one_step else _many(job)
    return f"{count} step{'s' * (count > 1)}"


def _many(job: Job) -> int:
    return int(job.options.validation_steps or 25)
