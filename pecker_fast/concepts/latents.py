"""Latents that a pipeline's own UNet draws for prompts, for methods that train on images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecker_fast.baselines import BaselineConfig
from pecker_fast.baselines.data import generated
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.data import ImageData
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.score_model import Predict
from pecker_fast.stopping import fresh_seed


def own_latents(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: BaselineConfig,
    plan: PromptPlan,
    predict: Predict,
    *,
    count: int,
    guidance: float = 7.5,
    progress: bool = False,
) -> ImageData:
    """``count`` latents of each forgotten and each retained prompt, by DDIM with classifier-free guidance.

    Args:
        unet: The network, in eval mode.
        schedule: Its noise schedule.
        config: ``sample_shape``, ``sampling_steps``, ``clip_samples``, ``batch_size`` and ``seed`` have a say.
        plan: The prompts.
        predict: How it is asked, for example ``TextConditional(...)``.
        count: Latents of each prompt.
        guidance: ``eps_null + guidance (eps_c - eps_null)``; 1 asks for the prompt alone.
        progress: Whether to show a bar on stderr.

    Returns:
        float32 latents (N, *sample_shape) and the labels of their prompts, on the CPU.
    """
    device = next(unet.parameters()).device

    def model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if guidance == 1.0:
            return predict(unet, x_t, t, labels)
        null = torch.full_like(labels, config.num_classes)
        twice = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, labels]))
        without, with_prompt = twice.chunk(2)
        return without + guidance * (with_prompt - without)

    labels = torch.tensor([*plan.forget, *plan.retain], device=device).repeat_interleave(count)
    rng = torch.Generator(device).manual_seed(fresh_seed("latents", config.seed))
    drawn = generated(model, schedule, config, labels, rng, torch.float32, progress=progress)
    return ImageData(drawn.images.float().cpu(), drawn.labels.cpu(), plan.texts)
