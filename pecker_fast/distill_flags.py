"""Arguments of ``pecker-fast distill`` and ``pecker-fast unlearn``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pecker_fast.baseline_flags import baseline_flags, method_flag
from pecker_fast.concept_flags import concept_flags
from pecker_fast.flags import (
    checkpoint_flags,
    device_flag,
    forget_flag,
    mask_flags,
    new_command,
    override_flag,
    overwrite_flag,
    positive_int,
    retain_flag,
    seed,
    source_flag,
    switch_flags,
)


def distill_command(commands: Any) -> None:
    """Stage one: every weight, and nothing is forgotten."""
    parser = new_command(
        commands,
        "distill",
        "distil a diffusion model into one step, once, for requests to start from",
        "pecker-fast distill --pretrained_model_name_or_path teacher --max_train_steps 400 \\\n"
        "      --train_batch_size 64 --generator_lr 5e-4 --fake_score_lr 5e-4 --lr_warmup_steps 10 \\\n"
        "      --t_init 500 --t_min 20 --t_max 700 --sid_alpha 1 --ema_decay 0.98 --output_dir distilled\n\n"
        "The same command again returns at once. pecker-fast unlearn --init distilled goes on from here.",
    )
    source_flag(parser)
    parser.add_argument("--max_train_steps", type=positive_int, default=1000, metavar="N", help="(1000)")
    _training_flags(parser)
    switch_flags(parser)
    _output_flag(parser, "gets model/, fake_score/, settings and losses")
    checkpoint_flags(parser)
    device_flag(parser)


def unlearn_command(commands: Any) -> None:
    """From the diffusion model itself, or stage two: a short masked run from what ``distill`` left."""
    parser = new_command(
        commands,
        "unlearn",
        "make a diffusion model forget classes, or a text-to-image pipeline prompts",
        "pecker-fast unlearn --pretrained_model_name_or_path teacher --forget_class 3 \\\n"
        "      --override_class 8 --mask_density 0.25 --block row --mask_lr_scale density \\\n"
        "      --max_train_steps 150 --train_batch_size 64 --forget_batch_size 16 --generator_lr 5e-4 \\\n"
        "      --fake_score_lr 5e-4 --lr_warmup_steps 10 --t_init 500 --t_min 20 --t_max 700 \\\n"
        "      --sid_alpha 1 --forget_weight 0.05 --ema_decay 0.98 --output_dir out\n\n"
        "These settings suit small models such as pecker-fast pretrain makes. Numbers not given are\n"
        "those published for CIFAR-10, or with --init those that it was distilled with; --dry_run shows\n"
        "them. Several requests from one distilled model, each a delta of its own:\n"
        "  pecker-fast unlearn ... --init distilled --forget_class 3 --output_dir three\n"
        "  pecker-fast unlearn ... --init distilled --earlier three --forget_class 5 --output_dir five\n\n"
        "A folder of a text-to-image pipeline forgets prompts; numbers not given are those published for it:\n"
        "  pecker-fast unlearn --pretrained_model_name_or_path sd15 --method esd --train_method xattn \\\n"
        "      --erase_concept 'brad pitt' --retain_prompts kept.txt --mask_density 0.1 --output_dir out",
    )
    source_flag(parser)
    method_flag(parser)
    forget_flag(parser, required=False)
    override_flag(parser)
    retain_flag(parser)
    _init_flags(parser)
    mask_flags(parser, ("saliency", "random", "dense", "complement", "layer_random"))
    parser.add_argument(
        "--mask_path",
        type=Path,
        metavar="FILE",
        help="use this mask; --mask, --mask_density and --block do not count",
    )
    fake_score_mask_flag(parser)
    parser.add_argument(
        "--max_train_steps",
        type=positive_int,
        metavar="N",
        help="(500; of a pipeline: esd and salun 200, pecker and sfd 25000)",
    )
    _stop_flags(parser)
    _training_flags(parser)
    _forgetting_flags(parser)
    switch_flags(parser)
    _output_flag(parser, "gets model/, delta/, the mask, settings and losses")
    checkpoint_flags(parser)
    baseline_flags(parser)
    concept_flags(parser)
    device_flag(parser)


def fake_score_mask_flag(parser: argparse.ArgumentParser) -> None:
    """Which weights of the fake score train."""
    parser.add_argument(
        "--fake_score_mask",
        choices=("dense", "same"),
        help="train all of the fake score, or a mask of its own with the same settings (dense)",
    )


def _init_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--init", type=Path, metavar="DIR", help="start from what pecker-fast distill wrote there")
    add("--earlier", type=Path, nargs="+", metavar="DIR", help="output folders of requests that this one adds to")


def _stop_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--stop_on",
        metavar="RULE",
        help="end when lower bounds hold twice in a row, such as ua>=0.99,retain>=0.97",
    )
    add("--stop_every", type=positive_int, metavar="N", help="steps between checks of that (10)")
    add("--stop_samples", type=positive_int, metavar="N", help="new images of a side in each check (500)")
    add("--judge", metavar="DIR", help="a classifier's folder, or digits (digits, for a model of them)")
    add("--cache_dir", type=Path, metavar="DIR", help="where the judge of the digits is kept")


def _training_flags(parser: argparse.ArgumentParser) -> None:
    """What both stages share; what is not given is left to ``DistillConfig``."""
    add = parser.add_argument
    add("--train_batch_size", type=positive_int, metavar="N", help="samples of retained classes in each update")
    add("--generator_lr", type=float, metavar="X", help="learning rate of the generator")
    add("--fake_score_lr", type=float, metavar="X", help="learning rate of the fake score")
    add("--lr_warmup_steps", type=int, metavar="N", help="steps of linear warm-up")
    add("--clip_value", type=float, metavar="X", help="clip gradients to this, element by element; 0 does not clip")
    add("--weight_decay", type=float, metavar="X", help="decoupled weight decay")
    add("--ema_decay", type=float, metavar="X", help="of the running average that is saved")
    add("--sid_alpha", type=float, metavar="X", help="alpha of the SiD loss")
    add("--t_init", type=int, metavar="T", help="timestep at which the one-step generator starts")
    add("--t_min", type=int, metavar="T", help="smallest timestep of the losses")
    add("--t_max", type=int, metavar="T", help="timesteps of the losses are below this")
    add("--seed", type=seed, metavar="N", help="of every draw")


def _forgetting_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--forget_batch_size", type=positive_int, metavar="N", help="samples of forgotten classes in each update")
    add("--retain_weight", type=float, metavar="X", help="weight of the losses on retained classes")
    add("--forget_weight", type=float, metavar="X", help="weight of the losses on forgotten classes")


def _output_flag(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help=text)
    overwrite_flag(parser)
