"""``pecker-fast judge``: train the classifier that judges generated images, on four fifths of the real ones."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from pecker_fast import models
from pecker_fast.checkpoint import write_json
from pecker_fast.classes import Classes
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.output import Destination, bytes_of
from pecker_fast.commands.source import torch_device
from pecker_fast.commands.storing import storage_of, weights_name
from pecker_fast.commands.training_data import load_training_data
from pecker_fast.data import ImageData
from pecker_fast.evaluation import predict
from pecker_fast.metrics import wilson_interval
from pecker_fast.models import DigitsClassifier, ImageClassifier
from pecker_fast.models.shards import rounded
from pecker_fast.pretrain import train_classifier

REPORT_NAME = "judge.json"
_SMALL = 8


def run(options: argparse.Namespace) -> Outcome:
    """Train, look at the fifth that was held out, and save the folder with ``judge.json``."""
    data = load_training_data(options)
    device = torch_device(options.device)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        judge = make_judge(data, options.width).to(device)
    settings: dict[str, Any] = {
        "steps": options.max_train_steps,
        "batch_size": options.train_batch_size,
        "learning_rate": options.learning_rate,
        "augment": options.augment,
        "seed": options.seed,
    }
    train, held_out = data.split()
    if len(held_out) == 0:
        raise ValueError(f"--train_data_dir: expected 3 images of a class to hold a fifth out, got {len(data)} in all")
    classes = {"classes": list(data.class_names), "classes_without_images": list(Classes.of_images(train).unseen)}
    summary = {"images": len(train), "held_out_images": len(held_out), **classes, **settings}
    parameters = {"model": sum(parameter.numel() for parameter in judge.parameters())}
    output = Destination(options, ("config.json", weights_name(options), REPORT_NAME), bytes_of(judge.parameters()))
    if options.dry_run:
        return dry_run(summary, parameters, output.planned())
    with output.folder() as folder:
        train_classifier(judge, train, progress=not options.quiet, **settings)
        stored = storage_of(options)
        if stored["dtype"] is not None:  # so that what is measured is what is stored
            judge.load_state_dict(rounded(judge.state_dict(), stored["dtype"]))
        right = int((predict(held_out.images.to(device), judge) == held_out.labels).sum())
        low, high = wilson_interval(right, len(held_out))
        accuracy = {"held_out_accuracy": right / len(held_out), "held_out_accuracy_ci95": [low, high]}
        models.storage.write_model(judge, folder, **stored)
        write_json(folder / REPORT_NAME, {**accuracy, **summary})
    text = f"right on {right / len(held_out):.1%} of {len(held_out)} held-out images  [95 % CI {low:.1%}, {high:.1%}]"
    values = {"output_dir": str(options.output_dir), "parameters": parameters, **accuracy, **summary}
    return Outcome(values, f"{text}\nWritten to {options.output_dir}.")


def make_judge(data: ImageData, width: int) -> DigitsClassifier | ImageClassifier:
    """An untrained classifier for images of this size: a plain one up to 8x8, a residual one above.

    Raises:
        ValueError: The size is not divisible by 4.
    """
    network = DigitsClassifier if data.images.shape[2] <= _SMALL else ImageClassifier
    return network(
        width=width,
        image_size=data.images.shape[2],
        channels=data.images.shape[1],
        num_classes=len(data.class_names),
    )
