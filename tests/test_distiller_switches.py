"""What can be switched in an iteration: each against the same thing written out in plain torch, in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_distiller import SCHEDULE, config, unet

from pecker_fast import BlockMask, MaskConfig, MaskedDistiller
from pecker_fast.flops import count_flops
from pecker_fast.objectives import score_difference_loss, sid_loss


def distilled(teacher=None, **settings):
    teacher = unet(dropout=0.0).double() if teacher is None else teacher
    return MaskedDistiller(copy.deepcopy(teacher), SCHEDULE, config(**settings))


# -- the losses ------------------------------------------------------------------------------------


def random_scores():
    x0, epsilon, true, fake = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(4))
    return x0.requires_grad_(), epsilon, true.requires_grad_(), fake.requires_grad_(), torch.rand(3).double() * 5


def test_the_score_difference_is_the_gradient():
    x0, epsilon, true, fake, sigma = random_scores()
    loss = score_difference_loss(x0, epsilon, true, fake, sigma)
    gradient, *others = torch.autograd.grad(loss.sum(), (x0, true, fake), allow_unused=True)
    spread = sigma.view(-1, 1, 1, 1)
    x_true, x_fake = (x0 + spread * (epsilon - prediction) for prediction in (true, fake))  # estimates of x0
    omega = (x_true - x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    torch.testing.assert_close(gradient, -(x_true - x_fake) / omega)
    assert others == [None, None]
    torch.testing.assert_close(loss, sid_loss(epsilon, true, fake, sigma, 1.0))


# -- the generator's forward, used twice -----------------------------------------------------------


def test_reused_samples_give_the_gradients_of_those_samples():
    """One iteration, with the draws made once more by hand."""
    teacher = unet(dropout=0.0).double()
    settings = {"mask": {"kind": "dense"}, "reuse_generator_forward": True, "clip_value": None}
    ours, by_hand = distilled(teacher, **settings), distilled(teacher, **settings)
    ours.build_mask(), by_hand.build_mask()
    seen = {}
    ours.generator_optimizer.step = lambda: seen.update(generator=(ours.active.bind_(), ours.active.grads.clone())[1])
    ours.step()

    first = by_hand.draws.batch()
    x0 = by_hand.losses.generate(by_hand.generator, first.noise, first.labels)
    x_t = SCHEDULE.add_noise(x0.detach(), first.epsilon, first.t)
    losses = (first.epsilon - by_hand.fake_score(x_t, first.t, first.labels)).square().flatten(1).sum(1)
    (first.weights * losses).sum().backward()
    by_hand.fake_score_optimizer.param_groups[0]["lr"] = by_hand.config.fake_score_lr
    by_hand.fake_score_optimizer.step()
    by_hand.active.zero_grad()
    (second,) = by_hand.draws.again([first])
    assert second.labels is first.labels and not torch.equal(second.t, first.t)
    x_t = SCHEDULE.add_noise(x0, second.epsilon, second.t)
    true = by_hand.true_score(x_t, second.t, second.targets)
    fake = by_hand.fake_score(x_t, second.t, second.labels)
    sigma = SCHEDULE.sigma(second.t, x_t).flatten()
    (second.weights * sid_loss(second.epsilon, true, fake, sigma, 1.2)).sum().backward()
    by_hand.active.bind_()
    torch.testing.assert_close(seen["generator"], by_hand.active.grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.fake_score.state_dict(), by_hand.fake_score.state_dict(), rtol=1e-9, atol=1e-12)


# -- what they save --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches, forwards",
    [({}, 22), ({"reuse_generator_forward": True}, 20), ({"stop_gradient": True}, 18)],
    ids=["published", "reused", "stop_gradient"],
)
def test_forwards_of_an_iteration(switches, forwards):
    teacher = unet(width=32, norm_groups=8, image_size=16, attention_resolutions=())
    distiller = distilled(teacher, mask={"kind": "dense"}, sample_shape=(1, 16, 16), **switches)
    distiller.step()
    with count_flops() as forward, torch.no_grad():
        teacher(torch.randn(6, 1, 16, 16), torch.full((6,), 5), torch.zeros(6).long())
    with count_flops() as iteration:
        distiller.step()
    assert iteration.total / forward.total == pytest.approx(forwards, rel=0.01)


# -- a mask for the fake score ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "saliency"])
def test_only_active_weights_of_the_fake_score_move(kind):
    own = MaskConfig(kind=kind, density=0.2, block="row", batches=2)
    distiller = distilled(unet(), fake_score_mask=own, weight_decay=0.1)
    before = copy.deepcopy(distiller.fake_score.state_dict())
    distiller.build_mask()
    mask = distiller.fake_score_mask
    assert abs(mask.density - 0.2) < 0.02 and mask != distiller.mask
    for _ in range(3):
        distiller.step()
    after = distiller.fake_score.state_dict()
    for name, weight in before.items():
        outside = ~mask.to_dense(name)
        assert torch.equal(after[name][outside], weight[outside])
    assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "switches",
    [
        {"reuse_generator_forward": True},
        {"stop_gradient": True},
        {"fake_score_mask": MaskConfig(density=0.2, batches=1)},
    ],
    ids=["reused", "stop_gradient", "fake_score_mask"],
)
def test_a_saved_state_continues_to_the_bit(switches):
    teacher = unet(dropout=0.0)
    whole = distilled(teacher, **switches)
    for _ in range(2):
        whole.step()
    state = copy.deepcopy(whole.state_dict())
    resumed = distilled(teacher, **switches)
    resumed.load_state_dict(state)
    for distiller in (whole, resumed):
        distiller.step()
    for ours, theirs in ((whole.generator, resumed.generator), (whole.fake_score, resumed.fake_score)):
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name


def test_settings_are_checked_and_survive_json():
    made = config(fake_score_mask={"kind": "random", "density": 0.5}, stop_gradient=True)
    assert made.fake_score_mask == MaskConfig(kind="random", density=0.5)
    assert type(made).from_dict(made.to_dict()) == made
    for name in ("reuse_generator_forward", "stop_gradient"):
        with pytest.raises(ValueError, match=f"DistillConfig.{name}: expected True or False"):
            config(**{name: "yes"})


# -- the presets -----------------------------------------------------------------------------------


def test_presets_and_switches_by_name():
    assert config() == config(preset="exact")
    published, exact, fast = (config(preset=preset, batch_size=8) for preset in ("published", "exact", "fast"))
    assert not (published.merge_batches or published.closed_form_loss or published.skip_frozen)
    assert exact.merge_batches and exact.closed_form_loss and exact.skip_frozen and not exact.reuse_generator_forward
    assert not fast.reuse_generator_forward and (fast.forget_samples, exact.forget_samples) == (1, 8)
    both = config(preset="fast", reuse_generator_forward=True, forget_batch_size=5)
    assert both.reuse_generator_forward and both.forget_samples == 5
    assert type(fast).from_dict(fast.to_dict()) == fast
    with pytest.raises(ValueError, match="DistillConfig.preset: expected one of published, exact, fast, got 'quick'"):
        config(preset="quick")


@pytest.mark.parametrize(
    "switch, reuse", list(itertools.product(("merge_batches", "closed_form_loss", "skip_frozen"), (False, True)))
)
def test_exact_switches_leave_the_weights_where_they_are(switch, reuse):
    teacher = unet(dropout=0.0).double()
    settings = {"mask": MaskConfig(kind="random", density=0.3, block="row"), "reuse_generator_forward": reuse}
    settings |= {"fake_score_mask": "same", "preset": "exact"}
    both = [distilled(teacher, **settings, **{switch: value}) for value in (True, False)]
    for distiller in both:
        for _ in range(3):
            distiller.step()
    on, off = both
    for mine, other in ((off.generator, on.generator), (off.fake_score, on.fake_score)):
        for name, weight in mine.state_dict().items():
            torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_a_frozen_prefix_and_frozen_skips_are_left_out_unless_told():
    """FLOPs of the generator's and the fake score's input gradients, active weights in the last convolution alone."""
    teacher = unet(dropout=0.0)
    last = {"conv_out.weight": torch.ones_like(teacher.conv_out.weight)}
    last |= {name: torch.zeros_like(p) for name, p in teacher.named_parameters() if name not in last}
    mask = BlockMask.from_saliency(last, teacher.conv_out.weight.numel() / sum(v.numel() for v in last.values()), "row")
    counted = {}
    for skip in (True, False):
        distiller = distilled(teacher, skip_frozen=skip)
        distiller.use_mask(mask, mask)
        counted[skip] = distiller.flops()
    assert counted[True]["generator"]["input_gradient"] == 0
    assert counted[False]["generator"]["input_gradient"] > counted[False]["generator"]["forward"] / 3
    assert counted[True]["fake_score"]["input_gradient"] < counted[False]["fake_score"]["input_gradient"]
    assert counted[True]["true_score"] == counted[False]["true_score"]


# -- precision -------------------------------------------------------------------------------------


def test_half_precision_networks_have_losses_and_masters_in_float32():
    teacher = unet(dropout=0.0)
    full, half = distilled(teacher), distilled(copy.deepcopy(teacher).bfloat16())
    losses = [distiller.step() for distiller in (full, half)]
    for name, value in losses[1].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, losses[0][name], rtol=0.05, atol=0.05)
    assert half.active.values.dtype == torch.float32
    assert {p.dtype for name, p in half.generator.named_parameters() if "_active" not in name} == {torch.bfloat16}
