"""Prompts as the UNet sees them: embedded once, by the pipeline's own text encoders, which are then let go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.concepts.support import pooled_width
from pecker_fast.models.one_step_scheduler import diffusers_library
from pecker_fast.models.pipeline_families import STABLE_DIFFUSION_XL, class_of
from pecker_fast.score_model import TextConditional

BATCH = 32
NULL_PROMPT = ""


@torch.no_grad()
def embed_prompts(
    pipeline: PipelineFolder,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> TextConditional:
    """How the pipeline's UNet is asked for prompts: what ``encode_prompt(prompts)`` of diffusers gives, in batches.

    The text encoders are loaded for as long as this takes. ``encode_prompt`` cuts prompts that are too long:
    ``pipeline.check_prompts`` refuses them before. A UNet of Stable Diffusion XL is also told the pipeline's own image
    size, uncropped, and where the pipeline says ``force_zeros_for_empty_prompt`` its null prompt is zeros.

    Args:
        pipeline: The folder.
        prompts: Texts; "" is the null prompt. A label is a place among them.
        device: Where the text encoders run, and the tables lie.
        progress: Whether to show a bar on stderr.

    Returns:
        The predictor, with (prompts, tokens, width) embeddings in the dtype of the text encoders.

    Raises:
        FileFormatError: The scheduler has no table of alphas; a text encoder has values that are NaN.
        ImportError: diffusers or transformers is not installed.
    """
    pipeline.check_parts(*pipeline.family.text_encoders)
    encoder = _encoder(pipeline, device)
    found = []
    with tqdm(total=len(prompts), desc="prompts", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            found.append(
                encoder.encode_prompt(
                    some, device=torch.device(device), num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            )
            bar.update(len(some))
    embeddings = torch.cat([each[0] for each in found])
    if pipeline.family != STABLE_DIFFUSION_XL:
        return _predictor(pipeline, embeddings)
    pooled = torch.cat([each[2] for each in found])
    if pipeline.index.get("force_zeros_for_empty_prompt", True):
        null = torch.tensor([prompt == NULL_PROMPT for prompt in prompts], device=embeddings.device)
        embeddings[null], pooled[null] = 0, 0
    return _predictor(pipeline, embeddings, pooled)


def unset_prompts(pipeline: PipelineFolder, count: int, *, device: torch.device | str = "cpu") -> TextConditional:
    """As many prompts as ``embed_prompts`` would give, with zeros for embeddings and no text encoder: for estimates.

    Raises:
        FileFormatError: The tokenizer cannot be read, or the scheduler has no table of alphas.
        ImportError: diffusers or transformers is not installed.
    """
    config, tokens = pipeline.unet_config, pipeline.tokenizer().model_max_length
    embeddings = torch.zeros(count, tokens, config["cross_attention_dim"], device=device)
    if pipeline.family != STABLE_DIFFUSION_XL:
        return _predictor(pipeline, embeddings)
    return _predictor(pipeline, embeddings, torch.zeros(count, pooled_width(config), device=device))


def _predictor(pipeline: PipelineFolder, embeddings: Tensor, pooled: Tensor | None = None) -> TextConditional:
    added = {} if pooled is None else {"text_embeds": pooled, "time_ids": _time_ids(pipeline, pooled)}
    return TextConditional(embeddings, pipeline.prediction_type, pipeline.schedule(), added)


def _time_ids(pipeline: PipelineFolder, pooled: Tensor) -> Tensor:
    """(rows, 6): original size, crop from the top and the left, size that is asked for."""
    size = pipeline.image_size
    return torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=pooled.device).repeat(len(pooled), 1)


def _encoder(pipeline: PipelineFolder, device: torch.device | str) -> Any:
    """The pipeline of diffusers with its text encoders alone."""
    family = pipeline.family
    kept = {"scheduler", *family.tokenizers, *family.text_encoders}
    absent = {name for name in pipeline.index if class_of(pipeline.index, name) is not None} - kept
    encoder = getattr(diffusers_library(), family.pipeline).from_pretrained(
        pipeline.path, **{**dict.fromkeys(absent), **family.plain}, local_files_only=True, use_safetensors=True
    )
    for name in family.text_encoders:
        getattr(encoder, name).to(device).eval()
    return encoder
