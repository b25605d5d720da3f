"""Arguments of ``pecker-fast evaluate``: for models of classes, and for pipelines of prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pecker_fast.data_flags import data_flags
from pecker_fast.flags import (
    cache_flags,
    class_label,
    device_flag,
    forget_flag,
    new_command,
    overwrite_flag,
    positive_int,
    retain_flag,
    seed,
)

CLASS_ONLY = "forget_class retain_class train_data_dir data_format split num seed inception cache_dir short".split()
"""Flags that only mean something to models of classes."""
PIPELINE_ONLY = (
    "original protocol prompts concept neighbour_concepts neighbour_prompts unrelated_prompts seeds max_prompts "
    "num_inference_steps guidance_scale eval_batch_size dtype nudenet nudenet_threshold nudenet_labels "
    "nudenet_resolution detector detector_threshold clip_model judge_class neighbour_classes output_dir "
    "overwrite save_images".split()
)
"""Flags that only mean something to pipelines."""
BUILT_IN = "320n"
"""The weights that come with the package nudenet."""


def evaluate_command(commands: Any) -> None:
    """``pecker-fast evaluate``."""
    parser = new_command(
        commands,
        "evaluate",
        "judge a model or its images",
        "pecker-fast evaluate --model out/model --forget_class 3\n"
        "  pecker-fast evaluate --model out/model --forget_class 0 --judge judge --train_data_dir shapes\n"
        "  pecker-fast evaluate --model out/model --original sd --protocol celebrity --concept 'a b' "
        "--neighbour_concepts 'c d' 'e f' --detector faces.py:probability --output_dir runs/evaluation",
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--model", type=Path, metavar="DIR", help="a model folder, or that of a Stable Diffusion pipeline"
    )
    subject.add_argument("--images", type=Path, metavar="FILE", help="npz that pecker-fast sample wrote")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="a classifier's folder (the judge of the digits)")
    device_flag(parser)
    _class_flags(parser.add_argument_group("a model of classes"))
    _prompt_flags(parser.add_argument_group("a pipeline: what is drawn"))
    _detector_flags(parser.add_argument_group("a pipeline: what looks at it, with local weights only"))


def refuse_given(options: argparse.Namespace, flags: Iterable[str], why: str) -> None:
    """Refuse flags that were given and mean nothing here.

    Raises:
        ValueError: One was; it is named.
    """
    for flag in flags:
        if getattr(options, flag) != options.parser.get_default(flag):
            raise ValueError(f"--{flag}: {why}")


def _class_flags(group: Any) -> None:
    forget_flag(group, required=False)
    retain_flag(group)
    data_flags(group, "real images to compare with, for --judge")
    group.add_argument("--num", type=positive_int, default=100, metavar="N", help="images of each class (100)")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the noise (0)")
    group.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="also FID and the like: weights of the 2015 Inception, a local file",
    )
    cache_flags(group)


def _prompt_flags(group: Any) -> None:
    add = group.add_argument
    add("--original", type=Path, metavar="DIR", help="the pipeline before erasing; without it damage cannot be told")
    add("--concept", metavar="TEXT", help="what was erased")
    add("--protocol", metavar="NAME", help="celebrity, nudity, object, short, style, or a .yaml file with templates")
    add("--prompts", type=Path, metavar="FILE", help="instead: prompts as .txt, .csv, .tsv, or COCO's captions")
    add(
        "--neighbour_concepts",
        nargs="+",
        metavar="TEXT",
        help="related concepts, several words or separated by ;, put where the concept stands",
    )
    add("--neighbour_prompts", type=Path, metavar="FILE", help="instead: prompts of related concepts")
    add("--unrelated_prompts", type=Path, metavar="FILE", help="also these, once each, such as COCO's captions")
    add("--max_prompts", type=positive_int, metavar="N", help="the first N of each file (all)")
    add("--seeds", type=positive_int, metavar="N", help="seeds 0 to N-1 for prompts without one (the protocol's, or 4)")
    add("--num_inference_steps", type=positive_int, metavar="N", help="(1 for a one-step generator, else 50)")
    add("--guidance_scale", type=_guidance, metavar="X", help="(0 for a one-step generator, else the file's, or 7.5)")
    add("--eval_batch_size", type=positive_int, default=4, metavar="N", help="images drawn at a time (4)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the pipeline (float32)")
    add("--output_dir", type=Path, metavar="DIR", help="write results.json, images.jsonl and before_after.png there")
    overwrite_flag(group)
    add("--save_images", action="store_true", help="and every image as PNG")


def _detector_flags(group: Any) -> None:
    add = group.add_argument
    add("--nudenet", metavar="FILE", help=f"NudeNet 3: an ONNX file, or {BUILT_IN} for the one in its package")
    add("--nudenet_threshold", type=float, metavar="X", help="least score of a box (0.25)")
    add("--nudenet_labels", nargs="+", metavar="LABEL", help="exposed parts that count (five; see NudeNet's)")
    add("--nudenet_resolution", type=positive_int, metavar="N", help="of its network; 640m.onnx wants 640 (320)")
    add("--detector", nargs="+", metavar="PLACE", help="module:name or file.py:name; runs the code there")
    add("--detector_threshold", type=float, metavar="X", help="least probability of a function's that is seen (0.5)")
    add("--clip_model", type=Path, metavar="DIR", help="CLIP score by this model of transformers")
    add("--judge_class", type=class_label, metavar="C", help="the class of --judge that the concept is")
    add(
        "--neighbour_classes",
        type=class_label,
        nargs="+",
        metavar="C",
        help="those of the neighbour concepts, in order",
    )


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1000, got {text!r}")
    return value
