"""Accuracies, the Wilson interval and the Frechet distance against closed forms and scipy."""

import math

import pytest
import torch

from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import (
    FeatureStatistics,
    frechet_distance,
    retain_accuracy,
    unlearning_accuracy,
    wilson_interval,
)


def test_unlearning_accuracy_counts_images_that_escaped():
    labels = torch.tensor([0, 0, 1, 3, 9])
    assert unlearning_accuracy(labels, [0]) == 3 / 5
    assert unlearning_accuracy(labels, [0, 9]) == 2 / 5
    assert unlearning_accuracy(labels, [7]) == 1.0
    logits = torch.nn.functional.one_hot(labels, 10).double()
    assert unlearning_accuracy(logits, [0]) == 3 / 5


def test_retain_accuracy_counts_the_class_asked_for():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    assert retain_accuracy(logits, torch.tensor([0, 1, 1])) == 2 / 3
    assert retain_accuracy(torch.tensor([4, 4]), torch.tensor([4, 4])) == 1.0


def test_accuracies_refuse_bad_input():
    with pytest.raises(ValueError, match="empty"):
        unlearning_accuracy(torch.empty(0, dtype=torch.int64), [0])
    with pytest.raises(ValueError, match="forget"):
        unlearning_accuracy(torch.tensor([1]), [])
    with pytest.raises(ValueError, match="predictions must be"):
        unlearning_accuracy(torch.tensor([0.5]), [0])
    with pytest.raises(ValueError, match=r"\(1,\)"):
        retain_accuracy(torch.tensor([1]), torch.tensor([1, 2]))
    with pytest.raises(NonFiniteError):
        retain_accuracy(torch.tensor([[0.0, math.nan]]), torch.tensor([1]))


def test_wilson_interval():
    lower, upper = wilson_interval(5, 10)
    assert (round(lower, 4), round(upper, 4)) == (0.2366, 0.7634)
    assert lower + upper == pytest.approx(1.0)
    # With no success the upper bound is z^2 / (n + z^2).
    assert wilson_interval(0, 100) == (0.0, pytest.approx(1.96**2 / (100 + 1.96**2)))
    assert wilson_interval(100, 100)[1] == 1.0
    for arguments in ((1, 0), (-1, 5), (6, 5), (1, 5, 0.0)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(*arguments)


def _statistics(features, batch_size=1000):
    statistics = FeatureStatistics()
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000])
def test_streaming_equals_the_whole(batch_size):
    features = torch.randn(257, 6, dtype=torch.float64) + 1e6  # raw second moments would lose 12 digits
    statistics = _statistics(features, batch_size)
    assert statistics.count == 257
    torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.cov, features.T.cov(), rtol=1e-8, atol=1e-9)


def test_merge_equals_the_whole():
    features = torch.randn(50, 4)
    left, right, empty = _statistics(features[:20]), _statistics(features[20:]), FeatureStatistics()
    left.merge(right)
    left.merge(empty)
    empty.merge(left)
    whole = _statistics(features)
    for merged in (left, empty):
        assert merged.count == 50
        torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_frechet_distance_agrees_with_scipy_sqrtm(size):
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(size)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    a = torch.randn(500, size, generator=generator, dtype=torch.float64)
    b = torch.randn(400, size, generator=generator, dtype=torch.float64) @ mix + 0.3
    a, b = _statistics(a), _statistics(b)
    root = linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_in_closed_form():
    features = torch.randn(300, 8, dtype=torch.float64)
    a, moved, scaled = _statistics(features), _statistics(features + 2.0), _statistics(features * 3.0)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(a, moved) == pytest.approx(8 * 4.0, rel=1e-12)
    mean_part = float((2.0 * a.mean).square().sum())
    assert frechet_distance(a, scaled) == pytest.approx(mean_part + 4.0 * float(a.cov.trace()), rel=1e-12)


def test_frechet_distance_of_singular_covariances():
    line = torch.randn(40, 1, dtype=torch.float64) * torch.ones(1, 5, dtype=torch.float64)
    a, b = _statistics(line), _statistics(2.0 * line)
    expected = float(a.mean.square().sum() + a.cov.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_refuses_bad_input():
    statistics = _statistics(torch.randn(10, 3))
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        frechet_distance(statistics, _statistics(torch.randn(1, 3)))
    with pytest.raises(ValueError, match="no features"):
        frechet_distance(statistics, FeatureStatistics())
    with pytest.raises(ValueError, match="sizes differ"):
        frechet_distance(statistics, _statistics(torch.randn(10, 4)))
    with pytest.raises(NonFiniteError, match="overflows"):
        frechet_distance(statistics, _statistics(torch.randn(10, 3, dtype=torch.float64) * 1e200))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        statistics.update(torch.randn(3))
    with pytest.raises(ValueError, match="size 3"):
        statistics.update(torch.randn(2, 4))
    with pytest.raises(NonFiniteError):
        statistics.update(torch.tensor([[0.0, math.inf, 0.0]]))
    assert statistics.count == 10
