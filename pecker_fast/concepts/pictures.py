"""Before and after: the same prompts from the same noise, by two pipeline folders, in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pecker_fast.checkpoint import read_json
from pecker_fast.concepts.pipeline import INDEX
from pecker_fast.models.one_step_scheduler import diffusers_library
from pecker_fast.models.pipeline_families import family_of

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST = 96  # pixels; smaller images are hard to see, and captions do not fit
_LARGEST = 256
_GAP, _TEXT = 6, 16


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        prompts: One row of the picture each.
        count: Pictures of each.
        seed: Of the noise: picture i of every prompt starts from seed + i.
        steps: Denoising steps of a pipeline that takes many.
        guidance: Its guidance scale.
        device: Where.
        dtype: Of the networks.
    """

    prompts: tuple[str, ...]
    count: int
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


def draw(
    folder: Path, drawing: Drawing, *, one_step: bool = False, parts: Mapping[str, Any] | None = None
) -> list[list[Image]]:
    """Pictures of each prompt, by the folder's own scheduler and VAE, and under its own safety checker if it has one.

    Args:
        folder: The pipeline.
        drawing: How.
        one_step: Whether it draws in one step, without guidance.
        parts: Components that take the place of the folder's own, by name.

    Raises:
        ImportError: diffusers is not installed.
    """
    kind = getattr(diffusers_library(), family_of(read_json(folder / INDEX)).pipeline)
    pipeline = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts or {})
    pipeline.to(drawing.device, drawing.dtype)
    pipeline.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    if one_step:
        how = {"num_inference_steps": 1, "guidance_scale": 0.0}
    rows = []
    for prompt in drawing.prompts:
        noise = [torch.Generator("cpu").manual_seed(drawing.seed + number) for number in range(drawing.count)]
        rows.append(list(pipeline(prompt, num_images_per_prompt=drawing.count, generator=noise, **how).images))
    return rows


def grid(
    prompts: Sequence[str],
    before: Sequence[Sequence[Image]],
    after: Sequence[Sequence[Image]],
    titles: tuple[str, str] = ("before", "after"),
) -> Image:
    """One picture: a row for each prompt, under its text; before on the left, after on the right, under ``titles``."""
    from PIL import Image, ImageDraw

    images = [[_sized(image) for image in (*left, *right)] for left, right in zip(before, after, strict=True)]
    count, (width, height) = len(before[0]), images[0][0].size
    half = count * (width + _GAP)
    picture = Image.new("RGB", (2 * half + 4 * _GAP, len(images) * (height + _TEXT + _GAP) + _TEXT), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((_GAP, 2), titles[0], fill="black")
    pen.text((half + 4 * _GAP, 2), titles[1], fill="black")
    for row, (prompt, drawn) in enumerate(zip(prompts, images, strict=True)):
        top = _TEXT + row * (height + _TEXT + _GAP)
        pen.text((_GAP, top + 2), _latin(prompt), fill="dimgray")
        for column, image in enumerate(drawn):
            left = _GAP + column * (width + _GAP) + (3 * _GAP if column >= count else 0)
            picture.paste(image, (left, top + _TEXT))
    return picture


def _sized(image: Image) -> Image:
    from PIL import Image

    if image.width < _SMALLEST:
        scale = -(-_SMALLEST // image.width)
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if image.width > _LARGEST:
        return image.resize((_LARGEST, image.height * _LARGEST // image.width), Image.Resampling.LANCZOS)
    return image


def _latin(text: str) -> str:
    """As far as the built-in font goes."""
    return text.encode("latin-1", "replace").decode("latin-1")
