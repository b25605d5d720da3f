"""Membership inference against scikit-learn and known answers, and the loss threshold attack."""

import math

import pytest
import torch

from pecker_fast import NoiseSchedule
from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import denoising_scores, membership_inference


def _scores(members, others, shift, ties):
    generator = torch.Generator().manual_seed(members)
    a = torch.randn(members, generator=generator) + shift
    b = torch.randn(others, generator=generator)
    return (a.round(decimals=1), b.round(decimals=1)) if ties else (a, b)


@pytest.mark.parametrize(
    ("members", "others", "shift", "ties"), [(300, 200, 0.8, False), (70, 450, 0.3, True), (5, 7, 1.0, False)]
)
@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1])
def test_it_equals_scikit_learn(members, others, shift, ties, fpr):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = _scores(members, others, shift, ties)
    truth, scores = [1] * members + [0] * others, torch.cat([a, b]).numpy()
    result = membership_inference(a, b, fpr=fpr)
    assert result.auc == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    rates, hits, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert result.tpr == pytest.approx(hits[rates <= fpr].max(), abs=1e-12)
    assert (result.members, result.nonmembers) == (members, others)


def test_delong_equals_its_definition():
    a, b = _scores(40, 30, 0.5, True)
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    error = math.sqrt(wins.mean(1).var() / 40 + wins.mean(0).var() / 30)
    result = membership_inference(a, b)
    assert result.auc == pytest.approx(float(wins.mean()), abs=1e-14)
    assert result.interval == pytest.approx((result.auc - 1.959964 * error, result.auc + 1.959964 * error), abs=1e-6)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # P(a > b) for unit normals a distance 1 apart
    covered = 0
    for _ in range(100):
        a, b = torch.randn(2, 60, generator=generator)
        low, high = membership_inference(a + 1.0, b, shuffles=1).interval
        covered += low <= truth <= high
    assert covered >= 88


def test_a_perfect_attack():
    result = membership_inference(torch.linspace(2, 3, 50), torch.linspace(0, 1, 200), shuffles=99)
    assert (result.auc, result.tpr, result.interval, result.p_value) == (1.0, 1.0, None, 0.01)
    assert result.false_positives == 2
    assert abs(result.shuffled_auc - 0.5) < 0.02
    reversed_attack = membership_inference(torch.zeros(5), torch.ones(5))
    assert (reversed_attack.auc, reversed_attack.tpr) == (0.0, 0.0)


def test_a_blind_attack():
    constant = membership_inference(torch.zeros(30), torch.zeros(20))
    assert (constant.auc, constant.tpr, constant.interval, constant.p_value) == (0.5, 0.0, None, 1.0)
    same = membership_inference(torch.arange(100.0), torch.arange(100.0))
    assert same.auc == 0.5
    assert same.interval[0] < 0.5 < same.interval[1]
    assert same.p_value == 1.0


def test_few_negatives_allow_no_false_positive():
    result = membership_inference(torch.tensor([0.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert (result.false_positives, result.tpr) == (0, 0.5)  # 3 and 4; the member tied with the best other is not above
    assert membership_inference(torch.zeros(1), torch.zeros(1)).interval is None
    # 29 of 100 is a rate of 0.29, though 0.29 * 100 is below 29 in floating point.
    assert membership_inference(torch.zeros(3), torch.arange(100.0), fpr=0.29).false_positives == 29


def test_shuffles_are_fixed_by_the_seed():
    a, b = _scores(30, 40, 0.2, False)
    results = [membership_inference(a, b, seed=seed, shuffles=20) for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0].shuffled_auc != results[2].shuffled_auc
    assert results[0].auc == results[2].auc


def test_bad_scores_are_refused():
    good = torch.zeros(3)
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="nonmember_scores"):
            membership_inference(good, bad)
    with pytest.raises(NonFiniteError, match="member_scores"):
        membership_inference(torch.tensor([math.nan]), good)
    for options in ({"fpr": 1.0}, {"fpr": -0.1}, {"shuffles": 0}):
        with pytest.raises(ValueError, match="fpr in"):
            membership_inference(good, good, **options)


SCHEDULE = NoiseSchedule.linear(100)


def _knows(known):
    """A network that has learned ``known`` by heart and takes every input for a noisy version of the nearest."""

    def predict(x_t, t, labels):
        alpha, std = SCHEDULE.alpha(t, x_t), SCHEDULE.std(t, x_t)
        guesses = (x_t[:, None] - alpha[:, None] * known) / std[:, None]
        distance = guesses.square().flatten(2).mean(2)
        return guesses[torch.arange(len(x_t)), distance.argmin(1)]

    return predict


@pytest.fixture(scope="module")
def images():
    return torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_loss_threshold_attack_finds_what_was_learned_by_heart(images):
    labels = torch.zeros(24, dtype=torch.int64)
    scores = denoising_scores(_knows(images[:12]), SCHEDULE, images, labels, timesteps=[10], seeds=[0, 1])
    assert membership_inference(scores[:12], scores[12:]).auc > 0.9
    blind = denoising_scores(lambda x, t, c: torch.zeros_like(x), SCHEDULE, images, labels, timesteps=[10, 40])
    assert membership_inference(blind[:12], blind[12:]).auc == 0.5


def test_scores_are_the_mean_error_and_do_not_depend_on_the_batch(images):
    labels = torch.arange(24)

    def predict(x_t, t, condition):
        return x_t + 0.01 * condition.view(-1, 1, 1, 1) + 0.1 * t.view(-1, 1, 1, 1)

    scores = denoising_scores(predict, SCHEDULE, images, labels, timesteps=[3, 50], seeds=[7])
    assert scores.dtype == torch.float64
    draw, expected = torch.Generator().manual_seed(7), 0
    for t in (3, 50):
        noise = torch.randn(1, 4, 4, generator=draw, dtype=torch.float64).float().expand_as(images)
        x_t = SCHEDULE.add_noise(images, noise, t)
        expected -= (predict(x_t, torch.full((24,), t), labels) - noise).square().flatten(1).mean(1) / 2
    torch.testing.assert_close(scores, expected.double(), rtol=1e-5, atol=1e-6)
    parts = denoising_scores(predict, SCHEDULE, images[5:6], labels[5:6], timesteps=[3, 50], seeds=[7], batch_size=1)
    torch.testing.assert_close(parts, scores[5:6], rtol=1e-6, atol=1e-7)


def test_denoising_scores_refuse_bad_input(images):
    labels = torch.zeros(24, dtype=torch.int64)

    def score(images=images, labels=labels, predict=lambda x, t, c: x, timesteps=(1,), **options):
        return denoising_scores(predict, SCHEDULE, images, labels, timesteps=timesteps, **options)

    for options in ({"timesteps": ()}, {"seeds": ()}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least one timestep"):
            score(**options)
    with pytest.raises(ValueError, match="timestep must lie"):
        score(timesteps=[100])
    with pytest.raises(ValueError, match="labels"):
        score(labels=labels[:3])
    with pytest.raises(ValueError, match="expected noise of shape"):
        score(predict=lambda x, t, c: x[:, :, :2])
    with pytest.raises(NonFiniteError):
        score(predict=lambda x, t, c: x * math.nan)
