"""What a distiller refuses changes nothing, and what it chooses does not depend on how its networks come."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_distiller import SCHEDULE, config, unet
from test_distiller_switches import distilled

from pecker_fast import BlockMask, MaskConfig, MaskedDistiller
from pecker_fast.distill_masks import lr_scale


def another(network, seed=1):
    torch.manual_seed(seed)
    other = copy.deepcopy(network)
    for weight in other.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return other


def states_equal(first, second):
    other = second.state_dict()
    return all(torch.equal(weight, other[name]) for name, weight in first.state_dict().items())


# -- masks that do not fit -------------------------------------------------------------------------


def test_a_mask_that_does_not_fit_the_fake_score_leaves_the_distiller_as_it_was():
    teacher = unet(dropout=0.0)
    tried, fresh = distilled(teacher), distilled(teacher)
    mask = BlockMask.random(teacher, 0.3, "row")
    with pytest.raises(ValueError, match="the mask was not made for this"):
        tried.use_mask(mask, BlockMask.random(unet(width=16), 0.3, "row"))
    assert tried.mask is None
    for distiller in (tried, fresh):
        distiller.use_mask(mask)
        distiller.step()
    assert states_equal(tried.generator, fresh.generator) and states_equal(tried.fake_score, fresh.fake_score)


@pytest.mark.parametrize(
    "settings, given, message",
    [
        ({"mask": {"region": "middle", "density": 0.9}}, {}, "region 'middle' holds"),
        ({"fake_score_mask": MaskConfig(region="middle", density=0.9)}, {}, "region 'middle' holds"),
        ({"mask": {"kind": "saliency", "saliency": "distillation"}}, {"batches": [()]}, "leave the images out"),
        ({"mask": {"kind": "dense"}}, {"exclude": [None]}, "exclude: a dense run"),
    ],
)
def test_a_refused_mask_draws_nothing(settings, given, message):
    distiller = distilled(unet(dropout=0.0), **settings)
    before = distiller.draws.rng.get_state()
    weights = copy.deepcopy(distiller.fake_score.state_dict())
    with pytest.raises(ValueError, match=message):
        distiller.build_mask(**given)
    assert distiller.mask is None and torch.equal(distiller.draws.rng.get_state(), before)
    assert all(torch.equal(weights[name], weight) for name, weight in distiller.fake_score.state_dict().items())


def test_a_mask_without_gradients_has_no_learning_rate():
    teacher = unet()
    empty = dataclasses.replace(BlockMask.random(teacher, 0.3, "row"), mass=0.0)
    distiller = distilled(teacher, mask={"lr_scale": "mass"})
    with pytest.raises(ValueError, match="no gradient lies on the active weights"):
        distiller.use_mask(empty)
    assert distiller.mask is None
    halves = BlockMask.random(teacher, 0.3, "row") | BlockMask.random(teacher, 0.3, "row", seed=1)
    assert lr_scale(halves, distiller.config.mask) == pytest.approx(1 / halves.density)


# -- how networks come -----------------------------------------------------------------------------


def test_networks_of_another_distiller_are_taken_without_their_masks():
    older = distilled(unet(dropout=0.0))
    older.step()
    younger = MaskedDistiller(
        older.true_score, SCHEDULE, config(), generator=older.generator, fake_score=older.fake_score
    )
    assert states_equal(younger.fake_score, older.fake_score) and states_equal(younger.generator, older.generator)
    held = copy.deepcopy(older.fake_score.state_dict())
    younger.step()
    assert all(torch.equal(held[name], weight) for name, weight in older.fake_score.state_dict().items())
    older.step()


@pytest.mark.parametrize("saliency", ["noise_prediction", "distillation"])
def test_masks_do_not_depend_on_training_modes(saliency):
    own = MaskConfig(saliency=saliency, saliency_warmup=0, density=0.2, block="row", batches=1, accumulate="square")
    made = []
    for training, seed in ((True, 1), (False, 2)):
        teacher = unet(dropout=0.5)
        networks = {"generator": another(teacher).train(training), "fake_score": another(teacher, 2).train(training)}
        torch.manual_seed(seed)
        settings = config(mask=own, fake_score_mask=MaskConfig(density=0.2, block="row", batches=1))
        distiller = MaskedDistiller(teacher.train(training), SCHEDULE, settings, **networks)
        made.append((distiller.build_mask(), distiller.fake_score_mask))
    assert made[0] == made[1]


def test_a_checkpoint_belongs_to_the_fake_score_it_was_saved_with(tmp_path):
    teacher = unet(dropout=0.0)
    settings = config(fake_score_mask="same")

    def fresh(seed):
        return MaskedDistiller(copy.deepcopy(teacher), SCHEDULE, settings, fake_score=another(teacher, seed))

    saved = fresh(1)
    saved.step()
    saved.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="another fake score: its weights have fingerprint"):
        fresh(2).load_checkpoint("latest", tmp_path)
    resumed = fresh(1)
    resumed.load_checkpoint("latest", tmp_path)
    for distiller in (saved, resumed):
        distiller.step()
    assert states_equal(saved.generator, resumed.generator) and states_equal(saved.fake_score, resumed.fake_score)
