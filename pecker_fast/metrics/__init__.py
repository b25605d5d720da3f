"""Measures of what was forgotten and what was kept."""

from pecker_fast.metrics.accuracy import retain_accuracy, unlearning_accuracy, wilson_interval
from pecker_fast.metrics.denoising import denoising_scores
from pecker_fast.metrics.entropy import LabelEntropy, label_entropy
from pecker_fast.metrics.fid import InceptionStatistics, fid
from pecker_fast.metrics.frechet import FeatureStatistics, frechet_distance
from pecker_fast.metrics.inception_score import InceptionScore, inception_score
from pecker_fast.metrics.intervals import mean_interval, student_t_quantile
from pecker_fast.metrics.membership import MembershipResult, membership_inference
from pecker_fast.metrics.precision_recall import DensityCoverage, PrecisionRecall, density_coverage, precision_recall

__all__ = [
    "DensityCoverage",
    "FeatureStatistics",
    "InceptionScore",
    "InceptionStatistics",
    "LabelEntropy",
    "MembershipResult",
    "PrecisionRecall",
    "denoising_scores",
    "density_coverage",
    "fid",
    "frechet_distance",
    "inception_score",
    "label_entropy",
    "mean_interval",
    "membership_inference",
    "precision_recall",
    "retain_accuracy",
    "student_t_quantile",
    "unlearning_accuracy",
    "wilson_interval",
]
