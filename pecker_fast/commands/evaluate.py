"""``pecker-fast evaluate``: what the judge of the digits makes of a model or of its images."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from pecker_fast import models
from pecker_fast.commands import Outcome, dry_run
from pecker_fast.commands.files import read_images
from pecker_fast.commands.sample import check_classes, draw, generative_config
from pecker_fast.commands.source import torch_device
from pecker_fast.errors import FileFormatError

_SHAPE, _CLASSES = (1, 8, 8), 10


def run(options: argparse.Namespace) -> Outcome:
    """Print unlearning accuracy, retain accuracy and Fréchet distance."""
    from pecker_fast import digits_task

    check_classes("--forget_class", options.forget_class, _CLASSES)
    if options.dry_run:
        cache = options.cache_dir or digits_task.default_cache_dir()
        subject = str(options.model or options.images)
        return dry_run(
            {"subject": subject, "forget_class": options.forget_class, "num": options.num}, {}, [f"{cache}/"]
        )
    images, labels = _images(options)
    _check_labels(options, labels)
    judge = digits_task.load_judge(options.cache_dir, progress=not options.quiet, short=options.short)
    values = digits_task.evaluate_images(images, labels, judge, digits_task.load_data(), tuple(options.forget_class))
    low, high = values["unlearning_accuracy_ci95"]
    text = (
        f"unlearning accuracy  {values['unlearning_accuracy']:.1%}  [95 % CI {low:.1%}, {high:.1%}]\n"
        f"retain accuracy      {values['retain_accuracy']:.1%}\n"
        f"Fréchet distance     {values['frechet_distance']:.3g}  (judge's features; not FID)"
    )
    return Outcome({"images": len(images), "forget_class": options.forget_class, **values}, text)


def _images(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    if options.images is not None:
        return read_images(options.images, _SHAPE)
    config = generative_config(options.model)
    shape, classes = tuple(config["generation"]["sample_shape"]), config["architecture"]["num_classes"]
    if shape != _SHAPE or classes != _CLASSES:
        raise FileFormatError(
            f"{options.model}: expected a model of the digits, {_CLASSES} classes of {_SHAPE}, "
            f"got {classes} of {shape}; for other images use pecker_fast.metrics with a judge of your own"
        )
    labels = torch.arange(_CLASSES).repeat_interleave(options.num)
    model = models.load(options.model).to(torch_device(options.device))
    return draw(model, config["generation"], labels, options.seed), labels


def _check_labels(options: argparse.Namespace, labels: Tensor) -> None:
    """There must be something to measure on both sides."""
    subject = options.images or options.model
    if not 0 <= int(labels.min()) <= int(labels.max()) < _CLASSES:
        raise FileFormatError(f"{subject}: expected labels 0 to {_CLASSES - 1}, got {labels.min()} to {labels.max()}")
    forgotten = torch.isin(labels, torch.tensor(options.forget_class))
    if not bool(forgotten.any()) or int((~forgotten).sum()) < 2:
        raise ValueError(
            f"--forget_class: expected at least 1 image of these classes and 2 of others in {subject}, "
            f"got {int(forgotten.sum())} and {int((~forgotten).sum())}"
        )
