"""Measures of what was forgotten and what was kept."""

from pecker_fast.metrics.accuracy import retain_accuracy, unlearning_accuracy, wilson_interval
from pecker_fast.metrics.frechet import FeatureStatistics, frechet_distance

__all__ = [
    "FeatureStatistics",
    "frechet_distance",
    "retain_accuracy",
    "unlearning_accuracy",
    "wilson_interval",
]
