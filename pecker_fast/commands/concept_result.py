"""What an erasure from a pipeline writes: the pipeline, the delta, the mask, the record and the card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pecker_fast
from pecker_fast.checkpoint import write_json
from pecker_fast.commands.concept_job import Job
from pecker_fast.concepts.card import Card
from pecker_fast.concepts.output import extract_delta, write_pipeline
from pecker_fast.concepts.record import write_record
from pecker_fast.config import DistillConfig
from pecker_fast.delta import Ledger
from pecker_fast.mask import BlockMask
from pecker_fast.models.one_step_scheduler import one_step_scheduler
from pecker_fast.models.pipeline_scheduler import PipelineScheduler, scheduler_change


def write_result(
    job: Job, folder: Path, before: Mapping[str, Tensor], ledger: Ledger, after: Mapping[str, Tensor], mask: BlockMask
) -> Card:
    """Write all of it into ``folder``, which the caller makes complete or absent.

    Returns:
        The card as it was written: pictures come later, once the rest is safe on the disk.

    Raises:
        FileFormatError: A file cannot be written.
    """
    config = job.config
    scheduler = None
    if isinstance(config, DistillConfig):
        scheduler = one_step_scheduler(job.base.schedule(), config.t_init, job.base.prediction_type)
    name = f"erase {', '.join(job.erasure.concepts)}" if job.erasure.concepts else f"forget {_count(job)} prompts"
    metadata = {
        "method": job.options.method,
        "one_step": job.one_step,
        "concepts": list(job.erasure.concepts),
        "t_init": config.t_init if isinstance(config, DistillConfig) else None,
    }
    if scheduler is not None:
        metadata |= scheduler_change(PipelineScheduler.read(job.start.path), PipelineScheduler.of(scheduler))
    delta, carried = extract_delta(before, after, mask, ledger, name=name, metadata=metadata)
    write_pipeline(job.base, folder / "model", after, carried, scheduler)
    delta.save(folder / "delta")
    mask.save(folder / "mask.safetensors")
    write_json(folder / f"{job.settings_name}.json", config.to_dict())
    write_record(folder, job.plan, job.erasure, delta, {"method": job.options.method, "one_step": job.one_step})
    card = _card(job, mask)
    card.write(folder / "model")
    return card


def _count(job: Job) -> int:
    return len(job.erasure.forget)


def _card(job: Job, mask: BlockMask) -> Card:
    options, config, erasure = job.options, job.config, job.erasure
    return Card(
        job.base,
        "pecker" if options.method == "distill" else options.method,
        job.one_step,
        erasure.concepts,
        erasure.forget,
        erasure.override,
        mask.density,
        _shown(job, config),
    )


def _shown(job: Job, config: Any) -> dict[str, Any]:
    """Settings for the card; all of them are in the settings file beside the model."""
    rates = ("generator_lr", "fake_score_lr") if job.one_step else ("learning_rate",)
    names = ("batch_size", *rates, "retain_weight", "forget_weight", "seed", *(("t_init",) if job.one_step else ()))
    return {
        "steps": job.options.max_train_steps,
        "mask": f"{config.mask.kind}, blocks {config.mask.block}, asked for {config.mask.density}",
        "part of the UNet": job.options.train_method or "full",
        "precision of frozen weights": str(job.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in names},
        "pecker_fast": pecker_fast.__version__,
        "torch": torch.__version__,
    }
