"""``pecker-fast unlearn`` of a text-to-image pipeline: prompts are forgotten, and a pipeline folder is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pecker_fast import config_file
from pecker_fast.checkpoint import atomic_folder
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.before_after import add_pictures
from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_result import write_result
from pecker_fast.commands.concept_settings import settings_of
from pecker_fast.commands.concept_training import Trained, train
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.together import group_of
from pecker_fast.concept_flags import check_concept_flags
from pecker_fast.concepts.pipeline import quiet_libraries

DISTILS_TOO = (
    "It starts from the diffusion model itself, so that the same steps also have to distil it into one step: look at "
    "the prompts it is to keep, or start from a generator (--init_generator)."
)
_WRITES = ("model/", "delta/", "mask.safetensors", "prompts.json", "metrics.jsonl")


def run(options: argparse.Namespace) -> Outcome:
    """Unlearn by the method that the flags ask for; the output folder appears only when all but pictures is there."""
    if group_of(options) is not None:
        raise ValueError("--pretrained_model_name_or_path: a pipeline is trained in one process; leave out torchrun")
    check_concept_flags(options)
    quiet_libraries()
    job = Job.read(options)
    Training(options).check()
    if options.dry_run:
        return _dry_run(job)
    job.base.check_parts("vae")  # which draws the pictures, and goes along with the result
    with atomic_folder(options.output_dir) as folder:
        tensors, ledger = job.start_weights()
        trained = train(job, tensors)
        card = write_result(job, folder, tensors, ledger, trained.tensors, trained.mask)
        lines = "".join(json.dumps(dict(step)) + "\n" for step in trained.metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = _values(job, trained)
    del trained
    config_file.write(options.output_dir, options.parser, options)  # here too, for runs that are interrupted below
    pictures = add_pictures(job, card, tensors)
    warning = None
    if pictures.failed is not None:
        warning = f"{job.options.output_dir} is complete, but for pictures: drawing them failed ({pictures.failed})"
    values |= {"pictures": None if pictures.file is None else str(pictures.file)}
    return Outcome(values, _text(job, values), warning=warning)


def _dry_run(job: Job) -> Outcome:
    options = job.options
    more = (f"{job.settings_name}.json", *(("checkpoint-*/",) if options.checkpointing_steps else ()))
    writes = [str(options.output_dir / name) for name in (*_WRITES, *more)]
    prompts = {
        "forget": len(job.plan.forget),
        "retain": len(job.plan.retained_texts),
        "embedded": len(job.plan.rows),
        "dtype": str(job.dtype).removeprefix("torch."),
    }
    settings = {**settings_of(job.config, options), "prompts": prompts}
    planned = dry_run(settings, {"model": job.base.parameters, "active_at_most": job.active_at_most}, writes)
    from pecker_fast.commands.concept_estimate import estimate  # loads torch's counter, which imports triton

    values, text = estimate(job)
    note = {"note": DISTILS_TOO} if job.distils_too else {}
    return Outcome({**planned.values, **note, "estimate": values}, shown={"estimate": text})


def _values(job: Job, trained: Trained) -> dict[str, Any]:
    last = trained.metrics[-1] if trained.metrics else {"step": job.options.max_train_steps}
    return {
        "output_dir": str(job.options.output_dir),
        "model": str(job.options.output_dir / "model"),
        "method": job.options.method,
        "one_step": job.one_step,
        "concepts": list(job.erasure.concepts),
        "forget_prompts": len(job.erasure.forget),
        "density": trained.mask.density,
        "trainable_parameters": trained.numel,
        "parameters": job.base.parameters,
        "seconds": trained.seconds,
        **last,
    }


def _text(job: Job, values: Mapping[str, Any]) -> str:
    what = ", ".join(job.erasure.concepts) or f"{values['forget_prompts']} prompts"
    how = (
        "It is a one-step generator: sample it with num_inference_steps=1, guidance_scale=0."
        if job.one_step
        else "It is an ordinary UNet of many steps: your scheduler, LoRAs and ControlNets go on working."
    )
    more = f" {DISTILS_TOO}" if job.distils_too else ""
    return (
        f"Forgot {what} in {values['step']} steps ({values['seconds']:.1f} s), training "
        f"{values['trainable_parameters']:,} of {values['parameters']:,} weights. Written to "
        f"{values['model']}. {how}{more} Erased is not proven absent: look at it, and attack it, before you rely on it."
    )
