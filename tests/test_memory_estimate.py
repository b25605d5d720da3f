"""Estimated memory against torch's allocator as its profiler saw it, parts against sums by hand; a run is untouched."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pecker_fast import (
    Baseline,
    BaselineConfig,
    DistillConfig,
    GuidanceConfig,
    MaskConfig,
    MaskedDistiller,
    NoiseSchedule,
    time_estimate,
)
from pecker_fast.data import ImageData
from pecker_fast.iteration_flops import without_data
from pecker_fast.memory_estimate import (
    STREAMED,
    WHOLE,
    describe,
    estimate_memory,
    use_stand_in_mask,
    with_few_micro_batches,
)
from pecker_fast.memory_meter import TensorMeter, bytes_by_claim
from pecker_fast.memory_parts import held_parts
from pecker_fast.score_model import TextConditional
from pecker_fast.time_estimate import estimate_seconds

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from allocator import allocated  # noqa: E402

ROWS = MaskConfig(kind="random", density=0.3, block="row")
SALIENCY = MaskConfig(density=0.3, block="row", batches=2, batch_size=16)

IMAGES = ImageData(torch.rand(8, 1, 16, 16), torch.arange(4).repeat(2), tuple("abcd"))
SMALL_PARTS = {"batch_size": 6, "forget_batch_size": 3, "micro_batch_size": 2}


class Network(nn.Module):
    """A convolution, attention with its scores written out, a norm, a convolution."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.classes, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.Embedding(5, 16), nn.GroupNorm(4, 16)
        self.qkv, self.conv_out = nn.Linear(16, 48), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x_t, t, condition):
        hidden = self.conv_in(x_t) + (self.classes(condition) * torch.cos(t)[:, None].to(x_t.dtype))[..., None, None]
        q, k, v = self.qkv(hidden.flatten(2).mT).chunk(3, -1)
        mixed = torch.softmax(q @ k.mT, -1) @ v
        return self.conv_out(torch.tanh(self.norm(hidden + mixed.mT.reshape(hidden.shape))))


def network():
    torch.manual_seed(0)
    return Network()


def usual(**settings):
    return {"forget": (2,), "num_classes": 4, "sample_shape": (1, 16, 16), "batch_size": 8, "mask": ROWS} | settings


def distiller(dtype=torch.float32, **settings):
    made = MaskedDistiller(network().to(dtype), NoiseSchedule.linear(), DistillConfig(**usual(**settings)))
    made.build_mask()
    return made


def esd():
    made = Baseline(network(), NoiseSchedule.linear(), BaselineConfig(method="esd", **usual(sampling_steps=3)))
    made.build_mask()
    return made


def text_to_image(checkpointing=True):
    """diffusers' network, bfloat16, guided, in micro-batches, with one storage for what no mask touches."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    kinds["mid_block_type"] = None
    sizes = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    unet = UNet2DConditionModel(**kinds, **sizes, cross_attention_dim=16, attention_head_dim=2).to(torch.bfloat16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    mask = dataclasses.replace(ROWS, region="decoder", density=0.1)
    settings = usual(sample_shape=(4, 16, 16), batch_size=2, mask=mask, fake_score_mask="same", ema_decay=None)
    settings |= {"guidance": GuidanceConfig(fake_score=3.0, true_score=3.0), "t_init": 625}
    config = DistillConfig(**settings, share_frozen_weights=True, micro_batch_size=3)
    made = MaskedDistiller(
        unet, NoiseSchedule.linear(), config, predict=TextConditional(torch.randn(5, 7, 16).bfloat16())
    )
    made.build_mask()
    return made


def measured(make, steps=2):
    """Peak of torch's allocator while a trainer is made and steps, from its own events; what is left; the trainer."""

    def run():
        made = make()
        for _ in range(steps):
            made.step()
        return made

    return allocated(run)


@pytest.mark.parametrize(
    "make",
    [
        distiller,
        lambda: distiller(mask=SALIENCY, **SMALL_PARTS, share_frozen_weights=True),
        esd,
        text_to_image,
    ],
    ids=["float32", "saliency, micro-batches", "esd", "checkpointed UNet2DConditionModel"],
)
def test_it_is_what_the_allocator_saw(make):
    peak, left, made = measured(make)
    estimate = estimate_memory(made)
    assert estimate.peak == pytest.approx(peak, rel=0.1)
    assert estimate.held == pytest.approx(left, rel=0.02)
    assert (estimate.choosing_mask > estimate.step) == (made.config.mask is SALIENCY)
    assert estimate.attention == (STREAMED if make is text_to_image else WHOLE)


@pytest.mark.parametrize("method", [None, "random_label"])
def test_a_mask_by_chance_stands_in_for_saliency(method):
    settings = usual(mask=SALIENCY, batch_size=3)
    if method is None:
        make = functools.partial(MaskedDistiller, config=DistillConfig(**settings, fake_score_mask="same"))
    else:
        make = functools.partial(Baseline, config=BaselineConfig(method=method, **settings), data=IMAGES)
    looked, guessed = (make(network(), NoiseSchedule.linear()) for _ in range(2))
    looked.build_mask()
    use_stand_in_mask(guessed)
    assert guessed.mask.mass is None and guessed.mask.density == pytest.approx(0.3, rel=0.02)
    for made in (looked, guessed):
        trained = made.mask.numel + (made.fake_score_mask.numel if method is None else 0)
        assert held_parts(made)["active_weights"] == held_parts(made)["gradients"] == 4 * trained
    with pytest.raises(RuntimeError, match="a mask already"):
        use_stand_in_mask(guessed)


# -- parts -----------------------------------------------------------------------------------------


def sizes(model):
    return sum(weight.nbytes for weight in model.state_dict().values())


def test_parts_are_what_the_masks_say_before_and_after_a_step():
    made = distiller(torch.bfloat16, ema_decay=0.5, betas=(0.9, 0.999))
    before = held_parts(made)
    trained = made.mask.numel + made.fake_score_mask.numel
    expected = {"active_weights": 4 * trained, "gradients": 4 * trained, "optimizer_state": 8 * trained}
    expected |= {"running_average": 4 * made.mask.numel, "weights_shared": 0, "prompt_embeddings": 0}
    expected |= dict.fromkeys(("weights_of_true_score", "weights_of_generator"), sizes(network().bfloat16()))
    assert {part: before[part] for part in expected} == expected
    made.step()
    after = held_parts(made)
    assert {part: after[part] for part in expected} == expected
    assert after["everything_else"] == pytest.approx(before["everything_else"], abs=20_000)  # tables of the schedule


def test_weights_that_no_mask_touches_are_shared():
    parts, made = held_parts(text_to_image()), text_to_image()
    touched = {name for name, parameter in made.mask.parameters.items() if parameter.numel}
    weights = dict(made.true_score.named_parameters())
    own = sum(weights[name].nbytes for name in touched)
    assert parts["weights_of_generator"] == parts["weights_of_fake_score"] == parts["weights_of_true_score"] == own
    assert parts["weights_shared"] == sum(weight.nbytes for weight in weights.values()) - own > 0
    assert parts["prompt_embeddings"] == 5 * 7 * 16 * 2


def test_memory_counts_once_for_all_who_claim_it():
    whole, other = torch.zeros(10), torch.zeros(6, dtype=torch.float64)
    inside = torch.utils.dlpack.from_dlpack(whole[2:5])  # the same memory under a storage of its own
    assert bytes_by_claim({"a": [whole, whole[3:]], "b": [inside], "c": [other, torch.zeros(0)]}) == {
        frozenset("a"): 4 * 7,
        frozenset("ab"): 4 * 3,
        frozenset("c"): 48,
    }


# -- the meter -------------------------------------------------------------------------------------


def test_tensors_without_data_are_followed_as_real_ones():
    def step(held):
        first = held + 1
        second = torch.cat([first, first])
        del first
        return second.mul_(2)[:1].clone()

    with FakeTensorMode():
        held = torch.zeros(1024)
        meter, rounded = TensorMeter([held, held[:5]]), TensorMeter([held[:5]], block=10000)
        for own in (meter, rounded):
            with own:
                step(held)
    assert (meter.held_bytes, meter.peak) == (4096, 4 * 4096)
    assert (rounded.held_bytes, rounded.peak) == (10000, 30000)
    assert {"aten::cat", "aten::mul_"} <= meter.operators


def test_a_few_micro_batches_stand_for_all():
    made = distiller(batch_size=7, forget_batch_size=4, micro_batch_size=2)
    copied = with_few_micro_batches(without_data(made))
    assert [len(part.t) for part in copied._updates._parts(copied.draws.batch())] == [2, 2, 2]
    assert made.config.batch_size == made.draws.config.batch_size == 7


# -- what people see -------------------------------------------------------------------------------


def test_the_run_is_untouched_and_the_table_adds_up(monkeypatch):
    made, other = (distiller(mask=SALIENCY, batch_size=3, micro_batch_size=2) for _ in range(2))
    monkeypatch.setattr(time_estimate, "_seconds", lambda run, _: run() is None or 2.0)
    state = torch.get_rng_state()
    memory, time, bound = (
        estimate_memory(made, "cuda"),
        estimate_seconds(made, 10),
        estimate_seconds(made, 10, "matmul"),
    )
    assert torch.equal(torch.get_rng_state(), state)
    counted = made.flops(10)
    assert time.flops_per_second * time.step_seconds == pytest.approx(counted["total"])
    assert time.seconds == pytest.approx(10 * counted["total_with_mask"] / time.flops_per_second, rel=1e-3)
    assert bound.flops_per_second == 2 * 1024**3 / 2.0
    assert memory.peak == max(memory.held + memory.activations, memory.choosing_mask) == memory.to_dict()["peak"]
    lines = describe(memory, time)
    assert "gradients" in lines and "workspaces" in lines and "(10 steps of " in lines
    assert "workspaces" not in describe(dataclasses.replace(memory, device="cpu"))
    for ours, theirs in zip(made.step().values(), other.step().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_asked_wrongly_is_refused():
    unmasked = MaskedDistiller(network(), NoiseSchedule.linear(), DistillConfig(**usual()))
    with pytest.raises(RuntimeError, match="no mask yet"):
        estimate_memory(unmasked)
    with pytest.raises(RuntimeError, match="no mask yet"):
        estimate_seconds(unmasked, 3)
    made = distiller()
    with pytest.raises(ValueError, match="device: expected"):
        estimate_memory(made, "tpu")
    with pytest.raises(ValueError, match="positive integer"):
        estimate_seconds(made, 0)
    with pytest.raises(ValueError, match="by: expected one of network, matmul"):
        estimate_seconds(made, 3, "guess")
