"""Arguments of ``pecker-fast compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pecker_fast.flags import (
    BLOCK_HELP,
    block,
    cache_flags,
    class_label,
    density_flag,
    device_flag,
    forget_flag,
    new_command,
    overwrite_flag,
    positive_float,
    positive_int,
    seed,
)


def compare_command(commands: Any) -> None:
    """Every method on the same work."""
    parser = new_command(
        commands,
        "compare",
        "run methods on the same work: tables, figures and report.html",
        "pecker-fast compare --seeds 0 1 2 --forget_class 7 --output_dir runs/compare\n"
        "  pecker-fast compare --methods all --seeds 0 1 2 3 4 --processes 2 --output_dir runs/compare\n"
        "  pecker-fast compare --pretrained_model_name_or_path teacher --judge judge --train_data_dir cifar10 \\\n"
        "      --output_dir runs/compare\n\n"
        "Without --methods it asks whether saliency beats chance: pecker, random, and sfd, which trains every weight.\n"
        "The same command again goes on where it stopped, and with more methods or seeds does what is missing.",
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help="sfd, pecker, random, ... or all (sfd pecker random)")
    forget_flag(parser, default=[7])
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="N", help="of the reported runs (0 1 2)")
    add(
        "--tuning_class",
        type=class_label,
        nargs="+",
        metavar="C",
        help="learning rates are tuned on (the first retained one)",
    )
    add("--tuning_seeds", type=seed, nargs="+", default=[100], metavar="N", help="and with these, none reported (100)")
    add(
        "--learning_rate_factors",
        type=positive_float,
        nargs="+",
        default=[0.5, 1.0, 2.0, 4.0],
        metavar="X",
        help="the grid, the same for every method (0.5 1 2 4)",
    )
    add("--max_train_steps", type=positive_int, default=100, metavar="N", help="steps of sfd: the budget (100)")
    add("--num", type=positive_int, default=200, metavar="N", help="images of each class that are judged (200)")
    density_flag(parser, 0.25)
    add("--block", type=block, default="row", metavar="BLOCK", help=BLOCK_HELP.format("row"))
    add(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at once, each with one thread if several (1)",
    )
    add(
        "--diagnostics",
        action="store_true",
        help="also log what the gradients look like, under the mask and outside it",
    )
    add("--output_dir", type=Path, default=Path("runs/compare"), metavar="DIR", help="(runs/compare)")
    overwrite_flag(parser)
    _task_flags(parser)
    cache_flags(parser)
    device_flag(parser)


def _task_flags(parser: argparse.ArgumentParser) -> None:
    """Another task than the digits, and its settings."""
    add = parser.add_argument
    group = "another task than the digits:"
    add("--pretrained_model_name_or_path", type=Path, metavar="DIR", help=f"{group} the diffusion model's folder")
    add("--judge", type=Path, metavar="DIR", help="a classifier's folder, as pecker-fast judge writes it")
    add("--train_data_dir", type=Path, metavar="PATH", help="their data, with a train and a test part")
    add("--max_train_samples", type=positive_int, metavar="N", help="at most so many images of either part")
    add(
        "--null_class", action="store_true", help="the model was trained with class dropout: SalUn's and ESD's guidance"
    )
    add("--train_batch_size", type=positive_int, metavar="N", help="samples of retained classes in each update")
    add("--forget_batch_size", type=positive_int, metavar="N", help="samples of forgotten classes in each update")
    add(
        "--generator_lr",
        type=positive_float,
        metavar="X",
        help="learning rate of distillation that factors multiply (1e-5)",
    )
    add(
        "--learning_rate",
        type=positive_float,
        metavar="X",
        help="learning rate of the others that factors multiply (1e-4)",
    )
    add(
        "--forget_weight",
        type=positive_float,
        metavar="X",
        help="weight of the distillation's losses on forgotten classes",
    )
    add("--ema_decay", type=float, metavar="X", help="of the running average that is judged")
    add("--sid_alpha", type=float, metavar="X", help="alpha of the SiD loss")
    add("--lr_warmup_steps", type=int, metavar="N", help="steps of linear warm-up")
    add("--t_init", type=int, metavar="T", help="timestep at which the one-step generator starts")
    add("--t_min", type=int, metavar="T", help="smallest timestep of the losses")
    add("--t_max", type=int, metavar="T", help="timesteps of the losses are below this")
    add("--retrain_steps", type=positive_int, metavar="N", help="steps of training from scratch (1000)")
