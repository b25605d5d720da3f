"""The text-to-image pipelines that are supported: what each is made of, and what draws with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pecker_fast.checkpoint import read_json
from pecker_fast.errors import FileFormatError


@dataclass(frozen=True)
class PipelineFamily:
    """Pipelines with a ``UNet2DConditionModel`` that are asked alike.

    Attributes:
        name: For people.
        tag: For model cards.
        pipeline: The class of diffusers that embeds prompts and draws.
        tokenizers: Folders of them.
        text_encoders: Folders of them, each with the tokenizer at its place.
        addition_embed_type: Of the UNet: what it is asked beside the prompt.
        plain: Arguments of ``from_pretrained`` that leave out whatever is laid over images.
    """

    name: str
    tag: str
    pipeline: str
    tokenizers: tuple[str, ...]
    text_encoders: tuple[str, ...]
    addition_embed_type: str | None
    plain: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needed(self) -> tuple[str, ...]:
        """Folders that are read."""
        return ("unet", "scheduler", *self.tokenizers, *self.text_encoders, "vae")


STABLE_DIFFUSION = PipelineFamily(
    "Stable Diffusion",
    "stable-diffusion",
    "StableDiffusionPipeline",
    ("tokenizer",),
    ("text_encoder",),
    None,
    {"safety_checker": None, "requires_safety_checker": False},
)
STABLE_DIFFUSION_XL = PipelineFamily(
    "Stable Diffusion XL",
    "stable-diffusion-xl",
    "StableDiffusionXLPipeline",
    ("tokenizer", "tokenizer_2"),
    ("text_encoder", "text_encoder_2"),
    "text_time",
    {"add_watermarker": False},
)
FAMILIES = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)


def family_of(index: Mapping[str, Any]) -> PipelineFamily:
    """By ``model_index.json``: a second text encoder is Stable Diffusion XL's."""
    return STABLE_DIFFUSION if class_of(index, "text_encoder_2") is None else STABLE_DIFFUSION_XL


def class_of(index: Mapping[str, Any], component: str) -> str | None:
    """What ``model_index.json`` says: [library, class], or nulls where there is none."""
    match index.get(component):
        case [str(), str(name)]:
            return name
    return None


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels of what a pipeline draws unless it is told otherwise.

    Raises:
        FileFormatError: The settings of the UNet or the VAE do not say it.
    """
    size = read_json(folder / "unet" / "config.json").get("sample_size")
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not isinstance(blocks, list) or not blocks:
        raise FileFormatError(f"{folder}: expected sample_size of the UNet and block_out_channels of the VAE")
    factor = 1 << (len(blocks) - 1)
    return int(sides[0]) * factor, int(sides[1]) * factor
