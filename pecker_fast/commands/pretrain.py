"""``pecker-fast pretrain``: train a small class-conditional diffusion model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch

from pecker_fast import models
from pecker_fast.checkpoint import write_json
from pecker_fast.classes import Classes
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.output import Destination, bytes_of
from pecker_fast.commands.pretraining import REPORT_NAME, Earlier, checkpoints_of, machine
from pecker_fast.commands.source import torch_device
from pecker_fast.commands.storing import storage_of, weights_name
from pecker_fast.commands.training_data import load_training_data
from pecker_fast.data import ImageData
from pecker_fast.errors import OutOfTimeError
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain import train_denoiser
from pecker_fast.pretrain_checkpoint import KIND
from pecker_fast.schedule import NoiseSchedule

_SMALL = 8


def run(options: argparse.Namespace) -> Outcome:
    """Train a model on a data set, or on the digits, and save its folder."""
    data = load_training_data(options)
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
        "warmup_steps": options.lr_warmup_steps,
        "ema_decay": options.ema_decay,
        "class_dropout": options.class_dropout,
        "seed": options.seed,
    }
    parameters = {"model": sum(parameter.numel() for parameter in model.parameters())}
    summary: dict[str, Any] = {"images": len(data), "classes": list(data.class_names), **settings}
    summary["mixed_precision"] = options.mixed_precision
    earlier = Earlier.of(options, model, summary)
    names = ("config.json", weights_name(options), REPORT_NAME)
    output = Destination(options, names, bytes_of(model.parameters()), KIND)
    if options.dry_run:
        shown = {**summary, **_unseen(data), "architecture": architecture, "generation": generation}
        return dry_run(shown, parameters, output.planned())
    report = _train(options, output, model, data, schedule, generation, earlier, settings, summary)
    return Outcome({"output_dir": str(options.output_dir), "parameters": parameters, **report})


def _train(
    options: argparse.Namespace,
    output: Destination,
    model: DDPMUNet,
    data: ImageData,
    schedule: NoiseSchedule,
    generation: Mapping[str, Any],
    earlier: Earlier,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Train and write the folder; out of time, that of the average so far, before the error goes on."""
    started, ended = time.monotonic(), None
    done: int = options.max_train_steps
    with output.folder() as folder, checkpoints_of(options, earlier) as checkpoints:
        try:
            trained: Any = train_denoiser(
                model,
                data,
                schedule,
                **settings,
                progress=not options.quiet,
                first_step=earlier.steps_done,
                autocast=torch.bfloat16 if options.mixed_precision == "bf16" else None,
                checkpoints=checkpoints,
            )
        except OutOfTimeError as error:
            ended, trained, done = error, error.model, error.step
        seconds = earlier.seconds + time.monotonic() - started if checkpoints is None else checkpoints.seconds
        restarts = earlier.restarts if checkpoints is None else checkpoints.extra["restarts"]
        report = {
            **summary,
            **_unseen(data),
            "steps_done": done,
            "seconds": seconds,
            "restarts": restarts,
            **machine(model),
        }
        models.storage.write_model(trained, folder, generation, **storage_of(options))
        write_json(folder / REPORT_NAME, report)
    if ended is not None:
        raise ended
    return report


def _unseen(data: ImageData) -> dict[str, list[int]]:
    return {"classes_without_images": list(Classes.of_images(data).unseen)}


def _architecture(options: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """The network of the digits up to 8x8, and above it a level for each halving down to 4, as published ones have."""
    with torch.device("meta"):
        config = DDPMUNet.digits(options.width).config
    _, channels, size, _ = data.images.shape
    config |= {"image_size": size, "channels": channels, "num_classes": len(data.class_names)}
    if options.num_res_blocks is not None:
        config["num_res_blocks"] = options.num_res_blocks
    if size <= _SMALL:
        return config
    sizes = _level_sizes(size)
    return config | {
        "channel_mult": [1, 2, 2, 2, 4][: len(sizes)],
        "attention_resolutions": [max(below)] if (below := [side for side in sizes[1:] if side <= 16]) else [],
        "norm_groups": max(8, options.width // 4),
    }


def _level_sizes(size: int) -> list[int]:
    """Heights of the feature maps: 32 gives 32, 16, 8, 4; at most five."""
    sizes = [size]
    while len(sizes) < 5 and sizes[-1] % 2 == 0 and sizes[-1] >= 8:
        sizes.append(sizes[-1] // 2)
    return sizes
