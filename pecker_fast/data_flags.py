"""Flags that name a data set, and the commands that train a model and a judge of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pecker_fast.data.dataset import FORMATS, SPLITS
from pecker_fast.flags import (
    checkpoint_flags,
    device_flag,
    new_command,
    overwrite_flag,
    positive_float,
    positive_int,
    seed,
    share,
    storage_flags,
)


def data_flags(parser: argparse.ArgumentParser, help: str) -> None:
    """Where the images lie, and which of them are read how."""
    add = parser.add_argument
    add("--train_data_dir", type=Path, metavar="DIR", help=help)
    add("--data_format", choices=FORMATS, help="what lies there (found out)")
    add("--split", choices=SPLITS, default="train", help="which part of it (train)")


def size_flags(parser: argparse.ArgumentParser) -> None:
    """What the images are made into."""
    add = parser.add_argument
    add("--resolution", type=positive_int, metavar="N", help="height and width, by averaging boxes (the images' own)")
    add("--channels", type=int, choices=(1, 3), help="grey or RGB (the images' own)")
    add("--max_train_samples", type=positive_int, metavar="N", help="at most N images, evenly spaced (all)")


def pretrain_command(commands: Any) -> None:
    """``pecker-fast pretrain``."""
    parser = new_command(
        commands,
        "pretrain",
        "train a small class-conditional diffusion model",
        "pecker-fast pretrain --train_data_dir shapes --resolution 16 --output_dir teacher\n\n"
        "With --max_train_seconds it ends with exit code 5 while steps are left, and leaves a checkpoint and the\n"
        "model so far in the output folder: --resume_from_checkpoint latest goes on as if nothing had happened,\n"
        "--init with the model alone.",
    )
    data_flags(parser, "CIFAR-10, STL-10, parquet, npz or DIR/<class>/*.png (the built-in digits)")
    size_flags(parser)
    add = parser.add_argument
    add("--num_res_blocks", type=positive_int, metavar="N", help="residual blocks a level (1)")
    add("--class_dropout", type=share, default=0.0, metavar="X", help="share of labels left out (0)")
    add("--width", type=positive_int, default=16, metavar="N", help="channels of the first level (16)")
    add("--max_train_steps", type=positive_int, default=1200, metavar="N", help="(1200)")
    add("--train_batch_size", type=positive_int, default=128, metavar="N", help="(128)")
    add("--learning_rate", type=positive_float, default=3e-3, metavar="X", help="(3e-3)")
    add(
        "--num_train_timesteps",
        type=positive_int,
        default=1000,
        metavar="N",
        help="of the noise schedule (1000)",
    )
    add("--num_inference_steps", type=positive_int, default=20, metavar="N", help="of DDIM when sampling (20)")
    add("--lr_warmup_steps", type=int, default=0, metavar="N", help="steps of linear warm-up (0)")
    add("--ema_decay", type=share, default=0.998, metavar="X", help="of the running average that is saved (0.998)")
    add("--mixed_precision", choices=("no", "bf16"), default="no", help="run the network in this, weights stay (no)")
    add("--seed", type=seed, default=0, metavar="N", help="(0)")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="the model folder to write")
    overwrite_flag(parser)
    storage_flags(parser)
    checkpoint_flags(parser)
    add("--max_train_seconds", type=positive_float, metavar="S", help="end with a checkpoint after so many (never)")
    add("--init", type=Path, metavar="DIR", help="go on with the model that an earlier call left, with a new optimizer")
    device_flag(parser)


def judge_command(commands: Any) -> None:
    """``pecker-fast judge``."""
    parser = new_command(
        commands,
        "judge",
        "train the classifier that judges generated images, and say how often it is right",
        "pecker-fast judge --train_data_dir shapes --output_dir judge",
    )
    data_flags(parser, "CIFAR-10, STL-10, parquet, npz or DIR/<class>/*.png (the built-in digits)")
    size_flags(parser)
    add = parser.add_argument
    add("--width", type=positive_int, default=32, metavar="N", help="channels of the first layer (32)")
    add("--augment", action="store_true", help="train on flipped and shifted images too")
    add("--max_train_steps", type=positive_int, default=600, metavar="N", help="(600)")
    add("--train_batch_size", type=positive_int, default=128, metavar="N", help="(128)")
    add("--learning_rate", type=positive_float, default=3e-3, metavar="X", help="(3e-3)")
    add("--seed", type=seed, default=0, metavar="N", help="(0)")
    add("--output_dir", type=Path, default=Path("judge"), metavar="DIR", help="the classifier's folder (judge)")
    overwrite_flag(parser)
    storage_flags(parser)
    device_flag(parser)
