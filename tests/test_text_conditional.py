"""A prompt is a class: guidance, dropped and negative prompts, micro-batches, shared weights, against plain torch."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pecker_fast import (
    BaselineConfig,
    BlockMask,
    DistillConfig,
    GuidanceConfig,
    MaskConfig,
    MaskedDistiller,
    NoiseSchedule,
)
from pecker_fast.baselines import Baseline
from pecker_fast.score_model import TextConditional, predictor

SCHEDULE = NoiseSchedule.scaled_linear()
FORGET, OVERRIDE, NEGATIVE, NULL = 3, 4, 5, 6  # labels 0, 1 and 2 are retained
GUIDANCE = GuidanceConfig(fake_score_update=2.0, fake_score=3.0, true_score=4.5)


class Network(nn.Module):
    """Called as diffusers' ``UNet2DConditionModel`` is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.text, self.conv_out = nn.Linear(6, 8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x_t, t, encoder_hidden_states):
        hidden = self.norm(self.conv_in(x_t)) + (t.to(x_t.dtype) / 1000)[:, None, None, None]
        hidden = hidden * torch.tanh(self.text(encoder_hidden_states)).mean(1)[:, :, None, None]
        return SimpleNamespace(sample=self.conv_out(torch.tanh(hidden)))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def prompts(dtype=torch.float64):
    return torch.randn(NULL + 1, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def config(**settings):
    usual = {"forget": (FORGET,), "override": (OVERRIDE,), "negative": (NEGATIVE,), "retain": (0, 1, 2)}
    usual |= {"num_classes": NULL, "sample_shape": (4, 6, 6), "batch_size": 3, "forget_batch_size": 2, "eps": 1e-6}
    usual |= {"t_init": 625, "t_min": 20, "t_max": 980, "sid_alpha": 1.0, "clip_value": None, "ema_decay": None}
    usual |= {"generator_lr": 1e-3, "fake_score_lr": 2e-3, "forget_weight": 0.5, "guidance": GUIDANCE}
    return DistillConfig(**usual | {"mask": MaskConfig(kind="dense", lr_scale="none")} | settings)


def distiller(teacher=None, prediction_type="epsilon", **settings):
    teacher = network() if teacher is None else teacher
    predict = TextConditional(prompts(next(teacher.parameters()).dtype), prediction_type, SCHEDULE)
    return MaskedDistiller(teacher, SCHEDULE, config(**settings), predict=predict)


def published_iteration(teacher, c, prediction_type="epsilon"):
    """Score Forgetting Distillation for Stable Diffusion written out in plain torch, with the same draws."""
    rng, texts = torch.Generator().manual_seed(c.seed), prompts()
    generator, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    table = SCHEDULE.alphas_cumprod
    a_init, b_init = table[c.t_init].sqrt(), (1 - table[c.t_init]).sqrt()

    def noise_of(net, x_t, t, labels):
        output = net(x_t, t, texts[labels]).sample
        a, b = table[t].sqrt().view(-1, 1, 1, 1), (1 - table[t]).sqrt().view(-1, 1, 1, 1)
        return output if prediction_type == "epsilon" else a * output + b * x_t

    def guided(net, x_t, t, labels, nulls, scale):
        null = noise_of(net, x_t, t, nulls)
        return null + scale * (noise_of(net, x_t, t, labels) - null)

    def branches(dropout):
        drawn, kept = [], torch.tensor([0, 1, 2])
        for count, labels, weight in ((3, None, 1.0), (2, FORGET, c.forget_weight)):
            index = torch.randint(3 if labels is None else 1, (count,), generator=rng)
            labels = kept[index] if labels is None else torch.full((count,), labels)
            z = torch.randn((count, 4, 6, 6), generator=rng).double()
            t = torch.randint(c.t_min, c.t_max, (count,), generator=rng)
            epsilon = torch.randn((count, 4, 6, 6), generator=rng).double()
            negative = torch.full((count,), NULL if weight == 1.0 else NEGATIVE)
            drawn.append([labels, negative, z, t, epsilon, weight])
        if dropout:
            gone = (torch.rand(5, generator=rng) < dropout).split([3, 2])
            for branch, dropped in zip(drawn, gone, strict=True):
                branch[0], branch[1] = (labels.masked_fill(dropped, NULL) for labels in branch[:2])
        return drawn

    def generate(z, labels):
        t = torch.full((len(z),), c.t_init)
        return (b_init * z - b_init * noise_of(generator, b_init * z, t, labels)) / a_init

    fake_loss = generator_loss = 0.0
    for labels, _, z, t, epsilon, weight in branches(c.guidance.dropout):
        x0 = generate(z, labels).detach()
        a, b = table[t].sqrt().view(-1, 1, 1, 1), (1 - table[t]).sqrt().view(-1, 1, 1, 1)
        nulls = torch.full_like(labels, NULL)
        prediction = guided(fake, a * x0 + b * epsilon, t, labels, nulls, c.guidance.fake_score_update)
        fake_loss += weight * ((prediction - epsilon) ** 2).sum() / len(z)
    fake_loss.backward()
    torch.optim.Adam(fake.parameters(), c.fake_score_lr, c.betas, c.eps).step()
    for labels, negative, z, t, epsilon, weight in branches(0.0):
        x0 = generate(z, labels)
        a, b = table[t].sqrt().view(-1, 1, 1, 1), (1 - table[t]).sqrt().view(-1, 1, 1, 1)
        x_t = a * x0 + b * epsilon
        targets = labels.masked_fill(labels == FORGET, OVERRIDE)
        epsilon_true = guided(teacher, x_t, t, targets, negative, c.guidance.true_score)
        epsilon_fake = guided(fake, x_t, t, labels, torch.full_like(labels, NULL), c.guidance.fake_score)
        true, false = (x_t - b * epsilon_true) / a, (x_t - b * epsilon_fake) / a
        omega = (true - x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5).detach()
        loss = (true - false) * ((true - x0) - c.sid_alpha * (true - false)) / omega
        generator_loss += weight * loss.sum() / len(z)
    generator_loss.backward()
    torch.optim.Adam(generator.parameters(), c.generator_lr, c.betas, c.eps).step()
    return generator, fake, fake_loss.detach(), generator_loss.detach()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("preset", ["published", "exact"])
def test_the_iteration_is_the_published_one(preset, prediction_type):
    teacher = network()
    guidance = dataclasses.replace(GUIDANCE, dropout=0.4)
    ours = distiller(copy.deepcopy(teacher), prediction_type, preset=preset, guidance=guidance)
    generator, fake, fake_loss, generator_loss = published_iteration(teacher, ours.config, prediction_type)
    losses = ours.step()
    torch.testing.assert_close(losses["fake_score_loss"], fake_loss)
    torch.testing.assert_close(losses["generator_loss"], generator_loss)
    for own, theirs in ((ours.generator, generator), (ours.fake_score, fake)):
        assert own.state_dict().keys() == theirs.state_dict().keys()
        for name, weight in theirs.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], weight, rtol=1e-7, atol=1e-9)


def test_negative_prompts_are_seen_where_they_are_asked_for():
    def losses(**guidance):
        return torch.stack(list(distiller(guidance=dataclasses.replace(GUIDANCE, **guidance)).step().values()))

    nowhere, true_score = losses(negative_in=()), losses()
    everywhere = losses(negative_in=("fake_score_update", "fake_score", "true_score"))
    assert nowhere[0] == true_score[0] != everywhere[0]
    assert len({nowhere[1].item(), true_score[1].item(), everywhere[1].item()}) == 3
    assert torch.equal(nowhere, torch.stack(list(distiller(negative=None).step().values())))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("merge", [True, False])
def test_micro_batches_add_up_to_the_batch(size, merge):
    whole, parts = distiller(merge_batches=merge), distiller(merge_batches=merge, micro_batch_size=size)
    seen = []
    parts.fake_score.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for one, other in zip(whole.step().values(), parts.step().values(), strict=True):
        torch.testing.assert_close(one, other)
    assert max(seen) == 2 * (size if merge else min(size, 3))  # guidance asks twice
    for one, other in zip(whole.generator.parameters(), parts.generator.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fake_score_mask", ["same", None])
def test_weights_that_no_mask_touches_have_one_storage(dtype, fake_score_mask):
    mask = MaskConfig(kind="random", density=0.2, block="row", region=("text.", "conv_out."), lr_scale="none")
    settings = {"mask": mask, "fake_score_mask": fake_score_mask}
    alone = distiller(network(dtype), **settings)
    shared = distiller(network(dtype), **settings, share_frozen_weights=True)
    places = lambda net: {name: p.data_ptr() for name, p in net.named_parameters() if not name.endswith("_active")}  # noqa: E731
    assert places(shared.generator) == places(shared.true_score) == places(shared.fake_score)
    before = copy.deepcopy(shared.true_score.state_dict())
    for _ in range(2):
        alone.step(), shared.step()
    true, generator, fake = (places(net) for net in (shared.true_score, shared.generator, shared.fake_score))
    touched = {name for name, p in shared.mask.parameters.items() if p.numel}
    assert touched and {name for name in true if true[name] != generator[name]} == touched
    assert {name for name in true if true[name] != fake[name]} == (set(true) if fake_score_mask is None else touched)
    for name, weight in before.items():
        assert torch.equal(shared.true_score.state_dict()[name], weight)
        for one, other in ((shared.generator, alone.generator), (shared.fake_score, alone.fake_score)):
            assert torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not any(torch.equal(shared.generator.state_dict()[name], before[name]) for name in touched)


def test_a_baseline_asks_by_prompt_and_shares_too():
    settings = {"forget": (FORGET,), "retain": (0, 1, 2), "num_classes": NULL, "sample_shape": (4, 6, 6)}
    mask = MaskConfig(kind="random", density=0.05, block="row", region=("text.",), lr_scale="none")
    rest = {
        "method": "esd",
        "batch_size": 2,
        "null_class": True,
        "sampling_steps": 3,
        "clip_samples": None,
        "mask": mask,
    }
    predict = TextConditional(prompts(torch.float32))
    results = []
    for share in (False, True):
        made = BaselineConfig(**settings, **rest, share_frozen_weights=share)
        baseline = Baseline(network(torch.float32), SCHEDULE, made, predict=predict)
        for _ in range(2):
            baseline.step()
        results.append(baseline)
    alone, shared = results
    for name, weight in alone.network.state_dict().items():
        assert torch.equal(weight, shared.network.state_dict()[name])
    assert shared.network.conv_in.weight.data_ptr() == shared.true_score.conv_in.weight.data_ptr()
    assert shared.network.text.weight.data_ptr() != shared.true_score.text.weight.data_ptr()
    assert alone.sample([0, FORGET], seed=0).abs().max() > 1  # latents are not clipped


def test_the_noise_of_a_velocity():
    x0, epsilon, t = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 4, 6, 6).double(), torch.tensor([0, 500, 999])
    a, b = SCHEDULE.alpha(t, x0), SCHEDULE.std(t, x0)
    stub = network()
    stub.forward = lambda x_t, t, encoder_hidden_states: SimpleNamespace(sample=a * epsilon - b * x0)
    found = TextConditional(prompts(), "v_prediction", SCHEDULE)(stub, a * x0 + b * epsilon, t, torch.zeros(3).long())
    torch.testing.assert_close(found, epsilon)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="expected embeddings .rows, tokens, width. of a float dtype, got torch.int64"):
        TextConditional(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="prediction_type: expected one of epsilon, v_prediction, got 'sample'"):
        TextConditional(prompts(), "sample")
    with pytest.raises(ValueError, match="give schedule= too"):
        TextConditional(prompts(), "v_prediction")
    with pytest.raises(
        ValueError, match=r"added\['text_embeds'\]: expected [0-9]+ rows, as the embeddings have, got 1"
    ):
        TextConditional(prompts(), added={"text_embeds": torch.zeros(1, 4)})
    with pytest.raises(TypeError, match=r"predict=TextConditional"):
        predictor(type("UNet2DConditionModel", (nn.Module,), {"__module__": "diffusers.models"})())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain": ()}, "retain: expected at least one class, or None"),
        ({"retain": (0, FORGET)}, "retain: class 3 is to be forgotten"),
        ({"retain": (0, 0)}, "retain: a class is named twice"),
        ({"retain": (0, 9)}, "retain: unknown class 9"),
        ({"negative": (FORGET,)}, "negative: class 3 is to be forgotten"),
        ({"negative": (0, 1)}, "negative: expected one class, or one for each of the 1 forgotten, got 2"),
        ({"negative": (NULL,)}, "negative: unknown class 6"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected a positive integer or None, got 0"),
        ({"guidance": 4.5}, "guidance: expected a GuidanceConfig, got 4.5"),
        ({"guidance": {"true_score": 0}}, "true_score: expected a positive number, got 0"),
        (
            {"guidance": {"negative_in": ["generator"]}},
            "negative_in: expected one of fake_score_update, fake_score, true",
        ),
        ({"guidance": {"scale": 2}}, "GuidanceConfig: unknown key 'scale'"),
        ({"share_frozen_weights": 1}, "share_frozen_weights: expected True or False, got 1"),
        ({"reuse_generator_forward": True, "micro_batch_size": 2}, "leave out micro_batch_size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_settings_come_back_from_json():
    made = config(guidance=dataclasses.replace(GUIDANCE, negative_in=["fake_score"], dropout=0.1))
    assert DistillConfig.from_dict(made.to_dict()) == made
    assert made.retained == (0, 1, 2)


def masked(**settings):
    mask = MaskConfig(kind="random", density=0.05, block="row", region=("text.",), lr_scale="none")
    return distiller(mask=mask, fake_score_mask="same", share_frozen_weights=True, **settings)


def test_a_state_of_another_model_is_refused_before_it_writes_into_shared_weights():
    saved, other = masked(), network()
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    saved.step()
    state, ours = copy.deepcopy(saved.state_dict()), masked(teacher=other)
    before = copy.deepcopy(ours.true_score.state_dict())
    with pytest.raises(ValueError, match="conv_in.weight is frozen and differs"):
        ours.load_state_dict(state)
    assert all(torch.equal(weight, before[name]) for name, weight in ours.true_score.state_dict().items())
    again = masked()
    again.load_state_dict(state)
    for one, next_one in zip(saved.step().values(), again.step().values(), strict=True):
        assert torch.equal(one, next_one)


def test_a_refused_mask_keeps_the_sharing():
    ours = masked()
    good = BlockMask.random(network(), 0.05, "row", region=("text.",))
    with pytest.raises(ValueError, match="was not made for this Network"):
        ours.use_mask(good, BlockMask.random(nn.Linear(3, 4), 0.5, "row"))
    for name in ("conv_in", "norm", "conv_out"):
        theirs = getattr(ours.true_score, name).weight.data_ptr()
        assert (
            getattr(ours.generator, name).weight.data_ptr()
            == theirs
            == getattr(ours.fake_score, name).weight.data_ptr()
        )
    assert ours.fake_score.text.weight.data_ptr() == ours.true_score.text.weight.data_ptr()
