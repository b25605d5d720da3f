"""``pecker-fast unlearn`` of a text-to-image pipeline: prompts are forgotten, and a pipeline folder is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.before_after import add_pictures
from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_result import write_result
from pecker_fast.commands.concept_settings import settings_of
from pecker_fast.commands.concept_training import Trained, train
from pecker_fast.commands.output import Destination, bytes_in, bytes_of_checkpoints
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.together import group_of
from pecker_fast.concept_flags import check_concept_flags
from pecker_fast.concepts.pipeline import quiet_libraries
from pecker_fast.config import DistillConfig
from pecker_fast.distill_checkpoint import KIND

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
    output = _output(job)
    if options.dry_run:
        return _dry_run(job, output)
    job.base.check_parts("vae")  # which draws the pictures, and goes along with the result
    with output.folder() as folder:
        tensors, ledger = job.start_weights()
        trained = train(job, tensors)
        card = write_result(job, folder, tensors, ledger, trained.tensors, trained.mask)
        lines = "".join(json.dumps(dict(step)) + "\n" for step in trained.metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = _values(job, trained)
    del trained
    pictures = add_pictures(job, output, card, tensors)
    warning = None
    if pictures.failed is not None:
        warning = f"{job.options.output_dir} is complete, but for pictures: drawing them failed ({pictures.failed})"
    values |= {"pictures": None if pictures.file is None else str(pictures.file)}
    return Outcome(values, _text(job, values), warning=warning)


def _output(job: Job) -> Destination:
    trained = job.active_at_most
    if isinstance(job.config, DistillConfig):
        trained += trained if job.config.fake_score_mask else job.base.parameters
    copied = [job.base.path / name for name in job.base.components - {"unet"}]
    weights = 2 * job.base.parameters  # or twice that, where the file has float32
    room = bytes_in(copied) + weights + bytes_of_checkpoints(job.options, trained)
    return Destination(job.options, (*_WRITES, f"{job.settings_name}.json"), room, KIND)


def _dry_run(job: Job, output: Destination) -> Outcome:
    options = job.options
    writes = output.planned(*(("checkpoint-*/",) if options.checkpointing_steps else ()))
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
