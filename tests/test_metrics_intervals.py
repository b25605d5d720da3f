"""Student's interval against scipy and tables, and the entropy of a judge."""

import math
import random

import pytest
import torch

from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import label_entropy, mean_interval, student_t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 29, 100, 4321, 1_000_000])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.500001, 0.6, 0.9, 0.975, 0.995, 0.999999])
def test_quantiles_equal_those_of_scipy(degrees, p):
    stats = pytest.importorskip("scipy.stats")
    assert student_t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-8, abs=1e-9)


def test_quantiles_of_the_table():
    assert student_t_quantile(0.975, 1) == pytest.approx(12.706204736, abs=1e-8)
    assert student_t_quantile(0.975, 4) == pytest.approx(2.776445105, abs=1e-8)
    assert student_t_quantile(0.75, 1) == pytest.approx(1.0, abs=1e-12)  # Cauchy
    for arguments in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="degrees"):
            student_t_quantile(*arguments)


def test_mean_interval_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = [0.93, 0.99, 0.97, 0.9, 0.96]
    for level in (0.5, 0.95, 0.999):
        mean, low, high = mean_interval(values, level)
        expected = stats.t.interval(level, 4, loc=mean, scale=stats.sem(values))
        assert (low, high) == pytest.approx(expected, rel=1e-9)
    assert mean == pytest.approx(0.95, abs=1e-15)


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    intervals = [mean_interval([draw.gauss(2.0, 1.0) for _ in range(4)]) for _ in range(400)]
    assert 365 <= sum(low <= 2.0 <= high for _, low, high in intervals) <= 393


def test_mean_interval_of_one_value_has_no_bounds():
    assert mean_interval([0.25]) == (0.25, None, None)
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)


def test_mean_interval_refuses_bad_input():
    with pytest.raises(ValueError, match="empty"):
        mean_interval([])
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            mean_interval([1.0, 2.0], level)
    with pytest.raises(NonFiniteError, match="failed"):
        mean_interval([1.0, math.nan])


def test_entropy_of_a_blind_and_of_a_sure_judge():
    assert label_entropy(torch.zeros(6, 8), [2]) == (pytest.approx(math.log(8)), pytest.approx(1 / 8))
    sure = 1e4 * torch.nn.functional.one_hot(torch.tensor([0, 0, 3, 5]), 8).float()
    assert label_entropy(sure, [0]) == (0.0, 0.5)
    assert label_entropy(sure, [0, 5]) == (0.0, 0.75)
    assert label_entropy(sure, (5, 5)) == (0.0, 0.25)


def test_entropy_equals_torch_distributions():
    logits = torch.randn(50, 6)
    found = label_entropy(logits, [1, 4])
    assert found.entropy == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy().mean()))
    assert found.forgotten_probability == pytest.approx(float(logits.softmax(1)[:, [1, 4]].sum(1).mean()))


def test_entropy_refuses_bad_input():
    for forget in ([], [6], [-1], [0.5]):
        with pytest.raises(ValueError, match="forget"):
            label_entropy(torch.zeros(2, 6), forget)
    with pytest.raises(NonFiniteError, match="predictions"):
        label_entropy(torch.full((2, 6), math.inf), [0])
