"""Accuracies of a judge on generated images, and how sure one can be of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast.errors import NonFiniteError


def unlearning_accuracy(predictions: Tensor, forget: Sequence[int]) -> float:
    """Share of the images that the judge does NOT take for a forgotten class (UA).

    The share is taken of exactly the images given: pass those generated for the forgotten classes and no
    others, or the forgetting looks better than it is.

    Args:
        predictions: (N, classes) floating-point logits, or (N,) integer labels.
        forget: The forgotten classes.

    Returns:
        A share in [0, 1]; 1 means that none is recognised.

    Raises:
        ValueError: There are no predictions or no classes, or the predictions have another form.
        NonFiniteError: A logit is NaN or infinite.
    """
    if len(forget) == 0:
        raise ValueError("forget names no class; unlearning accuracy needs at least one")
    labels = _as_labels(predictions)
    forgotten = torch.isin(labels, torch.tensor(list(forget), device=labels.device))
    return 1.0 - _share(forgotten)


def retain_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of the images that the judge takes for the class they were generated for (RA).

    Args:
        predictions: (N, classes) floating-point logits, or (N,) integer labels.
        labels: (N,) integer labels asked for.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: There are no predictions, or they or the labels have another form.
        NonFiniteError: A logit is NaN or infinite.
    """
    predicted = _as_labels(predictions)
    if labels.shape != predicted.shape:
        raise ValueError(f"labels must have shape {tuple(predicted.shape)}, got {tuple(labels.shape)}")
    return _share(predicted == labels)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), sensible near 0 and 1 where the normal one is not.

    Args:
        successes: Number of successes, 0 to ``n``.
        n: Number of trials, at least 1.
        z: Quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
        Lower and upper bound within [0, 1].

    Raises:
        ValueError: An argument is out of range.
    """
    if n < 1 or not 0 <= successes <= n or not z > 0:
        raise ValueError(f"expected 0 <= successes <= n, n >= 1 and z > 0, got {successes}, {n} and {z}")
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    radius = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula is exact, but its rounding is not.
    lower = 0.0 if successes == 0 else centre - radius
    upper = 1.0 if successes == n else centre + radius
    return lower, upper


def _as_labels(predictions: Tensor) -> Tensor:
    """(N,) integer labels from logits or labels."""
    if predictions.ndim == 2 and predictions.is_floating_point() and predictions.shape[1] > 0:
        if not bool(predictions.isfinite().all()):
            raise NonFiniteError("the judge's logits hold NaN or infinite values; check its input images")
        predictions = predictions.argmax(dim=1)
    elif predictions.ndim != 1 or predictions.is_floating_point():
        raise ValueError(
            "predictions must be (N, classes) floating-point logits or (N,) integer labels, "
            f"got {tuple(predictions.shape)} {predictions.dtype}"
        )
    if len(predictions) == 0:
        raise ValueError("predictions are empty; an accuracy needs at least one image")
    return predictions


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
