"""Arguments of every command of ``pecker-fast``; flags are named as in diffusers' training scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pecker_fast
from pecker_fast.compare_flags import compare_command
from pecker_fast.convert_flags import convert_command
from pecker_fast.data_flags import judge_command, pretrain_command
from pecker_fast.delta_flags import delta_command
from pecker_fast.distill_flags import distill_command, fake_score_mask_flag, unlearn_command
from pecker_fast.evaluate_flags import evaluate_command
from pecker_fast.flags import (
    BLOCK_HELP,
    Parser,
    block,
    cache_flags,
    class_label,
    density_flag,
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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="pecker-fast", description="Make a diffusion model forget, and show what it forgot.")
    parser.add_argument("--version", action="version", version=f"pecker_fast {pecker_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    making = (_demo, pretrain_command, judge_command, _mask, distill_command, unlearn_command)
    for add in (*making, _sample, evaluate_command, compare_command, delta_command, convert_command, _doctor):
        add(commands)
    return parser


def _demo(commands: Any) -> None:
    parser = new_command(
        commands,
        "demo",
        "erase handwritten digits: masked, with a random mask, and dense",
        "pecker-fast demo --forget_class 3 5 --override_class 8 6 --seed 0 --output_dir runs/demo",
    )
    forget_flag(parser, default=[3])
    override_flag(parser)
    density_flag(parser, 0.25)
    parser.add_argument("--block", type=block, default="row", metavar="BLOCK", help=BLOCK_HELP.format("row"))
    parser.add_argument(
        "--max_train_steps", type=positive_int, default=150, metavar="N", help="steps of each run (150)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the unlearning runs (0)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), metavar="DIR", help="(runs/demo)")
    overwrite_flag(parser)
    cache_flags(parser)


def _mask(commands: Any) -> None:
    parser = new_command(
        commands,
        "mask",
        "choose the weights that matter to a class; trains nothing",
        "pecker-fast mask --pretrained_model_name_or_path teacher --forget_class 3 --mask_density 0.1 "
        "--output_file mask.safetensors",
    )
    source_flag(parser)
    forget_flag(parser)
    retain_flag(parser)
    mask_flags(parser, ("saliency", "random", "complement", "layer_random"))
    parser.add_argument("--forget_batch_size", type=positive_int, metavar="N", help="images of a batch of the pass")
    parser.add_argument("--t_init", type=int, metavar="T", help="timestep of the one-step samples it looks at")
    parser.add_argument("--train_data_dir", type=Path, metavar="DIR", help="look at real images instead")
    parser.add_argument("--seed", type=seed, metavar="N", help="of the samples, or of the random mask")
    parser.add_argument(
        "--output_file",
        type=Path,
        default=Path("mask.safetensors"),
        metavar="FILE",
        help="(mask.safetensors)",
    )
    overwrite_flag(parser)
    device_flag(parser)


def _sample(commands: Any) -> None:
    parser = new_command(
        commands,
        "sample",
        "draw images from a model folder",
        "pecker-fast sample --model out/model --class 3 --num 16 --seed 0 --output three.png",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a model folder")
    add("--class", dest="labels", type=class_label, nargs="+", required=True, metavar="C", help="by number or name")
    add("--num", type=positive_int, default=16, metavar="N", help="images of each class (16)")
    add("--seed", type=seed, default=0, metavar="N", help="of the noise (0)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="npz with images (N, H, W, C) uint8, labels (N,) int64 and class_names, or a grid if it ends in .png",
    )
    overwrite_flag(parser)
    device_flag(parser)


def _doctor(commands: Any) -> None:
    parser = new_command(
        commands,
        "doctor",
        "versions, and which backend is used for what, and why",
        "pecker-fast doctor --measure\n  pecker-fast doctor --flops --mask_density 0.1 --block row",
    )
    add = parser.add_argument
    add("--measure", action="store_true", help="time the ways to compute masked weight gradients on this machine")
    add("--flops", action="store_true", help="count an iteration of the distiller by network and kind; for that:")
    add("--model", type=Path, metavar="DIR", help="a diffusion model's folder (the DDPM UNet of CIFAR-10)")
    density_flag(parser, None)
    add("--block", type=block, metavar="BLOCK", help=BLOCK_HELP.format("auto"))
    fake_score_mask_flag(parser)
    switch_flags(parser)
    add("--max_train_steps", type=positive_int, metavar="N", help="steps that share the cost of the mask")
    device_flag(parser)
