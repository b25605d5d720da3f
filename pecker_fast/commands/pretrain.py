"""``pecker-fast pretrain``: train a small class-conditional diffusion model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from pecker_fast import models
from pecker_fast.checkpoint import atomic_folder
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.source import torch_device
from pecker_fast.data import ImageData, load_digits, load_image_folder
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain import train_denoiser
from pecker_fast.schedule import NoiseSchedule


def run(options: argparse.Namespace) -> Outcome:
    """Train a model on a folder of images, or on the digits, and save its folder."""
    data = _load(options)
    architecture = _architecture(options, data)
    schedule = NoiseSchedule.linear(options.num_train_timesteps)
    generation = {
        "kind": "ddim",
        "steps": min(options.num_inference_steps, options.num_train_timesteps),
        "schedule": schedule.to_dict(),
        "sample_shape": list(data.images.shape[1:]),
    }
    device = torch_device(options.device)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = DDPMUNet(**architecture).to(device)
    settings = {
        "steps": options.max_train_steps,
        "batch_size": options.train_batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    parameters = {"model": sum(parameter.numel() for parameter in model.parameters())}
    summary: dict[str, Any] = {"images": len(data), "classes": list(data.class_names), **settings}
    if options.dry_run:
        writes = [str(options.output_dir / name) for name in ("config.json", "diffusion_pytorch_model.safetensors")]
        return dry_run({**summary, "architecture": architecture, "generation": generation}, parameters, writes)
    with atomic_folder(options.output_dir) as folder:
        trained = train_denoiser(model, data, schedule, progress=not options.quiet, **settings)
        models.storage.write_model(trained, folder, generation)
    return Outcome({"output_dir": str(options.output_dir), "parameters": parameters, **summary})


def _load(options: argparse.Namespace) -> ImageData:
    if options.train_data_dir is None:
        if options.resolution not in (None, 8):
            raise ValueError(
                f"--resolution: the built-in digits are 8x8, got {options.resolution}; give --train_data_dir"
            )
        return load_digits()
    if options.resolution is None:
        raise ValueError("--resolution: expected the height and width of the images in --train_data_dir, got none")
    return load_image_folder(options.train_data_dir, image_size=options.resolution, channels=options.channels)


def _architecture(options: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """The small network of the digits, for images of this size and number of classes."""
    with torch.device("meta"):
        config = DDPMUNet.digits(options.width).config
    _, channels, size, _ = data.images.shape
    return {**config, "image_size": size, "channels": channels, "num_classes": len(data.class_names)}
