"""When an erasure is done: lower bounds, fresh samples, and a run that does not notice."""

import math

import pytest
import torch
from test_distiller import SCHEDULE, config, unet
from torch import nn

from pecker_fast import MaskedDistiller, StopCheck, StopRule, metrics
from pecker_fast.errors import NonFiniteError
from pecker_fast.stop_rule import samples_needed

# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ua>=0.99,retain>=0.97", StopRule(ua=0.99, retain=0.97)),
        (" retain >= .97 , ua>=0.99", StopRule(ua=0.99, retain=0.97)),
        ("ua>=0.5", StopRule(ua=0.5)),
        ("retain>=9e-1", StopRule(retain=0.9)),
    ],
)
def test_a_rule_from_text(text, rule):
    assert StopRule.parse(text) == rule
    assert StopRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME>=SHARE"),
        ("ua>0.9", "got 'ua>0.9'"),
        ("ua>=0.9,", "got ''"),
        ("fid>=0.9", "unknown name 'fid'; expected ua or retain"),
        ("ua>=0.9,ua>=0.8", "ua is named twice"),
        ("ua>=high", "a number such as 0.99, got 'high'"),
        ("ua>=1", "StopRule.ua: expected a share above 0 and below 1, got 1.0"),
        ("retain>=0", "StopRule.retain"),
        ("retain>=nan", "StopRule.retain"),
    ],
)
def test_text_that_is_no_rule(text, message):
    with pytest.raises(ValueError) as error:
        StopRule.parse(text)
    assert message in str(error.value)


def test_a_rule_holds_where_the_lower_bounds_do():
    rule = StopRule(ua=0.99, retain=0.97)
    good = {"ua": (500, 500), "retain": (493, 500)}
    assert rule.holds(good)
    assert not rule.holds(good | {"ua": (499, 500)})  # a share of 0.998, which 500 images do not prove
    assert not rule.holds(good | {"retain": (492, 500)})
    assert StopRule(ua=0.99).holds({"ua": (500, 500)}) and StopRule(retain=0.97).holds(good)
    with pytest.raises(ValueError, match="missing retain"):
        rule.holds({"ua": (500, 500)})
    with pytest.raises(ValueError, match="a target for ua"):
        StopRule()


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999])
def test_how_many_samples_a_target_needs(target):
    needed = samples_needed(target)
    assert needed == max(1, math.ceil(1.96**2 * target / (1 - target)))
    assert metrics.wilson_interval(needed, needed)[0] >= target
    assert needed == 1 or metrics.wilson_interval(needed - 1, needed - 1)[0] < target


# -- the check -------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Sees what ``answer`` says of each image, draws from torch's random state, and remembers the images."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []
        self.eval()

    def forward(self, images):
        torch.rand(3)
        self.seen.append(images)
        return torch.nn.functional.one_hot(self.answer(images), 10).float()


class Writes:
    """A generator that draws its label into the image."""

    def __init__(self, run):
        self.config, self.device, self.dtype, self.ranks = run.config, run.device, run.dtype, run.ranks
        self.asked = torch.zeros(10, dtype=torch.int64)

    def sample(self, labels, noise):
        self.asked += labels.bincount(minlength=10)
        return (labels / 10).view(-1, 1, 1, 1).expand_as(noise)


def reads(images):
    return (images[:, 0, 0, 0] * 10).round().long()


def never_three(images):
    return torch.zeros(len(images), dtype=torch.int64)


def distiller(**more):
    classes = {"forget": (3,), "override": (8,), "num_classes": 10}
    return MaskedDistiller(unet(num_classes=10), SCHEDULE, config(**classes | more))


def weights(distiller):
    return [*distiller.generator.state_dict().values(), *distiller.fake_score.state_dict().values()]


EASY = StopRule(ua=0.5)


def test_a_run_with_checks_is_the_run_without_to_the_bit():
    """With dropout, whose draws are torch's own."""
    runs = []
    for checked in (False, True, False):
        torch.manual_seed(7)
        run, check = distiller(), StopCheck(EASY, Judge(never_three), (3,))
        for _ in range(4):
            run.step()
            if checked:
                check(run)
        runs.append([*weights(run), run.active.ema, torch.get_rng_state(), run.draws.rng.get_state()])
    plain, checked, again = runs
    assert all(map(torch.equal, plain, checked)) and all(map(torch.equal, plain, again))


def test_it_stops_when_the_rule_holds_twice_in_a_row():
    judge = Judge(lambda images: torch.full((len(images),), label))
    run, check = distiller(), StopCheck(EASY, judge, (3,))
    verdicts = []
    for label in (0, 3, 0, 0, 0):  # noqa: B007  read by the judge
        verdicts.append(check(run))
    assert [verdict.holds for verdict in verdicts] == [True, False, True, True, True]
    assert [verdict.stop for verdict in verdicts] == [False, False, False, True, True]


def test_the_state_goes_on_with_the_images_that_would_have_come():
    run, judge = distiller(), Judge(never_three)
    check = StopCheck(EASY, judge, (3,))
    check(run)
    resumed = StopCheck(EASY, judge, (3,))
    resumed.load_state_dict(check.state_dict())
    judge.seen.clear()
    assert check(run).stop and resumed(run).stop
    half = len(judge.seen) // 2
    assert all(map(torch.equal, judge.seen[:half], judge.seen[half:]))


def test_images_are_new_at_every_check_enough_and_in_range():
    judge = Judge(never_three)
    check = StopCheck(EASY, judge, (3, 5), samples=501)
    run = distiller(forget=(3, 5), override=(8, 6))
    counts = [check(run).counts for _ in range(2)]
    assert counts[0]["ua"] == (501, 501) and counts[0]["retain"][1] == 501
    images = torch.cat(judge.seen)
    assert len(images) == 2 * 3 * 501 and images.min() >= -1 and images.max() <= 1
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)
    other = Judge(never_three)
    StopCheck(EASY, other, (3, 5), samples=501, seed=1)(run)
    assert not torch.equal(other.seen[0], judge.seen[0])


def test_the_averaged_generator_is_what_is_judged():
    """One that was trained and averages slowly still draws what it drew at first, the running weights do not."""
    run, judge = distiller(ema_decay=0.5, generator_lr=0.1), Judge(never_three)
    for _ in range(2):
        run.step()
    StopCheck(EASY, judge, (3,))(run)
    averaged = judge.seen[0]
    with torch.no_grad():
        run.active.ema.copy_(run.active.values)
    judge.seen.clear()
    StopCheck(EASY, judge, (3,))(run)
    assert not torch.equal(judge.seen[0], averaged)


def test_unlearning_is_that_of_the_worst_class():
    """The judge takes every 5 for a 3, and every 3 for a 0."""

    def confused(images):
        labels = reads(images)
        return torch.where(labels == 5, 3, torch.where(labels == 3, 0, labels))

    run = Writes(distiller(forget=(3, 5), override=(8, 6)))
    check = StopCheck(StopRule(retain=0.9), Judge(confused), (3, 5))
    verdict = check(run)
    assert verdict.counts == {"ua": (0, 500), "retain": (500, 500)} and verdict.holds
    values = verdict.values()
    assert (values["ua"], values["retain"]) == (0, 1) and values["retain_lower"] == pytest.approx(500 / 503.8416)
    assert StopCheck(EASY, Judge(confused), (3,))(run).counts["ua"] == (500, 500)


@pytest.mark.parametrize(
    ("classes", "checked", "retained"),
    [
        ({"forget": (3,)}, (3,), {0, 1, 2, 4, 5, 6, 7, 8, 9}),
        ({"forget": (3,), "retain": (0, 1)}, (3,), {0, 1}),
        ({"forget": (3,), "retain": [9]}, (3,), {9}),
        ({"forget": (3, 5), "override": (8, 6)}, (3,), {0, 1, 2, 4, 6, 7, 8, 9}),  # not 5, which is forgotten too
        ({"forget": (3, 5), "override": (8, 6), "retain": (1, 2)}, (3, 5), {1, 2}),  # the override is not kept
    ],
)
def test_what_the_config_retains_is_judged_and_nothing_else(classes, checked, retained):
    """The judge is wrong about every class that is neither forgotten nor retained."""
    run = Writes(distiller(**classes))
    right = torch.tensor(sorted({*retained, *checked}))
    judge = Judge(lambda images: torch.where(torch.isin(reads(images), right), reads(images), 0))
    counts = StopCheck(StopRule(retain=0.9), judge, checked)(run).counts
    assert counts["retain"] == (500, 500)
    assert set(run.asked.nonzero().flatten().tolist()) == retained | set(checked)


def test_what_is_refused():
    judge = Judge(never_three)
    with pytest.raises(ValueError, match="at least 500 of a side, got 499"):
        StopCheck(EASY, judge, (3,), samples=499)
    with pytest.raises(ValueError, match=r"ua>=0.995: can never hold on 500 samples.*0.9924; take at least 765"):
        StopCheck(StopRule(ua=0.995), judge, (3,))
    StopCheck(StopRule(ua=0.995), judge, (3,), samples=765)
    with pytest.raises(ValueError, match="forget: expected the classes"):
        StopCheck(EASY, judge, ())
    with pytest.raises(ValueError, match="Judge is in training mode"):
        StopCheck(EASY, Judge(never_three).train(), (3,))
    run = distiller()
    with pytest.raises(ValueError, match="classes 0 to 9, got"):
        StopCheck(EASY, judge, (10,))(run)
    with pytest.raises(ValueError, match="class 5 is retained by the distiller's config"):
        StopCheck(EASY, judge, (3, 5))(run)
    with pytest.raises(ValueError, match=r"logits of shape \(256, 10\), got \(256, 3\)"):
        StopCheck(EASY, lambda images: torch.zeros(len(images), 3), (3,))(run)
    with pytest.raises(NonFiniteError, match="logits hold NaN"):
        StopCheck(EASY, lambda images: torch.full((len(images), 10), math.nan), (3,))(run)
