"""``pecker-fast evaluate``: what a judge makes of a model or of its images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pecker_fast import models
from pecker_fast.commands import Outcome, dry_run, evaluate_concept
from pecker_fast.commands.files import read_images
from pecker_fast.commands.inception import inception_figures
from pecker_fast.commands.judging import load_judge
from pecker_fast.commands.sample import check_classes, draw, generative_config
from pecker_fast.commands.source import torch_device
from pecker_fast.concept_draws import is_pipeline
from pecker_fast.data import ImageData, load_dataset
from pecker_fast.errors import FileFormatError
from pecker_fast.evaluate_flags import CLASS_ONLY, PIPELINE_ONLY, refuse_given
from pecker_fast.evaluation import Judge, evaluate_images

_DIGITS = ((1, 8, 8), 10)


@dataclass(frozen=True)
class _Task:
    """What is judged: images of this shape and so many classes."""

    shape: tuple[int, int, int]
    classes: int


def run(options: argparse.Namespace) -> Outcome:
    """Print unlearning accuracy, retain accuracy and Fréchet distance; pipelines have figures of their own."""
    if options.model is not None and is_pipeline(options.model):
        refuse_given(options, CLASS_ONLY, f"{options.model} is a pipeline of prompts, not a model of classes")
        return evaluate_concept.run(options)
    _check_flags(options)
    judge = None if options.judge is None else load_judge(options.judge)
    task = _Task(*_DIGITS) if judge is None else _task(judge)
    check_classes("--forget_class", options.forget_class, task.classes)
    if options.dry_run:
        return _planned(options)
    images, labels = _images(options, task)
    _check_labels(options, labels, task.classes)
    judge, real = _digits(options) if judge is None else (judge, _real(options, task))
    device = torch_device(options.device)
    values = evaluate_images(images.to(device), labels, cast(Judge, judge.to(device)), real, options.forget_class)
    low, high = values["unlearning_accuracy_ci95"]
    text = (
        f"unlearning accuracy  {values['unlearning_accuracy']:.1%}  [95 % CI {low:.1%}, {high:.1%}]\n"
        f"retain accuracy      {values['retain_accuracy']:.1%}\n"
        f"Fréchet distance     {values['frechet_distance']:.3g}  (judge's features; not FID)"
    )
    if options.inception is not None:
        found = inception_figures(options.inception, images, labels, real, options.forget_class, device, options.quiet)
        values |= found
        text += (
            f"\nFID                  {found['fid']:.4g}\ninception score      {found['inception_score']:.4g}\n"
            f"precision, recall    {found['precision']:.3f}, {found['recall']:.3f}  (Inception's features)"
        )
    return Outcome({"images": len(images), "forget_class": options.forget_class, **values}, text)


def _check_flags(options: argparse.Namespace) -> None:
    refuse_given(
        options, PIPELINE_ONLY, f"{options.model or options.images} is no pipeline: it has no model_index.json"
    )
    if options.forget_class is None:
        raise ValueError("--forget_class: expected the classes that were forgotten")
    if options.judge is not None and options.train_data_dir is None:
        raise ValueError("--judge: compares with real images; name them with --train_data_dir")
    if options.judge is None and options.train_data_dir is not None:
        raise ValueError("--train_data_dir: the judge of the digits knows nothing else; name another with --judge")


def _planned(options: argparse.Namespace) -> Outcome:
    from pecker_fast import digits_task

    settings = {"subject": str(options.model or options.images), "forget_class": options.forget_class}
    settings |= {"num": options.num, "judge": "digits" if options.judge is None else str(options.judge)}
    cache = options.cache_dir or digits_task.default_cache_dir()
    return dry_run(settings, {}, [f"{cache}/"] if options.judge is None else [])


def _task(judge: nn.Module) -> _Task:
    """What a judge was made for."""
    config = cast(dict[str, Any], judge.config)
    return _Task((config["channels"], config["image_size"], config["image_size"]), config["num_classes"])


def _digits(options: argparse.Namespace) -> tuple[nn.Module, ImageData]:
    from pecker_fast import digits_task

    judge = digits_task.load_judge(options.cache_dir, progress=not options.quiet, short=options.short)
    return judge, digits_task.load_data()


def _real(options: argparse.Namespace, task: _Task) -> ImageData:
    channels, size, _ = task.shape
    real = load_dataset(
        options.train_data_dir, image_size=size, channels=channels, split=options.split, format=options.data_format
    )
    if len(real.class_names) != task.classes:
        raise FileFormatError(
            f"{options.train_data_dir}: expected the judge's {task.classes} classes, got {len(real.class_names)}"
        )
    return real


def _images(options: argparse.Namespace, task: _Task) -> tuple[Tensor, Tensor]:
    if options.images is not None:
        return read_images(options.images, task.shape)
    config = generative_config(options.model)
    shape, classes = tuple(config["generation"]["sample_shape"]), config["architecture"]["num_classes"]
    if (shape, classes) != (task.shape, task.classes):
        judge = "the judge of the digits" if options.judge is None else f"the judge {options.judge}"
        raise FileFormatError(
            f"{options.model}: expected a model that fits {judge}, {task.classes} classes of {task.shape}, "
            f"got {classes} of {shape}; name a judge for its images with --judge (pecker-fast judge trains one)"
        )
    labels = torch.arange(classes, device="cpu").repeat_interleave(options.num)
    model = models.load(options.model).to(torch_device(options.device))
    return draw(model, config["generation"], labels, options.seed), labels


def _check_labels(options: argparse.Namespace, labels: Tensor, classes: int) -> None:
    """There must be something to measure on both sides."""
    subject = options.images or options.model
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise FileFormatError(f"{subject}: expected labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    forgotten = torch.isin(labels, torch.tensor(options.forget_class, device="cpu"))
    if not bool(forgotten.any()) or int((~forgotten).sum()) < 2:
        raise ValueError(
            f"--forget_class: expected at least 1 image of these classes and 2 of others in {subject}, "
            f"got {int(forgotten.sum())} and {int((~forgotten).sum())}"
        )
