"""Settings that make no sense: refused where they are made, by name, with what was expected."""

import dataclasses
import re

import pytest
import torch
from test_distiller import SCHEDULE, unet

from pecker_fast import DistillConfig, MaskConfig, MaskedDistiller

NAN, INF = float("nan"), float("inf")
NO_INTEGERS = (2.5, 2.0, "2", True, NAN, (2,))
NO_NUMBERS = ("1", True, NAN, INF, -INF, None, (1.0,), 1j)
AT_LEAST_0 = ("warmup_steps", "t_init", "t_min", "t_max")
POSITIVE = ("generator_lr", "fake_score_lr")
WEIGHTS = ("eps", "weight_decay", "retain_weight", "forget_weight")
SEED = "an integer from 0 to 2**63 - 1"


def config(**settings):
    return DistillConfig(**{"forget": (2,), "num_classes": 4, "sample_shape": (1, 8, 8), **settings})


def cases(names, values, expected):
    return [(name, value, expected) for name in names for value in values]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *cases(("num_classes", "batch_size"), (*NO_INTEGERS, None, 0, -1), "a positive integer"),
        *cases(("forget_batch_size",), (*NO_INTEGERS, 0, -1), "a positive integer or None"),
        *cases(AT_LEAST_0, (*NO_INTEGERS, None, -1, 440.5), "an integer >= 0"),
        *cases(("seed",), (*NO_INTEGERS, None, -1, 2**63), SEED),
        *cases(POSITIVE, (*NO_NUMBERS, 0, -1e-5), "a positive number"),
        *cases(("clip_value",), ("1", True, NAN, INF, 0, -1), "a positive number or None"),
        *cases(WEIGHTS, (*NO_NUMBERS, -1e-9), "a number >= 0"),
        *cases(("ema_decay",), ("1", True, NAN, INF, 1, -0.1), "a number in [0, 1) or None"),
        *cases(("sid_alpha",), NO_NUMBERS, "a finite number"),
        *cases(("betas",), ((0.9,), (0.9, 1.0), (0.9, "0"), (False, 0.9), (NAN, 0.9)), "two numbers in [0, 1)"),
        *cases(("sample_shape",), ((8, 8), (1, 8, 8.0), (True, 8, 8), (0, 8, 8)), "(channels, height, width)"),
        *cases(("forget", "override", "betas", "sample_shape"), (3, 0.5), "a list or tuple"),
        *cases(("forget", "betas", "sample_shape"), (None,), "a list or tuple"),
        *cases(("mask",), (0.1, None, "dense"), "a MaskConfig"),
    ],
)
def test_distillation(name, value, expected):
    message = f"DistillConfig.{name}: expected {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["forget", "override"])
@pytest.mark.parametrize("label", [True, 1.0, "1", None])
def test_classes_are_integers(name, label):
    with pytest.raises(ValueError, match=rf"DistillConfig.{name}: unknown class {label!r}; the model has classes 0 to"):
        config(**{name: (label,)})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *cases(("batches",), (*NO_INTEGERS, None, 0, -1), "a positive integer"),
        *cases(("batch_size",), (*NO_INTEGERS, 0, -1), "a positive integer or None"),
        *cases(("saliency_warmup",), (*NO_INTEGERS, None, -1), "an integer >= 0"),
        *cases(("lr_scale_max",), ("1", True, NAN, INF, 0, -1), "a positive number or None"),
        *cases(("density",), (*NO_NUMBERS, 0, 1.01), "the share of weights that train, in (0, 1]"),
    ],
)
def test_masks(name, value, expected):
    message = f"MaskConfig.{name}: expected {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MaskConfig(**{name: value})


def test_the_edges_of_every_range_are_within():
    low = config(**dict.fromkeys((*WEIGHTS, "ema_decay", "t_init", "t_min", "seed", "warmup_steps"), 0), sid_alpha=-1)
    high = config(seed=2**63 - 1, ema_decay=0.9999, sid_alpha=10**6, clip_value=None, betas=(0, 0.5), t_max=39)
    assert low.seed == 0 and high.t_max == high.t_min + 1
    assert MaskConfig(density=1, batches=1, batch_size=1, saliency_warmup=0, lr_scale_max=1e-9).density == 1


# -- what has a say --------------------------------------------------------------------------------

OF_SALIENCY = {"accumulate": "abs", "batches": 1, "batch_size": 3, "saliency_warmup": 1}
OF_RANKING = {"scope": "layer", "rank": "flop"}
OF_BLOCKS = {"density": 0.2, "block": (4, 4), "budget": "flops"}
USUAL = MaskConfig(density=0.3, block="row", batches=2, scope="global")


def chosen(**settings):
    torch.manual_seed(0)
    mask = dataclasses.replace(USUAL, **settings)
    return MaskedDistiller(unet(dropout=0.0), SCHEDULE, config(mask=mask, batch_size=4)).build_mask()


@pytest.mark.parametrize(
    ("kind", "ignored"),
    [
        ("random", OF_RANKING | OF_SALIENCY),
        ("random", {"saliency": "forget_specific"}),
        ("dense", OF_BLOCKS | OF_RANKING | OF_SALIENCY),
    ],
)
def test_a_config_serves_every_kind(kind, ignored):
    """What is ignored is what the docstring of ``kind`` says, and has a say with saliency."""
    assert chosen(kind=kind, **ignored) == chosen(kind=kind)
    if "saliency" not in ignored:
        assert all(chosen(**{name: value}) != chosen() for name, value in ignored.items() if name != "saliency_warmup")


@pytest.mark.parametrize("name", [*OF_BLOCKS, "norms", "region"])
def test_what_has_a_say_in_a_random_mask(name):
    value = (OF_BLOCKS | {"norms": False, "region": "decoder"})[name]
    assert chosen(kind="random", **{name: value}) != chosen(kind="random")


def test_saliency_of_the_fake_score_is_of_its_own_loss():
    def fake_score(**settings):
        own = dataclasses.replace(USUAL, **settings)
        made = MaskedDistiller(unet(dropout=0.0), SCHEDULE, config(mask=USUAL, fake_score_mask=own, batch_size=4))
        made.build_mask()
        return made.fake_score_mask

    for ignored in ({"saliency": "forget_specific"}, {"saliency_warmup": 1}, {"batch_size": 3}):
        assert fake_score(**ignored) == fake_score()
    assert fake_score(batches=1) != fake_score()


@pytest.mark.parametrize("saliency", ["distillation", "forget_specific"])
def test_a_batch_size_that_has_no_say_is_refused(saliency):
    with pytest.raises(ValueError, match=rf"MaskConfig.batch_size: expected None with saliency '{saliency}'.* got 8"):
        MaskConfig(saliency=saliency, batch_size=8)
    assert MaskConfig(batch_size=8).batch_size == 8
