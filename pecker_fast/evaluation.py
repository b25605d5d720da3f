"""What a judge makes of generated images: what was forgotten, what was kept, and how real the rest looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pecker_fast.data import ImageData
from pecker_fast.metrics import (
    FeatureStatistics,
    frechet_distance,
    retain_accuracy,
    unlearning_accuracy,
    wilson_interval,
)

_VALUES = 1 << 19
"""Pixel values that are judged at a time, so that the activations of large images fit."""


class Judge(Protocol):
    """A classifier whose logits are ``head(features(images))``, in eval mode."""

    def features(self, images: Tensor, /) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, D)."""
        ...

    def head(self, features: Tensor, /) -> Tensor:
        """(B, D) -> (B, classes)."""
        ...


@torch.no_grad()
def evaluate_images(
    images: Tensor, labels: Tensor, judge: Judge, real: ImageData, forget: Sequence[int]
) -> dict[str, Any]:
    """Judge generated images, a chunk at a time.

    Args:
        images: (N, C, H, W), about [-1, 1], on the judge's device.
        labels: (N,) int64 classes they were asked for.
        judge: The classifier, in eval mode.
        real: Real images to compare with; moved to the device of ``images`` chunk by chunk.
        forget: The forgotten classes; images of at least one of them, and two of others, are needed.

    Returns:
        "unlearning_accuracy" (share of the forgotten classes' images that the judge does not take for one of them)
        with its 95 % Wilson interval "unlearning_accuracy_ci95", "retain_accuracy", and "frechet_distance" of the
        retained images to the real ones of those classes in the judge's features (not FID).

    Raises:
        ValueError: There is nothing to measure on one side.
        NonFiniteError: Features are NaN or infinite.
    """
    classes = torch.tensor(list(forget), device="cpu")
    forgotten = torch.isin(labels.cpu(), classes)
    generated, retained_real = FeatureStatistics(), FeatureStatistics()
    predicted = []
    for part, features in _features(images, judge, images.device):
        predicted.append(judge.head(features).argmax(1).cpu())
        generated.update(features[~forgotten[part].to(features.device)])
    for _, features in _features(real.images[~torch.isin(real.labels.cpu(), classes)], judge, images.device):
        retained_real.update(features)
    predictions = torch.cat(predicted)
    unlearned = unlearning_accuracy(predictions[forgotten], forget)
    count = int(forgotten.sum())
    return {
        "unlearning_accuracy": unlearned,
        "unlearning_accuracy_ci95": list(wilson_interval(round(unlearned * count), count)),
        "retain_accuracy": retain_accuracy(predictions[~forgotten], labels.cpu()[~forgotten]),
        "frechet_distance": frechet_distance(generated, retained_real),
    }


@torch.no_grad()
def predict(images: Tensor, judge: Judge) -> Tensor:
    """The judge's classes, (N,) int64 on the CPU, a chunk at a time."""
    device = images.device
    return torch.cat([judge.head(features).argmax(1).cpu() for _, features in _features(images, judge, device)])


def _features(images: Tensor, judge: Judge, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _VALUES // max(1, images[:1].numel()))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        yield part, judge.features(images[part].to(device).clamp(-1, 1))
