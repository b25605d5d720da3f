"""FID by name: a Frechet distance of Inception features, and of nothing else."""

from __future__ import annotations

from pecker_fast.metrics.frechet import FeatureStatistics, frechet_distance


class InceptionStatistics(FeatureStatistics):
    """Statistics of features that `pecker_fast.models.inception.InceptionV3` computed.

    Attributes:
        weights: Digest of that network's weights: features of other weights are other features.
    """

    def __init__(self, weights: str) -> None:
        """Start with no features."""
        super().__init__()
        self.weights = weights

    def merge(self, other: FeatureStatistics) -> None:
        """Add everything that ``other`` has seen.

        Raises:
            ValueError: ``other`` is of another network, or of other weights; nothing is added.
        """
        if getattr(other, "weights", None) != self.weights:
            raise ValueError("expected statistics of the same Inception weights; compute both with one network")
        super().merge(other)


def fid(*, real: InceptionStatistics, generated: InceptionStatistics) -> float:
    """Frechet Inception distance (Heusel et al. 2017, arXiv 1706.08500): ``frechet_distance`` of Inception features.

    Symmetric, and still by name as all metrics that compare two sets. It is biased upwards for few images: compare
    equal counts, and do not compare with a published figure of another count or another reference set.

    Args:
        real: Of real images, at least 2; for FID as published as many as 2048 features need, 50 000 say.
        generated: Of generated images, by the same network.

    Raises:
        ValueError: The statistics are of another network, of other weights, or of fewer than 2 images.
        NonFiniteError: The distance overflows.
    """
    for name, statistics in (("real", real), ("generated", generated)):
        if not isinstance(statistics, InceptionStatistics):
            raise ValueError(
                f"{name} is {type(statistics).__name__}, expected InceptionStatistics; "
                "with features of another network use frechet_distance, and do not call it FID"
            )
    if real.weights != generated.weights:
        raise ValueError("real and generated are of different Inception weights; compute both with one network")
    return frechet_distance(real, generated)
