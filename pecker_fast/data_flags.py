"""Flags that name a data set, and the command that trains a judge of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pecker_fast.data.dataset import FORMATS, SPLITS
from pecker_fast.flags import device_flag, new_command, positive_float, positive_int, seed


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
    device_flag(parser)
