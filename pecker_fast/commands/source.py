"""The pretrained diffusion model that a command starts from, and the distiller's settings for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import models
from pecker_fast.classes import Classes
from pecker_fast.commands.classes import chosen, retain_of
from pecker_fast.commands.dataset import load_images
from pecker_fast.config import SWITCHES, DistillConfig
from pecker_fast.draws import check_timesteps
from pecker_fast.errors import FileFormatError
from pecker_fast.mask_config import MaskConfig
from pecker_fast.schedule import NoiseSchedule

# Flag -> field; flags that are not given keep the field's default, which is written down in config.py alone.
DISTILL_FIELDS = {
    "train_batch_size": "batch_size",
    "forget_batch_size": "forget_batch_size",
    "generator_lr": "generator_lr",
    "fake_score_lr": "fake_score_lr",
    "lr_warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "ema_decay": "ema_decay",
    "sid_alpha": "sid_alpha",
    "t_init": "t_init",
    "t_min": "t_min",
    "t_max": "t_max",
    "retain_weight": "retain_weight",
    "forget_weight": "forget_weight",
    "seed": "seed",
}
SWITCH_FLAGS = ("preset", *SWITCHES)
_MASK_FIELDS = {
    "mask": "kind",
    "mask_density": "density",
    "block": "block",
    "mask_scope": "scope",
    "mask_region": "region",
    "mask_norms": "norms",
    "mask_budget": "budget",
    "mask_rank": "rank",
    "mask_accumulate": "accumulate",
    "mask_batches": "batches",
    "mask_batch_size": "batch_size",
    "mask_lr_scale": "lr_scale",
    "mask_lr_scale_max": "lr_scale_max",
    "saliency": "saliency",
    "saliency_warmup": "saliency_warmup",
}


@dataclass(frozen=True)
class Source:
    """A class-conditional diffusion model from a folder."""

    model: nn.Module
    schedule: NoiseSchedule
    num_classes: int
    sample_shape: tuple[int, int, int]

    @property
    def classes(self) -> Classes:
        """Their names, and which of them had images."""
        found = Classes.of_module(self.model)
        return found if found is not None and found.count == self.num_classes else Classes(self.num_classes)

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def torch_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def load_source(folder: Path, device: str) -> Source:
    """Read the model that is to forget.

    Raises:
        FileFormatError: The folder is missing or damaged, or holds no pretrained diffusion model.
        ValueError: The device does not exist.
    """
    config = models.load_config(folder)
    generation = config["generation"]
    if generation is None or generation["kind"] != "ddim":
        kind = "no diffusion model" if generation is None else "a distilled one-step generator"
        raise FileFormatError(
            f"{folder}: is {kind}; expected a pretrained diffusion model, whose config.json has "
            f"generation kind 'ddim', as pecker-fast pretrain writes it"
        )
    model = models.load(folder).to(torch_device(device))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    channels, height, width = generation["sample_shape"]
    schedule = NoiseSchedule.from_dict(generation["schedule"])
    return Source(model, schedule, config["architecture"]["num_classes"], (channels, height, width))


def distill_config(
    options: argparse.Namespace,
    source: Source,
    *,
    forget: Sequence[int] | None = None,
    override: Sequence[int] | None = None,
    retain: tuple[int, ...] | None = None,
    defaults: Mapping[str, Any] | None = None,
    mask: Mapping[str, Any] | None = None,
) -> DistillConfig:
    """The settings that the flags ask for, checked against the model.

    Args:
        options: The flags; one that is missing or None was not given.
        source: The model.
        forget: Classes; None takes those of the flags, with their overrides.
        override: What takes the place of ``forget``.
        retain: Classes that are kept; None are all others that the model ever saw.
        defaults: Fields for which no flag was given; the rest is left to ``DistillConfig``.
        mask: Fields of the mask that have the last word.

    Raises:
        ValueError: An unknown class, a number out of range, or a timestep that the model's schedule does not have.
    """
    if forget is None:
        asked = chosen(options, source.classes)
        forget, override, retain = asked.forget, asked.override, asked.retain
    given = fields_of(options, DISTILL_FIELDS) | switches(options)
    if getattr(options, "fake_score_mask", None) == "same":
        given["fake_score_mask"] = "same"
    if getattr(options, "clip_value", None) is not None:
        given["clip_value"] = options.clip_value or None
    config = DistillConfig(
        forget=tuple(forget),
        override=None if override is None else tuple(override),
        retain=retain_of(source.classes, forget, retain),
        num_classes=source.num_classes,
        sample_shape=source.sample_shape,
        mask=MaskConfig(**mask_settings(options) | dict(mask or {})),
        **dict(defaults or {}) | given,
    )
    check_timesteps(config, source.schedule)
    return config


def switches(options: argparse.Namespace) -> dict[str, Any]:
    """Preset and switches that were given."""
    return fields_of(options, {name: name for name in SWITCH_FLAGS})


def forget_batches(folder: Path, source: Source, config: DistillConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of given images of the classes to forget, for the saliency pass.

    Raises:
        FileFormatError: The folder is empty, or its classes are not the model's.
        ValueError: The images cannot be averaged to the model's size, or a class to forget has none.
    """
    data = load_images(folder, source)
    Classes.of_images(data).check_seen("--forget_class", config.forget, f"in {folder}")
    chosen = torch.isin(data.labels, torch.tensor(config.forget, device="cpu")).nonzero().flatten()
    generator = torch.Generator().manual_seed(config.seed)
    size = config.forget_samples
    draws = [
        chosen[torch.randint(len(chosen), (size,), generator=generator, device="cpu")]
        for _ in range(config.mask.batches)
    ]
    return ((data.images[draw], data.labels[draw]) for draw in draws)


def mask_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a mask that were given."""
    return fields_of(options, _MASK_FIELDS)


def fields_of(options: argparse.Namespace, fields: Mapping[str, str]) -> dict[str, Any]:
    """Field -> value of the flags that were given, by a table of flag -> field."""
    values = {field: getattr(options, flag, None) for flag, field in fields.items()}
    return {field: value for field, value in values.items() if value is not None}
