"""``pecker-fast evaluate``: what a judge makes of a model or of its images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pecker_fast import models
from pecker_fast.classes import Classes
from pecker_fast.commands import Outcome, dry_run, evaluate_concept
from pecker_fast.commands.classes import (
    Chosen,
    chosen,
    classes_of,
    is_of_digits,
    name_unseen,
    retain_of,
    same_classes,
    tell_unseen,
)
from pecker_fast.commands.files import read_images
from pecker_fast.commands.inception import inception_figures
from pecker_fast.commands.judging import load_judge
from pecker_fast.commands.sample import draw, generative_config
from pecker_fast.commands.source import torch_device
from pecker_fast.concept_draws import is_pipeline
from pecker_fast.data import ImageData, load_dataset
from pecker_fast.errors import FileFormatError
from pecker_fast.evaluate_flags import CLASS_ONLY, PIPELINE_ONLY, refuse_given
from pecker_fast.evaluation import Judge, evaluate_images, sides

_DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class _Task:
    """What is judged: images of this shape, and the classes that the judge tells apart."""

    judge: str
    shape: tuple[int, int, int]
    classes: Classes


def run(options: argparse.Namespace) -> Outcome:
    """Print unlearning accuracy, retain accuracy and Fréchet distance; pipelines have figures of their own."""
    if options.model is not None and is_pipeline(options.model):
        refuse_given(options, CLASS_ONLY, f"{options.model} is a pipeline of prompts, not a model of classes")
        return evaluate_concept.run(options)
    _check_flags(options)
    judge = None if options.judge is None else load_judge(options.judge)
    task = _task(options, judge)
    given = None if options.images is None or options.dry_run else read_images(options.images, task.shape)
    real = None if options.train_data_dir is None or options.dry_run else _real(options, task)
    classes = _agreed(options, task, given, real)
    if options.judge is not None and options.train_data_dir is None:
        raise ValueError("--judge: compares with real images; name them with --train_data_dir")
    asked = chosen(options, replace(classes, unseen=task.classes.unseen))  # a model may well never have known a class
    if options.dry_run:
        return _planned(options, classes, asked)
    retain = retain_of(classes, asked.forget, asked.retain)
    images, labels = _images(options, classes, asked, retain) if given is None else (given.images, given.labels)
    _check_labels(options, labels, task.classes.count, asked, retain)
    judge, real = _digits(options) if judge is None or real is None else (judge, real)
    device = torch_device(options.device)
    network = cast(Judge, judge.to(device))
    values = evaluate_images(images.to(device), labels, network, real, asked.forget, retain=retain)
    low, high = values["unlearning_accuracy_ci95"]
    text = (
        f"forgotten            class {classes.text(asked.forget)}\n"
        f"unlearning accuracy  {values['unlearning_accuracy']:.1%}  [95 % CI {low:.1%}, {high:.1%}]\n"
        f"retain accuracy      {values['retain_accuracy']:.1%}\n"
        f"Fréchet distance     {values['frechet_distance']:.3g}  (judge's features; not FID)"
    )
    if options.inception is not None:
        found = inception_figures(
            options.inception, images, labels, real, asked.forget, device, options.quiet, retain=retain
        )
        values |= found
        text += (
            f"\nFID                  {found['fid']:.4g}\ninception score      {found['inception_score']:.4g}\n"
            f"precision, recall    {found['precision']:.3f}, {found['recall']:.3f}  (Inception's features)"
        )
    return Outcome({"images": len(images), **_asked(classes, asked), **values}, text)


def _check_flags(options: argparse.Namespace) -> None:
    refuse_given(
        options, PIPELINE_ONLY, f"{options.model or options.images} is no pipeline: it has no model_index.json"
    )
    if options.forget_class is None:
        raise ValueError("--forget_class: expected the classes that were forgotten")
    if options.judge is None and options.train_data_dir is not None:
        raise ValueError("--train_data_dir: the judge of the digits knows nothing else; name another with --judge")


def _planned(options: argparse.Namespace, classes: Classes, asked: Chosen) -> Outcome:
    from pecker_fast import digits_task

    settings = {"subject": str(options.model or options.images), **_asked(classes, asked)}
    settings |= {"num": options.num, "judge": "digits" if options.judge is None else str(options.judge)}
    cache = options.cache_dir or digits_task.default_cache_dir()
    return dry_run(settings, {}, [f"{cache}/"] if options.judge is None else [])


def _asked(classes: Classes, asked: Chosen) -> dict[str, Any]:
    kept = {} if asked.retain is None else {"retain_class": list(asked.retain)}
    names = {"forget_class_names": classes.names_of(asked.forget)}
    return {"forget_class": list(asked.forget), **names, **kept, "classes_without_images": list(classes.unseen)}


def _task(options: argparse.Namespace, judge: nn.Module | None) -> _Task:
    """What a judge was made for."""
    if judge is None:
        return _Task("the judge of the digits", (1, 8, 8), Classes(10, _DIGITS))
    config = cast(dict[str, Any], judge.config)
    shape = (config["channels"], config["image_size"], config["image_size"])
    return _Task(f"the judge {options.judge}", shape, classes_of(judge))


def _agreed(options: argparse.Namespace, task: _Task, given: ImageData | None, real: ImageData | None) -> Classes:
    """The classes of judge, subject and real images, with the names that one of them knows; all must be the same.

    Raises:
        FileFormatError: They are not.
    """
    met, unseen = {task.judge: task.classes}, set(task.classes.unseen)
    if options.model is not None:
        model = _fitting(options, task)
        met[str(options.model)] = model
        unseen |= set(model.unseen)
        tell_unseen(f"what {options.model} was trained on", model)
    if given is not None:
        own, count = Classes.of_images(given), task.classes.count
        # Images without names may be of the first classes only; their numbers are looked at later.
        met[str(options.images)] = own if own.named else Classes(count, tuple(map(str, range(count))))
    if real is not None:
        met[str(options.train_data_dir)] = name_unseen(f"{options.train_data_dir} ({options.split})", real)
    same_classes(met)
    named = next((classes for classes in met.values() if classes.named), task.classes)
    return replace(named, unseen=tuple(sorted(unseen)))


def _digits(options: argparse.Namespace) -> tuple[nn.Module, ImageData]:
    from pecker_fast import digits_task

    judge = digits_task.load_judge(options.cache_dir, progress=not options.quiet, short=options.short)
    return judge, digits_task.load_data()


def _real(options: argparse.Namespace, task: _Task) -> ImageData:
    channels, size, _ = task.shape
    return load_dataset(
        options.train_data_dir, image_size=size, channels=channels, split=options.split, format=options.data_format
    )


def _fitting(options: argparse.Namespace, task: _Task) -> Classes:
    """The classes of the model, whose images the judge must be for."""
    config = generative_config(options.model)
    shape, classes = tuple(config["generation"]["sample_shape"]), models.classes_in(config)
    digits = options.judge is None and not is_of_digits(shape, classes)
    if digits or (shape, classes.count) != (task.shape, task.classes.count):
        raise FileFormatError(
            f"{options.model}: expected a model that fits {task.judge}, {task.classes.count} classes of {task.shape}, "
            f"got {classes.count} of {shape}; name a judge for its images with --judge (pecker-fast judge trains one)"
        )
    return classes


def _images(
    options: argparse.Namespace, classes: Classes, asked: Chosen, retain: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Images of all classes that count."""
    config = generative_config(options.model)
    counted = range(classes.count) if retain is None else sorted({*asked.forget, *retain})
    labels = torch.tensor(list(counted), device="cpu").repeat_interleave(options.num)
    model = models.load(options.model).to(torch_device(options.device))
    return draw(model, config["generation"], labels, options.seed), labels


def _check_labels(
    options: argparse.Namespace, labels: Tensor, classes: int, asked: Chosen, retain: Sequence[int] | None
) -> None:
    """There must be something to measure on both sides."""
    subject = options.images or options.model
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise FileFormatError(f"{subject}: expected labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    forgotten, retained = (int(side.sum()) for side in sides(labels, asked.forget, retain))
    if not forgotten or retained < 2:
        raise ValueError(
            f"--forget_class: expected at least 1 image of these classes and 2 of others in {subject}, "
            f"got {forgotten} and {retained}"
        )
