"""The training of an erasure from a pipeline, and a sketch of it that holds nothing, for estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pecker_fast.baselines import Baseline, BaselineConfig
from pecker_fast.commands.concept_job import Job
from pecker_fast.commands.concept_settings import latents_per_prompt, one_guidance
from pecker_fast.commands.requests import own_samples
from pecker_fast.commands.resuming import Training
from pecker_fast.concepts.embedding import embed_prompts, unset_prompts
from pecker_fast.concepts.latents import own_latents
from pecker_fast.concepts.masters import replaced, start_masters
from pecker_fast.config import DistillConfig
from pecker_fast.data import ImageData
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.mask import BlockMask
from pecker_fast.mask_config import MaskConfig
from pecker_fast.score_model import TextConditional
from pecker_fast.step_metrics import check_finite


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


def train(job: Job, tensors: dict[str, Tensor]) -> Trained:
    """Train from ``tensors``, the weights that the UNet starts from; they are not changed.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    predict = embed_prompts(job.base, job.plan.rows, device=job.device, progress=not job.options.quiet)
    return (_distil if job.one_step else _baseline)(job, tensors, predict)


def sketch(job: Job) -> MaskedDistiller | Baseline:
    """The trainer that the job would have, on its device, with a random mask and weights that nobody has set.

    On a CPU memory that is never written to takes no room, so that this costs seconds for a large UNet too. A given
    mask is used as it is.
    """
    with torch.device("meta"):
        unet = job.base.empty_unet().to(job.dtype)
    job.prepare(unet.to_empty(device=job.device).eval())
    predict, schedule = unset_prompts(job.base, len(job.plan.rows), device=job.device), job.base.schedule()
    config = job.config
    mask = job.mask or _stand_in(config.mask, unet)
    if isinstance(config, DistillConfig):
        distiller = MaskedDistiller(unet, schedule, config, predict=predict)
        distiller.use_mask(mask, _stand_in(config.mask_of_fake_score, unet))
        return distiller
    labels = torch.tensor([*job.plan.forget, *job.plan.retain], device="cpu")
    data = ImageData(torch.zeros(len(labels), *config.sample_shape, device="cpu"), labels, job.plan.texts)
    baseline = Baseline(unet, schedule, config, data=data, predict=predict)
    baseline.use_mask(mask)
    return baseline


def _stand_in(mask: MaskConfig, unet: nn.Module) -> BlockMask:
    if mask.kind == "dense":
        return BlockMask.dense(unet, mask.region)
    return BlockMask.random(unet, mask.density, mask.block, region=mask.region)


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
    del original  # a UNet's worth of memory that is not looked at while it trains
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
    network, schedule = job.network(tensors), job.base.schedule()
    data = None
    if config.method == "random_label":
        count, guidance = latents_per_prompt(options), one_guidance(options)
        drawn = (network, schedule, config, job.plan, predict)
        data = own_latents(*drawn, count=count, guidance=guidance, progress=not options.quiet)
    baseline = Baseline(network, schedule, config, data=data, predict=predict)
    if job.mask is not None:
        baseline.use_mask(job.mask)
    else:
        baseline.build_mask(exclude=[erasure.delta.mask for erasure in job.earlier])
    start_masters(baseline.active, tensors)
    metrics = list(baseline.run(options.max_train_steps, progress=not options.quiet, label=options.method))
    for step in metrics:
        check_finite(step)
    with baseline.averaged():
        found = replaced(baseline.active, tensors)
    return Trained(found, baseline.active.mask, baseline.active.numel, metrics, time.perf_counter() - started)
