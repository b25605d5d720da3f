"""What ``pecker-fast compare`` compares on: the digits, or the folders that its flags name."""

from __future__ import annotations

import argparse
from typing import Any

from pecker_fast import models
from pecker_fast.classes import Classes
from pecker_fast.commands.classes import classes_at
from pecker_fast.commands.dataset import load_images
from pecker_fast.commands.judging import load_judge
from pecker_fast.commands.source import load_source
from pecker_fast.compare.task import Task, digits

_FOLDERS = ("pretrained_model_name_or_path", "judge", "train_data_dir")
_DISTILLATION = {
    **{
        name: name
        for name in ("forget_batch_size", "forget_weight", "ema_decay", "sid_alpha", "t_init", "t_min", "t_max")
    },
    "train_batch_size": "batch_size",
    "lr_warmup_steps": "warmup_steps",
}
"""Flag -> field of ``DistillConfig``; the diffusion models take those that ``BaselineConfig`` has too."""
_BOTH = ("batch_size", "forget_batch_size", "ema_decay", "warmup_steps")


def check_flags(options: argparse.Namespace) -> None:
    """Refuse half of another task, and settings of it without one.

    Raises:
        ValueError: A flag is missing, or has no say.
    """
    given = [name for name in _FOLDERS if getattr(options, name) is not None]
    if given and len(given) < len(_FOLDERS):
        absent = next(name for name in _FOLDERS if name not in given)
        raise ValueError(f"--{absent}: another task than the digits needs {', '.join(f'--{n}' for n in _FOLDERS)}")
    if not given and options.null_class:
        raise ValueError("--null_class: the model of the digits has none; it is for a task of your own")
    if not given:
        for name in (*_DISTILLATION, "generator_lr", "learning_rate", "retrain_steps", "max_train_samples"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: the digits have settings of their own; it is for a task of your own")


def classes_of_task(options: argparse.Namespace) -> Classes:
    """Its classes, without loading it.

    Raises:
        FileFormatError: The model's folder is missing or damaged.
    """
    if options.pretrained_model_name_or_path is not None:
        return classes_at(options.pretrained_model_name_or_path)
    from pecker_fast import digits_task

    return digits_task.CLASSES


def task_flags(options: argparse.Namespace) -> argparse.Namespace:
    """What ``load_task`` looks at, and nothing else: it is sent to other processes."""
    names = (*_FOLDERS, *_DISTILLATION, "generator_lr", "learning_rate", "retrain_steps", "max_train_samples")
    names = (*names, "null_class", "cache_dir", "quiet", "short", "device")
    return argparse.Namespace(**{name: getattr(options, name) for name in names})


def load_task(options: argparse.Namespace) -> Task:
    """The task, in every process that works on it.

    Raises:
        FileFormatError: A folder is missing or damaged, or holds something else.
        ValueError: Networks and data do not fit together.
    """
    if options.pretrained_model_name_or_path is None:
        return digits(options.cache_dir, not options.quiet, options.short)
    source = load_source(options.pretrained_model_name_or_path, options.device)
    device = next(source.model.parameters()).device
    data, limit = options.train_data_dir, options.max_train_samples
    train, held_out = (load_images(data, source, split=split, limit=limit) for split in ("train", "test"))
    given = {field: getattr(options, flag) for flag, field in _DISTILLATION.items()}
    distillation: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    steps = models.load_config(options.pretrained_model_name_or_path)["generation"]["steps"]
    return Task(
        name=options.train_data_dir.name,
        true_score=source.model,
        schedule=source.schedule,
        judge=load_judge(options.judge, source).to(device).eval(),
        train=train,
        held_out=held_out,
        distillation=distillation,
        diffusion={name: distillation[name] for name in _BOTH if name in distillation}
        | {"sampling_steps": steps, "null_class": options.null_class},
        rules={"random_label": {"class_dropout": 0.1}} if options.null_class else {},
        distillation_lr=options.generator_lr or 1e-5,
        diffusion_lr=options.learning_rate or 1e-4,
        retrain_steps=options.retrain_steps or 1000,
        retraining={"batch_size": options.train_batch_size} if options.train_batch_size else {},
    )
