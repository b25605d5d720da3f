"""Frechet distance between two sets of features, from streamed means and covariances.

With Inception features this is FID (Heusel et al. 2017, arXiv 1706.08500); with any other network it is not
comparable to published FID values and should be named after that network.
"""

import torch
from torch import Tensor

from pecker_fast.errors import NonFiniteError


class FeatureStatistics:
    """Count, mean and covariance of features that arrive in batches, in float64.

    Batches are merged by their deviations (Chan, Golub and LeVeque 1979), never by raw second moments: a
    large mean costs no digits, and order and size of the batches do not matter beyond rounding.
    """

    def __init__(self) -> None:
        """Start with no features."""
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add a batch of features.

        Args:
            features: (N, D), any floating dtype; all batches on one device.

        Raises:
            ValueError: The shape is not (N, D), or D differs from earlier batches.
            NonFiniteError: A feature is NaN or infinite; nothing of the batch is added.
        """
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        if not bool(features.isfinite().all()):
            raise NonFiniteError("features hold NaN or infinite values; check the images and the network")
        batch = features.detach().double()
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add everything that ``other`` has seen, for instance on another process.

        Raises:
            ValueError: ``other`` holds features of another size.
        """
        if other._mean is not None and other._scatter is not None:
            self._add(other.count, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """(D,) float64 mean.

        Raises:
            ValueError: No features were added.
        """
        if self._mean is None:
            raise ValueError("no features were added; call update() first")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """(D, D) float64 covariance with divisor ``count - 1``.

        Raises:
            ValueError: Fewer than two features were added.
        """
        if self._scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.count}")
        return self._scatter / (self.count - 1)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"features must have size {len(self._mean)} as before, got {len(mean)}")
        total = self.count + count
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared distance ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two Gaussians.

    The trace of the root is the nuclear norm of ``C_a^(1/2) C_b^(1/2)``. No product of covariances is formed:
    small singular values keep their digits, and singular covariances need no offset.
    With fewer samples than dimensions the value is biased upwards; compare only equal sample counts.

    Args:
        a: Statistics of one set, at least 2 features.
        b: Statistics of the other, of the same feature size and on the same device.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: A set has fewer than 2 features, or the sizes differ.
        NonFiniteError: The features are so large that the distance overflows.
    """
    mean_a, mean_b, cov_a, cov_b = a.mean, b.mean, a.cov, b.cov
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"feature sizes differ: {len(mean_a)} and {len(mean_b)}; use one network for both")
    traces = cov_a.trace() + cov_b.trace()
    distance = (mean_a - mean_b).square().sum() + traces
    if not bool(distance.isfinite()):
        raise NonFiniteError("the Frechet distance overflows float64; the features are too large")
    overlap = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    # Equal sets give zero up to rounding, which may fall below it.
    return max(0.0, float(distance - 2 * overlap))


def _factor(cov: Tensor) -> Tensor:
    """A matrix ``F`` with ``F F^T = cov``."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()
