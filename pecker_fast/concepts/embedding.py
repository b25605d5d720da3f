"""Prompts as the UNet sees them: embedded once, by the pipeline's own text encoder, which is then let go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.models.one_step_scheduler import diffusers_library

BATCH = 32


@torch.no_grad()
def embed_prompts(
    pipeline: PipelineFolder,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """What ``StableDiffusionPipeline.encode_prompt(prompts, device, 1, False)`` gives, in batches of 32.

    The text encoder is loaded for as long as this takes. ``encode_prompt`` cuts prompts that are too long:
    ``pipeline.check_prompts`` refuses them before.

    Args:
        pipeline: The folder.
        prompts: Texts; "" is the null prompt.
        device: Where the text encoder runs, and the result lies.
        progress: Whether to show a bar on stderr.

    Returns:
        (prompts, tokens, width), in the dtype of the text encoder.

    Raises:
        ImportError: diffusers or transformers is not installed.
    """
    absent = dict.fromkeys(("unet", "vae", "safety_checker", "feature_extractor", "image_encoder"))
    encoder = diffusers_library().StableDiffusionPipeline.from_pretrained(
        pipeline.path, **absent, requires_safety_checker=False, local_files_only=True, use_safetensors=True
    )
    encoder.text_encoder.to(device).eval()
    parts = []
    with tqdm(total=len(prompts), desc="prompts", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            parts.append(encoder.encode_prompt(some, torch.device(device), 1, False)[0])
            bar.update(len(some))
    return torch.cat(parts)
