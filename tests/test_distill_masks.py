"""Which masks a distiller's config makes, for both networks, and the learning rates that go with them."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from test_distiller import SCHEDULE, config, unet
from test_distiller_switches import distilled

from pecker_fast import BlockMask, MaskConfig, MaskedDistiller, weight_gradient_flops
from pecker_fast.flops import count_flops
from pecker_fast.mask_controls import random_outside
from pecker_fast.objectives import sid_loss
from pecker_fast.terms import Terms

# -- where saliency looks, and the learning rate that goes with a mask -----------------------------


@pytest.mark.parametrize("saliency", ["distillation", "forget_specific"])
def test_saliency_of_the_generators_own_loss(saliency):
    """Against autograd by hand, with the same draws."""
    own = MaskConfig(
        saliency=saliency, saliency_warmup=0, density=0.2, block="row", batches=2, accumulate="square", scope="global"
    )
    teacher, other = unet(dropout=0.0).double(), unet(dropout=0.0).double()
    for weight in other.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    ours, by_hand = (
        MaskedDistiller(copy.deepcopy(teacher), SCHEDULE, config(mask=own), fake_score=other) for _ in range(2)
    )
    parts = {"distillation": [slice(None)], "forget_specific": [slice(6, None), slice(0, 6)]}[saliency]
    sums = []
    for part in parts:
        total = dict.fromkeys(dict(by_hand.generator.named_parameters()), 0.0)
        for _ in range(2):
            batch = by_hand.draws.batch()[part]
            x0 = by_hand.losses.generate(by_hand.generator.eval(), batch.noise, batch.labels)
            x_t = SCHEDULE.add_noise(x0, batch.epsilon, batch.t)
            true, fake = (
                network.eval()(x_t, batch.t, labels)
                for network, labels in ((by_hand.true_score, batch.targets), (by_hand.fake_score, batch.labels))
            )
            sigma = SCHEDULE.sigma(batch.t, x_t).flatten()
            loss = (batch.weights * sid_loss(batch.epsilon, true, fake, sigma, 1.2)).sum()
            weights = dict(by_hand.generator.named_parameters())
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] = total[name] + (0 if gradient is None else gradient.square())
        sums.append({name: torch.as_tensor(value).expand(weights[name].shape) for name, value in total.items()})
    expected = sums[0]
    if saliency == "forget_specific":
        floor = sum(float(v.sum()) for v in sums[1].values()) / sum(v.numel() for v in sums[1].values())
        expected = {name: sums[0][name] / (sums[1][name] + floor) for name in sums[0]}
    mask = ours.build_mask()
    assert mask == BlockMask.from_saliency({n: v.float() for n, v in expected.items()}, 0.2, "row")
    magnitude = {name: sum(part[name] for part in sums).sqrt() for name in sums[0]}
    active = sum(float(magnitude[name][mask.to_dense(name)].sum()) for name in magnitude)
    assert mask.mass == pytest.approx(active / sum(float(v.sum()) for v in magnitude.values()), rel=1e-5)


def test_the_fake_score_runs_ahead_on_a_copy():
    own = MaskConfig(saliency="distillation", saliency_warmup=3, density=0.2, block="row", batches=1)
    distiller = distilled(unet(dropout=0.0), mask=own, forget_weight=0.0)
    before = copy.deepcopy(distiller.fake_score.state_dict())
    mask = distiller.build_mask()  # without a warm-up the retained classes have no gradient, and nothing would rank
    assert 0 < mask.mass <= 1
    for name, weight in before.items():
        assert torch.equal(distiller.fake_score.state_dict()[name], weight), name
    with pytest.raises(ValueError, match="saliency: every value is 0"):
        distilled(unet(dropout=0.0), mask=dataclasses.replace(own, saliency_warmup=0), forget_weight=0.0).build_mask()


def test_images_are_for_the_published_saliency():
    distiller = distilled(unet(), mask=MaskConfig(saliency="distillation"))
    with pytest.raises(ValueError, match="leave the images out"):
        distiller.build_mask([(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())])
    assert distiller.mask is None


@pytest.mark.parametrize("rule, expected", [("none", 1.0), ("density", 5.0), ("mass", 5.0)])
def test_learning_rates_of_both_networks(rule, expected):
    own = MaskConfig(kind="random", density=0.2, block="element", lr_scale=rule)
    distiller = distilled(unet(), mask=own, fake_score_mask="same", warmup_steps=4)
    distiller.step()
    distiller.step()
    settings = distiller.config
    for optimizer, lr in (
        (distiller.generator_optimizer, settings.generator_lr),
        (distiller.fake_score_optimizer, settings.fake_score_lr),
    ):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * expected / 2, rel=1e-3)
    capped = distilled(unet(), mask=dataclasses.replace(own, lr_scale_max=2.0))
    capped.build_mask()
    assert capped.lr_scale == min(expected, 2.0) and capped.fake_score_lr_scale == 1.0


# -- where a mask sits, and what it may cost -------------------------------------------------------

DECODER = ("up.", "norm_out.", "conv_out.")


@pytest.mark.parametrize("kind", ["random", "saliency", "dense", "complement"])
def test_a_region_bounds_the_masks_of_both_networks(kind):
    own = MaskConfig(kind=kind, density=0.1, block="row", region="decoder", batches=1, scope="global")
    distiller = distilled(unet(), mask=own, fake_score_mask="same")
    distiller.build_mask()
    for mask in (distiller.mask, distiller.fake_score_mask):
        inside = {name for name, parameter in mask.parameters.items() if parameter.numel}
        assert inside and all(name.startswith(DECODER) for name in inside)
        if kind == "dense":
            assert inside == {name for name in mask.parameters if name.startswith(DECODER)}
            assert all(mask.parameters[name].is_full for name in inside)
        else:
            assert 0.08 < mask.density <= 0.1
    before = copy.deepcopy(distiller.generator.state_dict())
    distiller.step()
    moved = {n for n, weight in distiller.generator.state_dict().items() if not torch.equal(weight, before[n])}
    assert moved and all(name.startswith(DECODER) for name in moved)


def gradient_flops(network, mask):
    labels = torch.zeros(1).long()
    costs = weight_gradient_flops(network, lambda model: model(torch.zeros(1, 1, 8, 8), labels, labels))
    return {name: costs[name] * parameter.numel for name, parameter in mask.parameters.items()}


@pytest.mark.parametrize("kind", ["random", "saliency"])
def test_a_budget_in_flops(kind):
    teacher = unet()
    own = MaskConfig(kind=kind, density=0.2, block="row", budget="flops", batches=1, scope="global")
    mask = distilled(teacher, mask=own).build_mask()
    share = sum(gradient_flops(teacher, mask).values()) / sum(
        gradient_flops(teacher, BlockMask.dense(teacher)).values()
    )
    assert 0.18 < share <= 0.2
    assert mask.density != pytest.approx(share, rel=0.02)  # weights of large maps are dearer


def test_saliency_per_flop_takes_cheaper_weights():
    teacher = unet()
    both = [
        MaskConfig(density=0.2, block="row", rank=rank, batches=2, accumulate="square", scope="global")
        for rank in ("weight", "flop")
    ]
    masks = [distilled(teacher, mask=own).build_mask() for own in both]
    flops = [sum(gradient_flops(teacher, mask).values()) for mask in masks]
    assert flops[1] < flops[0] and abs(masks[1].density - masks[0].density) < 0.02
    assert masks[1].mass < masks[0].mass  # what it gives for that


def test_frozen_norms_save_the_gradient_of_frozen_skips():
    own = MaskConfig(density=0.1, block="row", region="decoder", batches=1, accumulate="square")
    flops = {}
    for norms in (True, False):
        chosen = dataclasses.replace(own, norms=norms)
        distiller = distilled(unet(), mask=chosen, fake_score_mask="same")
        mask = distiller.build_mask()
        active = {name for name, parameter in mask.parameters.items() if parameter.numel and "norm" in name}
        assert bool(active) == norms
        flops[norms] = distiller.flops()["fake_score"]["input_gradient"]
    assert flops[False] < flops[True]


# -- controls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"budget": "flops"}, {"rank": "flop", "block": (4, 4)}])
def test_controls_of_a_saliency_mask(changes):
    settings = {"density": 0.3, "block": "row", "batches": 1, **changes}
    kinds = ("saliency", "complement", "layer_random", "random")
    masks = {kind: distilled(unet(), mask={"kind": kind, **settings}).build_mask() for kind in kinds}
    salient, outside, alike = (masks[kind] for kind in kinds[:3])
    assert (outside & salient).numel == 0
    if "budget" not in changes:
        assert outside.density == pytest.approx(masks["random"].density, rel=0.02)  # the budget, not what saliency left
    assert alike != salient and 0 < (alike & salient).numel < salient.numel
    for name, parameter in salient.parameters.items():
        assert len(alike.parameters[name].active) == len(parameter.active)
    assert outside.mass < alike.mass < salient.mass  # the learning rate goes by it


def test_the_complement_is_all_that_is_left_where_that_is_less():
    settings = {"density": 0.7, "block": "row", "batches": 1}
    salient, outside = (
        distilled(unet(), mask={"kind": kind, **settings}).build_mask() for kind in ("saliency", "complement")
    )
    assert outside == ~salient


def test_random_outside_wants_the_mask_barred():
    mask = distilled(unet(), mask={"kind": "random", "density": 0.3}).build_mask()
    grids = {name: parameter.grid for name, parameter in mask.parameters.items()}
    with pytest.raises(ValueError, match="expected terms that bar"):
        random_outside(mask.parameters, Terms.of(grids, mask.total), 0.3, 0)


def test_what_is_excluded_stays_out():
    earlier = distilled(unet(), mask={"kind": "random", "density": 0.3}).build_mask()
    for kind in ("random", "saliency", "complement", "layer_random"):
        later = distilled(unet(), mask={"kind": kind, "density": 0.3}).build_mask(exclude=[earlier])
        assert (later & earlier).numel == 0 < later.numel
    with pytest.raises(ValueError, match="exclude: a dense run trains every weight"):
        distilled(unet(), mask={"kind": "dense"}).build_mask(exclude=[earlier])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"region": "attic"}, "region"),
        ({"budget": "seconds"}, "MaskConfig.budget: expected one of parameters, flops, got 'seconds'"),
        ({"rank": "size"}, "MaskConfig.rank: expected one of weight, flop"),
        ({"saliency": "loss"}, "MaskConfig.saliency: expected one of noise_prediction, distillation"),
        ({"saliency_warmup": -1}, "saliency_warmup: expected an integer >= 0, got -1"),
        ({"norms": 1}, "MaskConfig.norms: expected True or False"),
        ({"norms": False, "kind": "dense"}, "MaskConfig.norms: .* and True with kind 'dense'"),
        ({"lr_scale_max": 0.0}, "lr_scale_max: expected a positive number or None, got 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**settings)


def test_settings_survive_json():
    own = MaskConfig(region=["up.0.", "conv_out."], block=[16, 16], budget="flops", rank="flop", lr_scale_max=4.0)
    assert own.region == ("up.0.", "conv_out.")
    assert MaskConfig.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    made = config(fake_score_mask="same")
    assert type(made).from_dict(json.loads(json.dumps(made.to_dict()))) == made
    with pytest.raises(ValueError, match='fake_score_mask: expected a MaskConfig, "same" or None'):
        config(fake_score_mask="other")


@pytest.mark.parametrize("saliency", ["noise_prediction", "distillation", "forget_specific"])
def test_what_a_mask_computes_is_what_is_counted(saliency):
    own = MaskConfig(saliency=saliency, saliency_warmup=3, batches=2, density=0.2, block="row")
    distiller = distilled(unet(dropout=0.0, attention_resolutions=()), mask=own, fake_score_mask="same")
    with count_flops() as counted:
        distiller.build_mask()
    assert counted.total > 0
    assert distiller.flops()["mask"]["total"] == counted.total
