"""``--stop_on``: which judge looks at the images, and whether its rule can be kept at all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pecker_fast import models
from pecker_fast.commands.classes import classes_of, is_of_digits, same_classes
from pecker_fast.commands.source import Source
from pecker_fast.commands.together import first_then_others
from pecker_fast.config import DistillConfig
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DigitsClassifier, ImageClassifier
from pecker_fast.stop_rule import StopRule
from pecker_fast.stopping import MIN_SAMPLES, StopCheck

_IDLE = ("stop_every", "stop_samples", "judge")
_EVERY = 10


@dataclass(frozen=True)
class Stop:
    """A check, and how often it is asked.

    Attributes:
        check: The check.
        every: Steps between two of them.
    """

    check: StopCheck
    every: int


def check_flags(options: argparse.Namespace, source: Source, config: DistillConfig) -> None:
    """Refuse a rule that cannot be kept, or that nobody can judge, before anything is done.

    Raises:
        ValueError: It is no rule, too few samples for it, flags without it, or no judge for this model and its classes.
    """
    if options.stop_on is None:
        for flag in _IDLE:
            if getattr(options, flag) is not None:
                raise ValueError(f"--{flag}: says how --stop_on checks; give --stop_on too")
        return
    rule, samples = StopRule.parse(options.stop_on), options.stop_samples or MIN_SAMPLES
    if samples < MIN_SAMPLES:
        raise ValueError(f"--stop_samples: expected at least {MIN_SAMPLES}, got {samples}")
    try:
        rule.check_samples(samples)
    except ValueError as error:
        raise ValueError(f"--stop_samples: {error}") from error
    if options.judge in (None, "digits") and not is_of_digits(source.sample_shape, source.classes):
        raise ValueError(
            f"--stop_on: the judge of the digits knows 10 classes of (1, 8, 8), the model has {source.num_classes} of "
            f"{source.sample_shape} ({source.classes.text(range(source.num_classes)):.200}); name a classifier's "
            f"folder with --judge"
        )
    if options.judge not in (None, "digits"):
        judge = classes_of(load_judge(Path(options.judge), source))
        judged = config.forget if rule.retain is None else (*config.forget, *config.retained)
        judge.check_seen("--judge", judged, f"among those of {options.judge}")


def make(options: argparse.Namespace, source: Source, forget: Sequence[int], seed: int) -> Stop | None:
    """The check that the flags ask for, if they ask for one; a judge of the digits may be trained for it.

    Raises:
        FileFormatError: The judge's folder is missing or damaged, or holds another kind of model.
    """
    if options.stop_on is None:
        return None
    with torch.random.fork_rng(devices=[]):  # networks that are made draw their weights, and the run is not to notice
        judge = _digits(options) if options.judge in (None, "digits") else load_judge(Path(options.judge), source)
    device = next(source.model.parameters()).device
    samples = options.stop_samples or MIN_SAMPLES
    check = StopCheck(StopRule.parse(options.stop_on), judge.to(device).eval(), forget, samples=samples, seed=seed)
    return Stop(check, options.stop_every or _EVERY)


def _digits(options: argparse.Namespace) -> nn.Module:
    from pecker_fast import digits_task

    return first_then_others(options, lambda: digits_task.load_judge(options.cache_dir, progress=not options.quiet))


def load_judge(folder: Path, source: Source | None = None) -> nn.Module:
    """The classifier in a folder.

    Args:
        folder: Of a classifier.
        source: The model whose images it is to judge; None asks for any classifier.

    Raises:
        FileFormatError: The folder is missing or damaged, holds another kind of model, or one that cannot judge the
            source's images.
    """
    judge = models.load(folder)
    if not isinstance(judge, DigitsClassifier | ImageClassifier):
        raise FileFormatError(f"{folder}: is a model that draws images; --judge takes a classifier's folder")
    if source is not None:
        _check_fits(folder, judge, source)
    return judge


def _check_fits(folder: Path, judge: nn.Module, source: Source) -> None:
    try:
        with torch.no_grad():
            logits = judge(torch.zeros(1, *source.sample_shape, device="cpu"))
    except RuntimeError as error:
        raise FileFormatError(f"{folder}: cannot judge images of {source.sample_shape}: {error}") from error
    if logits.shape != (1, source.num_classes):
        raise FileFormatError(
            f"{folder}: tells {logits.shape[-1]} classes apart, the model has {source.num_classes}; take another judge"
        )
    same_classes({"the model": source.classes, f"the judge {folder}": classes_of(judge)})
