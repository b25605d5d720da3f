"""``pecker-fast unlearn`` of small pipelines, in one line."""

from __future__ import annotations

from pathlib import Path

import torch
from pipelines import write_pipeline

from pecker_fast.cli import main

FLAGS = (
    *("--erase_concept", "cat", "--retain_prompts", "keep.txt", "--max_train_steps", "1", "--train_batch_size", "1"),
    *("--device", "cpu", "--block", "row", "--num_validation_images", "0", "--quiet", "--mask", "random"),
)
PECKER = ("--method", "pecker", "--override_concept", "dog", "--generator_lr", "1e-3", "--max_train_steps", "2")
ESD = ("--method", "esd", "--mask_density", "0.2", "--num_inference_steps", "2", "--learning_rate", "1e-3")


def write_place(folder: Path) -> Path:
    """Pipelines that predict "epsilon" and "v_prediction", and prompts to keep."""
    for kind in ("epsilon", "v_prediction"):
        write_pipeline(folder / kind, kind)
    (folder / "keep.txt").write_text("a dog\nthe red bird\n")
    return folder


def unlearn(out: str | Path, *flags: str, base: str = "epsilon", code: int = 0) -> Path:
    """What is written; the working directory is a place."""
    torch.manual_seed(0)
    source = ("--pretrained_model_name_or_path", base, "--output_dir", str(out))
    assert main(["unlearn", *source, *FLAGS, *flags]) == code
    return Path(out)
