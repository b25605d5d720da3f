"""``pecker-fast sample``: images from a model folder, which is all that it needs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import models
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.files import write_images
from pecker_fast.commands.output import Destination
from pecker_fast.commands.source import torch_device
from pecker_fast.errors import FileFormatError, NonFiniteError

_BATCH = 256


def run(options: argparse.Namespace) -> Outcome:
    """Draw ``num`` images of every class named and write them."""
    output = Destination(options)
    output.check()
    config = generative_config(options.model)
    classes = models.classes_in(config)
    chosen = classes.find("--class", options.labels)
    settings = {"class": list(chosen), "class_names": classes.names_of(chosen), "num": options.num}
    settings |= {"seed": options.seed}
    model = models.load(options.model).to(torch_device(options.device))
    if options.dry_run:
        count = sum(parameter.numel() for parameter in model.parameters())
        return dry_run(settings | {"generation": config["generation"]}, {"model": count}, output.planned())
    labels = torch.tensor(chosen, device="cpu").repeat_interleave(options.num)
    images = draw(model, config["generation"], labels, options.seed)
    columns = options.num if len(chosen) > 1 else math.ceil(math.sqrt(options.num))
    with output.folder() as folder:
        write_images(folder / output.file_name, images, labels, columns, classes.names)
    values = {"output": str(options.output), "images": len(images), **settings}
    return Outcome(values, f"{len(images)} images of class {classes.text(chosen)} written to {options.output}.")


def generative_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model that can be sampled from.

    Raises:
        FileFormatError: The folder is missing or damaged, or the model does not generate.
    """
    config = models.load_config(folder)
    if config["generation"] is None:
        raise FileFormatError(
            f"{folder}: config.json has no generation, so nothing can be sampled from the "
            f"{config['_class_name']}; name the folder of a diffusion model or of a distilled generator"
        )
    return config


def draw(model: nn.Module, generation: dict[str, Any], labels: Tensor, seed: int) -> Tensor:
    """One image a label, (N, C, H, W) in [-1, 1] on the CPU; the noise depends on ``seed`` and N alone.

    Raises:
        NonFiniteError: The model drew NaN or infinite values.
    """
    device = next(model.parameters()).device
    shape = (len(labels), *generation["sample_shape"])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    batches = []
    for start in range(0, len(labels), _BATCH):
        part = slice(start, start + _BATCH)
        batches.append(models.generate(model, generation, labels[part].to(device), noise=noise[part].to(device)).cpu())
    images = torch.cat(batches)
    bad = int((~images.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"the model drew {bad} of {images.numel()} pixels NaN or infinite; are its weights damaged?"
        )
    return images
