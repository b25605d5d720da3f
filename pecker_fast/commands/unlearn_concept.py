"""``pecker-fast unlearn`` of a text-to-image pipeline: prompts are forgotten, and a pipeline folder is written."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from pecker_fast.active import ActiveParameters
from pecker_fast.baselines import Baseline, BaselineConfig
from pecker_fast.checkpoint import atomic_folder
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_result import write_result
from pecker_fast.commands.concept_settings import latents_per_prompt, one_guidance, settings_of
from pecker_fast.commands.requests import own_samples
from pecker_fast.commands.resuming import Training
from pecker_fast.commands.together import group_of
from pecker_fast.concept_flags import check_concept_flags
from pecker_fast.concepts.embedding import embed_prompts
from pecker_fast.concepts.latents import own_latents
from pecker_fast.concepts.masters import replaced, start_masters
from pecker_fast.concepts.pipeline import quiet_libraries
from pecker_fast.config import DistillConfig
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.mask import BlockMask
from pecker_fast.score_model import TextConditional
from pecker_fast.step_metrics import check_finite

_WRITES = ("model/", "delta/", "mask.safetensors", "prompts.json", "metrics.jsonl")


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        tensors: Weights of the UNet as they are stored, the trained ones in their place.
        mask: Which ones trained.
        numel: How many.
        metrics: Of every step.
        seconds: How long it took.
    """

    tensors: dict[str, Tensor]
    mask: BlockMask
    numel: int
    metrics: Sequence[Mapping[str, float]]
    seconds: float


def run(options: argparse.Namespace) -> Outcome:
    """Unlearn by the method that the flags ask for; the output folder appears only when all of it is there."""
    if group_of(options) is not None:
        raise ValueError("--pretrained_model_name_or_path: a pipeline is trained in one process; leave out torchrun")
    check_concept_flags(options)
    quiet_libraries()
    job = Job.read(options)
    Training(options).check()
    if options.dry_run:
        return _dry_run(job)
    with atomic_folder(options.output_dir) as folder:
        tensors, ledger = job.start_weights()
        trained = _train(job, tensors)
        if options.num_validation_images != 0:
            gc.collect()  # the networks, before pictures are drawn
        write_result(job, folder, tensors, ledger, trained.tensors, trained.mask)
        lines = "".join(json.dumps(dict(step)) + "\n" for step in trained.metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = _values(job, trained)
    return Outcome(values, _text(job, values))


def _train(job: Job, tensors: dict[str, Tensor]) -> Trained:
    pipeline, progress = job.base, not job.options.quiet
    table = embed_prompts(pipeline, job.plan.rows, device=job.device, progress=progress)
    predict = TextConditional(table, pipeline.prediction_type, pipeline.schedule())
    return (_distil if job.one_step else _baseline)(job, tensors, predict)


def _distil(job: Job, tensors: dict[str, Tensor], predict: TextConditional) -> Trained:
    config, options = cast(DistillConfig, job.config), job.options
    apart = job.start is not job.base or job.earlier  # the generator does not start from the true score
    original = job.base.tensors() if apart else tensors
    true_score = job.network(original)
    generator = job.network(tensors) if apart else None
    training = Training(options, identity={"prompts": job.plan.to_dict()})
    distiller = MaskedDistiller(true_score, job.base.schedule(), config, generator=generator, predict=predict)
    training.resume(distiller)
    if distiller.mask is None:
        _choose_mask(job, distiller)
        start_masters(distiller.active, tensors)
        start_masters(distiller.fake_score_optimizer.active, original)
    training.run(distiller)
    seconds = training.total_seconds()
    with distiller.averaged():
        found = replaced(distiller.active, tensors)
    return Trained(found, distiller.active.mask, distiller.active.numel, training.metrics, seconds)


def _choose_mask(job: Job, distiller: MaskedDistiller) -> None:
    if job.mask is not None:
        distiller.use_mask(job.mask)
        return
    mask = job.config.mask
    own = job.earlier and mask.looks and mask.saliency == "noise_prediction"
    labels = range(len(job.erasure.forget))  # its own prompts come first
    batches = own_samples(distiller, labels) if own else None
    distiller.build_mask(batches, exclude=[erasure.delta.mask for erasure in job.earlier])


def _baseline(job: Job, tensors: dict[str, Tensor], predict: TextConditional) -> Trained:
    config, options, started = cast(BaselineConfig, job.config), job.options, time.perf_counter()
    network, schedule, progress = job.network(tensors), job.base.schedule(), not options.quiet
    latents = functools.partial(
        own_latents, network, schedule, config, job.plan, predict, count=latents_per_prompt(options)
    )
    data = latents(guidance=one_guidance(options), progress=progress) if config.method == "random_label" else None
    baseline = Baseline(network, schedule, config, data=data, predict=predict)
    if job.mask is not None:
        baseline.use_mask(job.mask)
    else:
        baseline.build_mask(exclude=[erasure.delta.mask for erasure in job.earlier])
    active: ActiveParameters = baseline.active
    start_masters(active, tensors)
    metrics = list(baseline.run(options.max_train_steps, progress=progress, label=options.method))
    for step in metrics:
        check_finite(step)
    with baseline.averaged():
        found = replaced(active, tensors)
    return Trained(found, active.mask, active.numel, metrics, time.perf_counter() - started)


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
    return dry_run(settings, {"model": job.parameters, "active_at_most": job.active_at_most}, writes)


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
        "parameters": job.parameters,
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
    return (
        f"Forgot {what} in {values['step']} steps ({values['seconds']:.1f} s), training "
        f"{values['trainable_parameters']:,} of {values['parameters']:,} weights. Written to "
        f"{values['model']}. {how} Erased is not proven absent: look at it, and attack it, before you rely on it."
    )
