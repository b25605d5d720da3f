"""Inception score (Salimans et al. 2016, arXiv 1606.03498): how sure and how varied a classifier's answers are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pecker_fast.metrics.checks import log_probabilities


class InceptionScore:
    """``exp(mean_i KL(p_i || mean_j p_j))`` of predictions that arrive in batches, in float64.

    The mean divergence is the entropy of the mean prediction minus the mean entropy, so that two sums are all that
    has to be kept. Only with the classifier of `pecker_fast.models.inception` is it *the* inception score.
    """

    def __init__(self) -> None:
        """Start with no predictions."""
        self.count = 0
        self._sum: Tensor | None = None
        self._negative_entropy = 0.0

    def update(self, predictions: Tensor, *, probabilities: bool = False) -> None:
        """Add a batch of predictions.

        Args:
            predictions: (N, classes) logits in any floating dtype; all batches on one device.
            probabilities: They are probabilities rather than logits.

        Raises:
            ValueError: The shape is another, or the classes are not as many as before; nothing is added.
            NonFiniteError: A value is NaN or infinite; nothing is added.
        """
        logs = log_probabilities(predictions, probabilities)
        batch = logs.exp()
        self._add(len(batch), batch.sum(dim=0), float(torch.special.entr(batch).sum().neg()))

    def merge(self, other: InceptionScore) -> None:
        """Add everything that ``other`` has seen, for instance on another process.

        Raises:
            ValueError: ``other`` has seen predictions of other classes.
        """
        if other._sum is not None:
            self._add(other.count, other._sum, other._negative_entropy)

    def score(self) -> float:
        """The score, from 1 (all predictions alike) to the number of classes.

        Raises:
            ValueError: No predictions were added.
        """
        if self._sum is None:
            raise ValueError("no predictions were added; call update() first")
        divergence = self._negative_entropy / self.count + float(torch.special.entr(self._sum / self.count).sum())
        return math.exp(max(0.0, divergence))  # equal predictions give zero up to rounding

    def _add(self, count: int, total: Tensor, negative_entropy: float) -> None:
        if self._sum is not None and total.shape != self._sum.shape:
            raise ValueError(f"predictions must have {len(self._sum)} classes as before, got {len(total)}")
        self._sum = total.clone() if self._sum is None else self._sum + total
        self._negative_entropy += negative_entropy
        self.count += count


def inception_score(
    predictions: Tensor, *, splits: int = 1, seed: int = 0, probabilities: bool = False
) -> tuple[float, float | None]:
    """Inception score, or its mean over ``splits`` parts of the images.

    The parts are of images in a random order: files sorted by class, cut as they lie, would leave few classes in each
    part and a score that measures the order. A part's score is lower than that of all images; compare equal counts.

    Args:
        predictions: (N, classes) logits in any floating dtype.
        splits: Parts; 1 scores all images together. ``torch.tensor_split`` cuts them, so sizes differ by one at most.
        seed: Of the order, which is the same on every device; of no effect with one part.
        probabilities: ``predictions`` are probabilities rather than logits.

    Returns:
        Mean of the parts' scores and their standard deviation (divisor ``splits - 1``), None for one part.

    Raises:
        ValueError: ``splits`` is not in [1, N], or the predictions have another form.
        NonFiniteError: A value is NaN or infinite.
    """
    logs = log_probabilities(predictions, probabilities)
    if not 1 <= splits <= len(logs):
        raise ValueError(f"splits must lie in [1, {len(logs)}] (one image a part at least), got {splits}")
    if splits > 1:
        order = torch.randperm(len(logs), generator=torch.Generator().manual_seed(seed), device="cpu")
        logs = logs[order.to(logs.device)]
    scores = torch.tensor([_score(part.exp()) for part in logs.tensor_split(splits)], dtype=torch.float64, device="cpu")
    return float(scores.mean()), float(scores.std()) if splits > 1 else None


def _score(probabilities: Tensor) -> float:
    part = InceptionScore()
    part.update(probabilities, probabilities=True)
    return part.score()
