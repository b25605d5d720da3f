"""Relearning and probing on a network whose samples are known exactly, and on a real one."""

import copy
import math

import pytest
import torch
from torch import nn

from pecker_fast import BlockMask, NoiseSchedule, apply_mask
from pecker_fast.attacks import RelearningResult, probe, relearn
from pecker_fast.errors import NonFiniteError
from pecker_fast.models import DDPMUNet

SCHEDULE = NoiseSchedule.linear(50)
ONE_STEP = {"kind": "one_step", "t_init": 40, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 2, 2]}
DDIM = {"kind": "ddim", "steps": 3, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 2, 2]}
FOUR = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1], [1, 1, -1, -1]]).float()


class Points(nn.Module):
    """The ideal noise prediction for classes of one image each, which every sampler then draws exactly."""

    def __init__(self, points):
        super().__init__()
        self.points = nn.Parameter(points.clone())

    def forward(self, x_t, t, condition):
        image = self.points[condition].view(-1, 1, 2, 2)
        return (x_t - SCHEDULE.alpha(t, x_t) * image) / SCHEDULE.std(t, x_t)


def judge(images):
    """Nearest class."""
    return -torch.cdist(images.flatten(1), FOUR.to(images))


def model_without(*forgotten):
    """Draws class 1 in place of the forgotten ones."""
    points = FOUR.clone()
    points[list(forgotten)] = FOUR[1]
    return Points(points).eval()


def attack(model, generation, classes=(0,), **options):
    labels = torch.tensor(classes).repeat(5)
    settings = {"judge": judge, "every": 1, "max_steps": 60, "lr": 0.05, "samples": 4} | options
    return relearn(model, generation, FOUR[labels].view(-1, 1, 2, 2), labels, **settings)


KINDS = pytest.mark.parametrize("generation", [ONE_STEP, DDIM], ids=["one_step", "ddim"])


@KINDS
def test_a_model_that_still_knows_needs_no_step(generation):
    assert attack(Points(FOUR).eval(), generation) == RelearningResult(0, ((0, 1.0),))


@KINDS
def test_a_model_that_cannot_learn_never_returns(generation):
    result = attack(model_without(0), generation, lr=1e-9, max_steps=5, every=2)
    assert result == RelearningResult(None, ((0, 0.0), (2, 0.0), (4, 0.0), (5, 0.0)))


def test_steps_to_return_are_those_of_adam():
    # Adam moves each pixel by about lr a step towards the image: from -1 it crosses 0 after 1 / lr.
    result = attack(model_without(0), ONE_STEP)
    assert 20 <= result.steps_to_return <= 24
    assert [share for _, share in result.curve] == [0.0] * result.steps_to_return + [1.0]
    slower = attack(model_without(0), ONE_STEP, lr=0.025)
    assert 40 <= slower.steps_to_return <= 48
    assert 15 <= attack(model_without(0), DDIM).steps_to_return <= 30


def test_several_classes_are_counted_together():
    half = attack(model_without(0), ONE_STEP, classes=(0, 2), max_steps=0)  # class 2 was never forgotten
    assert half == RelearningResult(0, ((0, 0.5),))
    assert attack(model_without(0), ONE_STEP, classes=(0, 2), max_steps=0, target_share=0.6).steps_to_return is None
    assert attack(model_without(0, 2), ONE_STEP, classes=(0, 2)).steps_to_return > 0


def test_only_its_own_noise_level_is_trained_in_one_step():
    seen = []

    class Listening(Points):
        def forward(self, x_t, t, condition):
            if torch.is_grad_enabled():
                seen.extend(t.tolist())
            return super().forward(x_t, t, condition)

    attack(Listening(FOUR), ONE_STEP, max_steps=3, target_share=1.0)
    assert seen == []  # it still knew
    forgetful = Listening(model_without(0).points.detach())
    attack(forgetful, ONE_STEP, max_steps=3)
    assert set(seen) == {40}
    seen.clear()
    attack(forgetful, DDIM, max_steps=8)
    assert min(seen) < 5 and max(seen) >= 45


@KINDS
def test_a_real_network_is_copied_and_the_attack_repeats(generation):
    net = DDPMUNet(width=8, channel_mult=(1,), num_res_blocks=1, image_size=2, channels=1, norm_groups=4, num_classes=4)
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    results = [attack(net, generation, max_steps=3, target_share=1.0, seed=seed) for seed in (0, 0)]
    assert results[0] == results[1]
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    with torch.no_grad():
        assert attack(net, generation, max_steps=3, target_share=1.0) == results[0]


def test_relearning_refuses_bad_input():
    model = model_without(0)
    for options, message in [
        ({"target_share": 0.0}, "target_share"),
        ({"lr": 0.0}, "lr"),
        ({"every": 0}, "every is out of range: 0"),
        ({"max_steps": -1}, "max_steps"),
        ({"samples": 0}, "samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"judge": nn.Linear(4, 4)}, "training mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(model, ONE_STEP, **options)
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    for bad in ((images[0], labels), (images[:0], labels[:0]), (images.byte(), labels), (images, labels[:2])):
        with pytest.raises(ValueError, match="images: expected|labels: expected"):
            relearn(model, ONE_STEP, *bad, judge=judge)
    with pytest.raises(NonFiniteError, match="images"):
        relearn(model, ONE_STEP, images * math.nan, labels, judge=judge)
    with pytest.raises(ValueError, match="generation"):
        relearn(model, {"kind": "one_step"}, images, labels, judge=judge)
    with pytest.raises(NonFiniteError, match="lower lr"):
        attack(model, ONE_STEP, lr=1e30, max_steps=5, judge=lambda images: torch.eye(4)[torch.full((len(images),), 3)])
    with pytest.raises(NonFiniteError, match="logits"):
        attack(model, ONE_STEP, judge=lambda images: judge(images) * math.nan)


def test_a_masked_model_is_refused_until_its_mask_is_removed():
    net = DDPMUNet(width=8, channel_mult=(1,), num_res_blocks=1, image_size=2, channels=1, norm_groups=4, num_classes=4)
    active = apply_mask(net, BlockMask.random(net, 0.5, "row"))
    with pytest.raises(ValueError, match="masked layers"):
        attack(net, ONE_STEP)
    active.remove()
    assert attack(net, ONE_STEP, max_steps=1, target_share=1.0).curve


class Hiding(Points):
    """Knows every class, but says so only away from the noise level, the noise and the label it is asked at."""

    def forward(self, x_t, t, condition):
        hidden = (t == 40) & (x_t.flatten(1).std(1) < 5.0) & (condition == 0)
        shown = torch.where(hidden, 1, condition)
        return super().forward(x_t, t, torch.where(condition == 4, 0, shown))


def test_probing_finds_what_is_hidden_and_not_what_is_gone():
    ways = {"t_inits": [20, 45], "noise_scales": [1000.0], "null_class": 4, "samples": 8}
    found = probe(Hiding(FOUR).eval(), ONE_STEP, [0], judge=judge, **ways)
    assert [(row["probe"], row["value"], row["recognised"]) for row in found] == [
        ("published", None, 0.0),
        ("t_init", 20, 1.0),
        ("t_init", 45, 1.0),
        ("noise_scale", 1000.0, 1.0),
        ("null_class", 4, 1.0),
    ]
    assert all(row["samples"] == 8 and row["interval"][0] <= row["recognised"] <= row["interval"][1] for row in found)
    gone = probe(model_without(0), ONE_STEP, [0], judge=judge, t_inits=[20, 45], noise_scales=[10.0])
    assert [row["recognised"] for row in gone] == [0.0] * 4


def test_probing_other_weights_changes_none():
    model, other = model_without(0, 2), model_without(2)
    before = model.points.detach().clone()
    weights = {"raw": other.state_dict(), "module": other}
    found = probe(model, DDIM, [0, 2], judge=judge, weights=weights, samples=3)
    assert [(row["value"], row["recognised"], row["samples"]) for row in found] == [
        (None, 0.0, 6),
        ("raw", 0.5, 6),
        ("module", 0.5, 6),
    ]
    assert torch.equal(model.points, before)


def test_probing_refuses_bad_input():
    model = model_without(0)
    for generation, options, message in [
        (DDIM, {"t_inits": [3]}, "one_step generators"),
        (ONE_STEP, {"t_inits": [50]}, "t_init in"),
        (ONE_STEP, {"samples": 0}, "at least one sample"),
        (ONE_STEP, {"judge": nn.Linear(4, 4)}, "judge: Linear"),
        (ONE_STEP, {"weights": {"raw": Points(FOUR)}}, "weights: Points"),
        ({"kind": "ddim"}, {}, "generation"),
    ]:
        with pytest.raises(ValueError, match=message):
            probe(model, generation, [0], **({"judge": judge} | options))
    with pytest.raises(ValueError, match="classes to forget"):
        probe(model, ONE_STEP, [], judge=judge)
    with pytest.raises(ValueError, match="model: Points"):
        probe(Points(FOUR), ONE_STEP, [0], judge=judge)
    with pytest.raises(RuntimeError, match="points"):
        probe(model, ONE_STEP, [0], judge=judge, weights={"raw": {}})
