"""The inception score against torchmetrics and known answers."""

import math

import pytest
import torch

from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import InceptionScore, inception_score


@pytest.fixture(scope="module")
def logits():
    return torch.randn(211, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("splits", [1, 7])
def test_it_equals_torchmetrics(logits, splits):
    reference = pytest.importorskip("torchmetrics.image.inception").InceptionScore(torch.nn.Identity(), splits=splits)
    logits = logits[:210]
    reference.update(logits)
    torch.manual_seed(11)  # its shuffle draws the order that our seed gives
    mean, std = reference.compute()
    ours = inception_score(logits, splits=splits, seed=11)
    assert ours[0] == pytest.approx(float(mean), rel=1e-12)
    assert ours[1] is None if splits == 1 else ours[1] == pytest.approx(float(std), rel=1e-9)


def test_known_answers():
    sure = torch.eye(5, dtype=torch.float64)
    assert inception_score(sure.repeat(4, 1), probabilities=True)[0] == pytest.approx(5.0, rel=1e-14)
    assert inception_score(sure[:1].repeat(20, 1), probabilities=True)[0] == 1.0
    assert inception_score(torch.zeros(20, 5))[0] == pytest.approx(1.0, abs=1e-14)
    assert inception_score(torch.eye(5) * 1e4)[0] == pytest.approx(5.0)  # no 0 * log 0


def test_sorted_classes_are_shuffled_before_they_are_cut():
    predictions = torch.eye(4, dtype=torch.float64).repeat_interleave(50, dim=0)
    blocks = [inception_score(part, probabilities=True)[0] for part in predictions.tensor_split(4)]
    assert blocks == [1.0] * 4  # what a cut in file order measures: the order
    assert inception_score(predictions, splits=4, probabilities=True)[0] > 3.5


def test_the_seed_fixes_the_order(logits):
    scores = [inception_score(logits, splits=5, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("batch_size", [1, 64, 300])
def test_streaming_and_merging_equal_the_whole(logits, batch_size):
    first, second = InceptionScore(), InceptionScore()
    for batch in logits[:100].split(batch_size):
        first.update(batch)
    second.update(logits[100:].softmax(1), probabilities=True)
    first.merge(InceptionScore())
    first.merge(second)
    assert first.count == len(logits)
    assert first.score() == pytest.approx(inception_score(logits)[0], rel=1e-12)


def test_bad_input_is_refused_and_changes_nothing(logits):
    score = InceptionScore()
    with pytest.raises(ValueError, match="no predictions"):
        score.score()
    score.update(logits)
    before = score.score()
    for bad, message in [
        (torch.zeros(3, 4), "7 classes as before, got 4"),
        (torch.zeros(0, 7), "neither of them 0"),
        (torch.zeros(7), r"\(N, classes\)"),
        (torch.zeros(3, 7, dtype=torch.int64), "floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            score.update(bad)
    with pytest.raises(ValueError, match="add up to 1"):
        score.update(logits, probabilities=True)
    with pytest.raises(NonFiniteError, match="1 of 7"):
        score.update(torch.tensor([[0.0, math.nan, 0, 0, 0, 0, 0]]))
    assert score.score() == before and score.count == len(logits)
    for splits in (0, 212):
        with pytest.raises(ValueError, match="splits"):
            inception_score(logits, splits=splits)
