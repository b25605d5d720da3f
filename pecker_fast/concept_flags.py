"""Flags of ``pecker-fast unlearn`` for pipelines, and which flag has a say for which kind of folder and method."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from pecker_fast.baseline_flags import DISTILL, SALUN, check_flags
from pecker_fast.concepts.train_methods import TRAIN_METHODS
from pecker_fast.config import GuidedPart
from pecker_fast.flags import on_off, positive_float, positive_int, share

PECKER, SFD, ESD = "pecker", "sfd", "esd"
METHODS = (PECKER, SFD, ESD, SALUN)
"""Of pipelines; ``distill`` is another name of ``pecker``."""
PROMPT_FLAGS = (
    *("forget_prompts", "erase_concept", "override_concept", "override_prompts", "prompt_templates"),
    *("retain_prompts", "negative_prompt"),
)
_CONCEPT_FLAGS = (
    *PROMPT_FLAGS,
    *("init_generator", "train_method", "mixed_precision", "gradient_checkpointing", "micro_batch_size"),
    *("guidance_scale", "negative_in", "prompt_dropout", "latents_per_prompt", "share_frozen_weights"),
    *("validation_prompts", "num_validation_images", "validation_steps"),
)
_CLASS_FLAGS = (
    *(
        "forget_class",
        "override_class",
        "retain_class",
        "init",
        "stop_on",
        "stop_every",
        "stop_samples",
        "judge",
        "cache_dir",
    ),
    *("train_data_dir", "null_class", "ewc_weight", "fisher_samples", "fisher_timesteps", "replay_samples"),
)
_ONE_STEP_FLAGS = ("init_generator", "micro_batch_size", "negative_prompt", "negative_in", "prompt_dropout")
_RULES = {ESD: ("override_concept", "override_prompts", "latents_per_prompt"), SALUN: (), DISTILL: ()}
"""Method -> flags of pipelines that have no say in it."""


def concept_flags(parser: argparse.ArgumentParser) -> None:
    """What only pipelines have."""
    _prompt_flags(parser)
    group = parser.add_argument_group(
        "of pipelines",
        "--method pecker (also distill) trains a masked one-step generator, sfd a dense one: sampled with "
        "num_inference_steps=1, guidance_scale=0. esd and salun leave the ordinary UNet of many steps, for which your "
        "scheduler, LoRAs and ControlNets go on working.",
    )
    add = group.add_argument
    add("--init_generator", type=Path, metavar="DIR", help="pipeline of a one-step generator to start from")
    add(
        "--train_method", choices=TRAIN_METHODS, help="part of the UNet that may train: attn2, all but it, attn1 (full)"
    )
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="of frozen weights (bf16 on CUDA, no on a CPU)")
    add("--gradient_checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--micro_batch_size", type=positive_int, metavar="N", help="samples in the networks at a time (all)")
    add("--share_frozen_weights", type=on_off, metavar="{on,off}", help="one storage for what no mask touches (on)")
    add(
        "--guidance_scale",
        type=positive_float,
        nargs="+",
        metavar="X",
        help="of pecker and sfd: one, or fake score's update, fake score, true score (4.5); of esd, salun: when they "
        "sample (3; 7.5)",
    )
    parts = get_args(GuidedPart)
    add("--negative_in", choices=parts, nargs="+", help="where the negative prompt has a say (true_score)")
    add("--prompt_dropout", type=share, metavar="X", help="share of empty prompts in the fake score's update (0.1)")
    add("--latents_per_prompt", type=positive_int, metavar="N", help="salun trains on so many of each prompt (8)")
    add("--validation_prompts", nargs="+", metavar="TEXT", help="of the pictures (two forgotten, two retained ones)")
    add("--num_validation_images", type=int, metavar="N", help="pictures of each, before and after; 0 for none (2)")
    add("--validation_steps", type=positive_int, metavar="N", help="denoising steps of them, where there are many (25)")


def _prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of pipelines: what to forget, and what takes its place")
    add = group.add_argument
    add("--erase_concept", metavar="TEXT", help="words to erase; several concepts are separated by ;")
    add("--forget_prompts", type=Path, metavar="FILE", help="prompts to forget (templates filled with the concept)")
    add("--prompt_templates", type=Path, metavar="FILE", help="templates, {} for the concept (8 built-in ones)")
    add("--override_concept", metavar="TEXT", help="words that take the concept's place in forgotten prompts")
    add("--override_prompts", type=Path, metavar="FILE", help="instead: line by line, or one for all")
    add("--retain_prompts", type=Path, metavar="FILE", help="prompts to keep; needed by all methods but esd")
    add("--negative_prompt", metavar="TEXT", help="in the null prompt's place, in the guidance of forgotten prompts")


def asks_for_prompts(options: argparse.Namespace) -> bool:
    """Whether it says what to forget in words, which only a pipeline understands."""
    return options.forget_class is None and any(getattr(options, flag) is not None for flag in PROMPT_FLAGS)


def check_class_flags(options: argparse.Namespace) -> None:
    """Refuse flags of pipelines where the folder is a class-conditional model.

    Raises:
        ValueError: One of them was given, or no class to forget.
    """
    _refuse(options, _CONCEPT_FLAGS, "is of pipelines; this is a class-conditional model, which forgets classes")
    if options.forget_class is None:
        raise ValueError("--forget_class: is needed; name the classes to forget")


def check_concept_flags(options: argparse.Namespace) -> None:
    """Refuse flags that have no say for a pipeline, or in ``options.method``.

    Raises:
        ValueError: One of them; it names the flag.
    """
    if options.method not in (DISTILL, *METHODS):
        raise ValueError(f"--method {options.method}: not for pipelines; take {', '.join(METHODS)}")
    _refuse(options, _CLASS_FLAGS, "is of class-conditional models; this is a pipeline, which forgets prompts")
    one_step = is_one_step(options)
    rule = DISTILL if one_step else options.method
    check_flags(argparse.Namespace(**vars(options) | {"method": rule} | _as_for_classes(options)))
    _refuse(options, _RULES[rule], f"has no say in --method {options.method}")
    if one_step:
        _refuse(options, ("latents_per_prompt",), f"is of --method {SALUN}; it has no say in --method {options.method}")
    else:
        why = f"is of a one-step generator; it has no say in --method {options.method}"
        _refuse(options, _ONE_STEP_FLAGS, why)
    if options.method == SFD:
        _refuse(options, ("mask", "mask_density", "mask_path"), f"has no say in --method {SFD}, which trains all")
    if options.train_method is not None:
        _refuse(options, ("mask_region", "mask_path"), "cannot be given with --train_method, which is a region")
    if (options.num_validation_images or 0) < 0:
        raise ValueError(f"--num_validation_images: expected 0 or more, got {options.num_validation_images}")


def is_one_step(options: argparse.Namespace) -> bool:
    """Whether what comes out is a one-step generator."""
    return options.method in (DISTILL, PECKER, SFD)


def _as_for_classes(options: argparse.Namespace) -> dict[str, object]:
    """What the methods' own check takes otherwise: deltas of pipelines add up by every method."""
    changes: dict[str, object] = {} if is_one_step(options) else {"earlier": None}
    if options.method == ESD and options.mask is None and options.mask_density is not None:
        changes["mask"] = "saliency"
    return changes


def _refuse(options: argparse.Namespace, flags: Iterable[str], why: str) -> None:
    for flag in flags:
        if getattr(options, flag, None) not in (None, False):
            raise ValueError(f"--{flag}: {why}")
