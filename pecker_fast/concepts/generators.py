"""Whether a one-step generator belongs to a pipeline: the same UNet, size, schedule and text encoders."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pecker_fast.concepts.pipeline import SETTINGS, PipelineFolder
from pecker_fast.concepts.support import files_of
from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer
from pecker_fast.models.one_step_scheduler import betas_of

_FLOATS = ("F64", "F32", "F16", "BF16")
_SAME_BETA = 1e-6  # schedulers hold their tables in float32


def check_generator(generator: PipelineFolder, base: PipelineFolder) -> None:
    """Refuse a generator that was not made of this pipeline, as far as files tell.

    Of the weights those of text encoders are compared alone: a UNet that trained is to differ.

    Raises:
        FileFormatError: Shapes of weights or of latents, what the UNet predicts, the betas, or a text encoder differ.
        ImportError: diffusers is not installed.
    """
    if generator.shapes != base.shapes:
        raise FileFormatError(
            f"{generator.path}: its UNet has other weights than that of {base.path}; take one of that model"
        )
    if generator.sample_shape != base.sample_shape:
        raise FileFormatError(
            f"{generator.path}: draws latents of {generator.sample_shape}, {base.path} of {base.sample_shape}"
        )
    if generator.prediction_type != base.prediction_type:
        raise FileFormatError(
            f"{generator.path}: prediction_type is {generator.prediction_type!r}, that of {base.path} is "
            f"{base.prediction_type!r}"
        )
    _check_schedule(generator, base)
    for component in base.family.text_encoders:
        _check_text_encoder(generator, base, component)


def _check_schedule(generator: PipelineFolder, base: PipelineFolder) -> None:
    """A one-step generator's betas end where it starts."""
    own = betas_of(generator.schedule())
    for t, (beta, expected) in enumerate(zip(own, betas_of(base.schedule()), strict=False)):
        if abs(beta - expected) > _SAME_BETA:
            raise FileFormatError(
                f"{generator.path / SETTINGS}: beta {t} is {beta:.6g}, that of {base.path} is {expected:.6g}; it was "
                f"made of a model with another noise schedule"
            )


def _check_text_encoder(generator: PipelineFolder, base: PipelineFolder, component: str) -> None:
    own, expected = (files_of(folder.path / component) for folder in (generator, base))
    if len(own) == len(expected) and all(filecmp.cmp(*pair, shallow=False) for pair in zip(own, expected, strict=True)):
        return
    mine, theirs = _names(own), _names(expected)
    if other := sorted(mine.keys() ^ theirs.keys()):
        raise FileFormatError(_another(generator.path / component, base, other[0]))
    for name in mine:
        if not _same(_tensor(mine[name], name), _tensor(theirs[name], name)):
            raise FileFormatError(_another(generator.path / component, base, name))


def _another(encoder: Path, base: PipelineFolder, name: str) -> str:
    return (
        f"{encoder}: {name} is not that of {base.path}; prompts are embedded by that one, and "
        f"the generator must know them so: take one that was made of this model"
    )


def _names(files: list[Path]) -> dict[str, Path]:
    """Name of each weight -> its file; buffers of integers come and go with versions of transformers."""
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as stored:
            names = stored.keys()
            found |= {name: file for name in names if stored.get_slice(name).get_dtype() in _FLOATS}
    return found


def _tensor(file: Path, name: str) -> Tensor:
    with _opened(file) as stored:
        tensor: Tensor = stored.get_tensor(name)
        return tensor


def _opened(file: Path) -> Any:
    refuse_pointer(file)
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{file}: truncated or not a safetensors file ({error})") from error


def _same(one: Tensor, other: Tensor) -> bool:
    """In the dtype of fewer bits: half of a pipeline is often stored in float16."""
    coarse = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarse), other.to(coarse))
