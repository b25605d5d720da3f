"""What the flags of ``pecker-fast unlearn`` ask for where the folder is a pipeline, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from pecker_fast.baseline_flags import BASELINE_FIELDS, SALUN, SHARED_FIELDS
from pecker_fast.baselines import BaselineConfig, salun, salun_mask_config
from pecker_fast.commands.source import DISTILL_FIELDS, fields_of, mask_settings, switches
from pecker_fast.concept_flags import ESD, SFD, is_one_step
from pecker_fast.concepts import recipe
from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.concepts.prompts import TEMPLATES, read_prompts
from pecker_fast.concepts.request import Erasure
from pecker_fast.concepts.train_methods import region_of
from pecker_fast.config import DistillConfig, GuidanceConfig
from pecker_fast.draws import check_timesteps
from pecker_fast.mask_config import MaskConfig

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS_PER_PROMPT = 8


def read_erasure(options: argparse.Namespace) -> Erasure:
    """What is erased, and what takes its place.

    Raises:
        FileFormatError: A file of prompts cannot be read.
        ValueError: Prompts that do not go together, see ``Erasure.of``.
    """
    files = {name: getattr(options, name) for name in ("forget_prompts", "override_prompts", "prompt_templates")}
    read = {name: None if file is None else read_prompts(file) for name, file in files.items()}
    if read["prompt_templates"] is not None and (options.erase_concept is None or read["forget_prompts"] is not None):
        raise ValueError("--prompt_templates: are filled with --erase_concept, where no --forget_prompts are given")
    return Erasure.of(
        options.erase_concept,
        options.override_concept,
        forget=read["forget_prompts"],
        override=read["override_prompts"],
        templates=read["prompt_templates"] or TEMPLATES,
    )


def read_plan(options: argparse.Namespace, erasure: Erasure) -> PromptPlan:
    """The labels of all prompts.

    Raises:
        FileFormatError: The prompts to keep cannot be read.
        ValueError: There are none, and the method needs them; or prompts that contradict each other.
    """
    if options.retain_prompts is None and options.method != ESD:
        raise ValueError(f"--retain_prompts: --method {options.method} needs prompts to keep, one a line")
    kept = () if options.retain_prompts is None else read_prompts(options.retain_prompts)
    return PromptPlan.of(erasure, kept, options.negative_prompt)


def distill_config(options: argparse.Namespace, pipeline: PipelineFolder, plan: PromptPlan) -> DistillConfig:
    """The settings of a one-step generator: those published for Stable Diffusion where no flag was given.

    Raises:
        ValueError: A number out of range, or a timestep that the schedule does not have.
    """
    given = fields_of(options, {**DISTILL_FIELDS, "micro_batch_size": "micro_batch_size"}) | switches(options)
    if options.clip_value is not None:
        given["clip_value"] = options.clip_value or None
    if options.share_frozen_weights is not None:
        given["share_frozen_weights"] = options.share_frozen_weights
    dense = options.method == SFD or options.mask == "dense"
    if options.fake_score_mask != "dense" and not dense:
        given["fake_score_mask"] = "same"  # all of it has more state than one card of 24 GB holds
    mask: dict[str, Any] = {"kind": "dense"} if options.method == SFD else {}
    config = DistillConfig(
        **plan.labels,
        sample_shape=pipeline.sample_shape,
        mask=_mask(options, pipeline, mask),
        **{**recipe.DISTILL, "guidance": _guidance(options), **given},
    )
    check_timesteps(config, pipeline.schedule())
    return config


def baseline_config(options: argparse.Namespace, pipeline: PipelineFolder, plan: PromptPlan) -> BaselineConfig:
    """The settings of a method that leaves a UNet of many steps: those published for it where no flag was given.

    Raises:
        FileFormatError: The scheduler has no schedule to train with.
        ValueError: A number out of range, or more sampling steps than the schedule has.
    """
    config = _baseline_config(options, pipeline, plan)
    timesteps = pipeline.schedule().num_train_timesteps
    if config.sampling_steps > timesteps:
        raise ValueError(
            f"--num_inference_steps: expected at most the schedule's {timesteps}, got {config.sampling_steps}"
        )
    return config


def _baseline_config(options: argparse.Namespace, pipeline: PipelineFolder, plan: PromptPlan) -> BaselineConfig:
    labels = {name: value for name, value in plan.labels.items() if name != "negative"}
    given = fields_of(options, BASELINE_FIELDS | SHARED_FIELDS | {"share_frozen_weights": "share_frozen_weights"})
    if options.max_grad_norm is not None:
        given["max_grad_norm"] = options.max_grad_norm or None
    settings: dict[str, Any] = {**labels, "sample_shape": pipeline.sample_shape}
    if options.method == SALUN:
        size = given.get("forget_batch_size") or given.get("batch_size") or recipe.SALUN["batch_size"]
        batches = -(-len(plan.forget) * latents_per_prompt(options) // size)
        published = salun_mask_config(batches=batches, batch_size=None).to_dict()
        return salun(**settings, mask=_mask(options, pipeline, published), **{**recipe.SALUN, **given})
    looks = {} if options.mask_density is None else {"kind": "saliency"}
    mask = _mask(options, pipeline, {"kind": "dense", **looks})
    kept = {"retain_weight": 1.0} if plan.retained_texts else {}  # published ESD keeps nothing
    if options.guidance_scale is not None:
        given["sampling_guidance"] = one_guidance(options)
    return BaselineConfig(method="esd", **settings, mask=mask, **{**recipe.ESD, **kept, **given})


def latents_per_prompt(options: argparse.Namespace) -> int:
    """Of salun."""
    return int(options.latents_per_prompt or LATENTS_PER_PROMPT)


def one_guidance(options: argparse.Namespace, default: float = 7.5) -> float:
    """The guidance with which a model of many steps samples.

    Raises:
        ValueError: There are several.
    """
    given = options.guidance_scale or [default]
    if len(given) != 1:
        raise ValueError(f"--guidance_scale: expected one number with --method {options.method}, got {len(given)}")
    return float(given[0])


def training_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Of the networks while they train; active weights have float32 masters whatever it is."""
    precision = options.mixed_precision or ("bf16" if device.type == "cuda" else "no")
    return _DTYPES[precision] or torch.float32


def settings_of(config: DistillConfig | BaselineConfig, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, for a dry run and for the record."""
    one_step = is_one_step(options)
    return {"method": options.method, "one_step": one_step, "max_train_steps": options.max_train_steps} | asdict(config)


def _guidance(options: argparse.Namespace) -> GuidanceConfig:
    published: GuidanceConfig = recipe.DISTILL["guidance"]
    values = asdict(published)
    if options.guidance_scale is not None:
        scales = options.guidance_scale
        if len(scales) not in (1, 3):
            raise ValueError(f"--guidance_scale: expected one number, or three, got {len(scales)}")
        each = scales * 3 if len(scales) == 1 else scales
        values |= dict(zip(("fake_score_update", "fake_score", "true_score"), each, strict=True))
    if options.negative_in is not None:
        if options.negative_prompt is None:
            raise ValueError("--negative_in: says where --negative_prompt has a say; give that too")
        values["negative_in"] = tuple(options.negative_in)
    if options.prompt_dropout is not None:
        values["dropout"] = options.prompt_dropout
    return GuidanceConfig(**values)


def _mask(options: argparse.Namespace, pipeline: PipelineFolder, defaults: Mapping[str, Any]) -> MaskConfig:
    """The mask that is asked for; a default density is at most what its part of the UNet holds."""
    found = {**defaults, **mask_settings(options)}
    if options.train_method is not None:
        found["region"] = region_of(options.train_method, pipeline.shapes)
    mask = MaskConfig(**found)
    held = pipeline.share_of(mask.region)
    if mask.kind == "dense" or mask.density <= held:
        return mask
    if options.mask_density is not None:
        raise ValueError(
            f"--mask_density {mask.density:g}: --train_method or --mask_region holds {held:.4f} of the UNet's weights, "
            f"of which the density is a share; ask for at most that"
        )
    return replace(mask, density=held)
