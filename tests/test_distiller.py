"""MaskedDistiller: the published iteration exactly, and the promises around it."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn

from pecker_fast import BlockMask, Delta, DistillConfig, MaskConfig, MaskedDistiller, NoiseSchedule, models
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.flops import count_flops
from pecker_fast.models import DDPMUNet

SCHEDULE = NoiseSchedule.linear()


def unet(**settings):
    torch.manual_seed(0)
    small = {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "image_size": 8}
    return DDPMUNet(**(small | {"channels": 1, "norm_groups": 4, "num_classes": 4} | settings))


def config(**settings):
    mask = settings.pop("mask", {})
    if not isinstance(mask, MaskConfig):
        usual = {"kind": "random", "density": 0.3, "block": "row", "scope": "global", "batches": 2, "lr_scale": "none"}
        mask = MaskConfig(**usual | mask)
    defaults = {"forget": (2,), "override": (0,), "num_classes": 4, "sample_shape": (1, 8, 8), "batch_size": 6}
    return DistillConfig(**(defaults | {"generator_lr": 1e-3, "fake_score_lr": 2e-3, "mask": mask} | settings))


def published_iterations(teacher, c, steps):
    """Score Forgetting Distillation written out once more, in plain torch, with the same draws."""
    rng = torch.Generator().manual_seed(c.seed)
    generator, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    ema = [p.detach().clone() for p in generator.parameters()]
    adam = {"betas": c.betas, "eps": c.eps}
    generator_opt = torch.optim.Adam(generator.parameters(), lr=c.generator_lr, **adam)
    fake_opt = torch.optim.Adam(fake.parameters(), lr=c.fake_score_lr, **adam)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    sigmas = (1 - alphas**2).sqrt()
    a_init, b_init = alphas[c.t_init], sigmas[c.t_init]
    retained = torch.tensor([0, 1, 3])

    def draws(n):
        return torch.randn((n, *c.sample_shape), generator=rng)

    def generate(labels):
        z = draws(len(labels)).double()
        t = torch.full((len(labels),), c.t_init)
        return (b_init / a_init) * (z - generator(b_init * z, t, labels))

    def diffuse(x0):
        t = torch.randint(c.t_min, c.t_max, (len(x0),), generator=rng)
        epsilon = torch.randn(x0.shape, generator=rng).to(x0.dtype)
        a, b = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        return a * x0 + b * epsilon, t, epsilon, a, b

    def branches():
        labels = retained[torch.randint(3, (c.batch_size,), generator=rng)]
        yield labels, labels, c.retain_weight
        torch.randint(1, (c.batch_size,), generator=rng)
        yield torch.full((c.batch_size,), 2), torch.full((c.batch_size,), 0), c.forget_weight

    for _ in range(steps):
        fake_opt.zero_grad()
        for labels, _, weight in branches():
            with torch.no_grad():
                x0 = generate(labels)
            x_t, t, epsilon, _, _ = diffuse(x0)
            (weight * ((epsilon - fake(x_t, t, labels)) ** 2).sum((1, 2, 3)).mean()).backward()
        nn.utils.clip_grad_value_(fake.parameters(), c.clip_value)
        fake_opt.step()
        generator_opt.zero_grad()
        for labels, targets, weight in branches():
            x0 = generate(labels)
            x_t, t, epsilon, a, b = diffuse(x0)
            x0_true = (x_t - b * teacher(x_t, t, targets)) / a
            x0_fake = (x_t - b * fake(x_t, t, labels)) / a
            omega = (x0_true - x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5).detach()
            difference = x0_true - x0_fake
            loss = difference * ((x0_true - x0) - c.sid_alpha * difference) / omega
            (weight * loss.sum((1, 2, 3)).mean()).backward()
        nn.utils.clip_grad_value_(generator.parameters(), c.clip_value)
        generator_opt.step()
        for average, weight in zip(ema, generator.parameters(), strict=True):
            average.mul_(c.ema_decay).add_(weight.detach(), alpha=1 - c.ema_decay)
    return generator, fake, ema


def test_the_dense_run_is_the_published_iteration():
    teacher = unet(dropout=0.0).double()
    c = config(mask={"kind": "dense"}, ema_decay=0.5, clip_value=0.7, forget_weight=0.3)
    distiller = MaskedDistiller(copy.deepcopy(teacher), SCHEDULE, c)
    generator, fake, ema = published_iterations(teacher, c, steps=3)
    for _ in range(3):
        distiller.step()
    for ours, theirs in ((distiller.generator, generator), (distiller.fake_score, fake)):
        for name, weight in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-6, atol=1e-8)
    with distiller.averaged() as averaged:
        weights = averaged.state_dict()
        for (name, _), weight in zip(generator.named_parameters(), ema, strict=True):
            torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["saliency", "random"])
@pytest.mark.parametrize("block", ["row", "element"])
def test_only_active_weights_of_the_generator_move(kind, block):
    teacher = unet()
    before = copy.deepcopy(teacher.state_dict())
    distiller = MaskedDistiller(teacher, SCHEDULE, config(mask={"kind": kind, "block": block}, weight_decay=0.1))
    mask = distiller.build_mask()
    assert abs(mask.density - 0.3) < 0.02
    for _ in range(3):
        distiller.step()
    with distiller.averaged() as averaged:
        for weights in (averaged.state_dict(), before):  # the running average keeps the promise too
            for name, weight in weights.items():
                assert torch.equal(weight[~mask.to_dense(name)], before[name][~mask.to_dense(name)])
    moved = [name for name, weight in distiller.generator.state_dict().items() if not torch.equal(weight, before[name])]
    assert moved and set(moved) <= {name for name, p in mask.parameters.items() if p.numel}
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    assert not any(
        torch.equal(before[name], weight)
        for name, weight in distiller.fake_score.state_dict().items()
        if "conv" in name
    )


def test_an_iteration_costs_22_forwards():
    teacher = unet(width=32, norm_groups=8, image_size=16, attention_resolutions=())
    c = config(mask={"kind": "dense"}, sample_shape=(1, 16, 16))
    distiller = MaskedDistiller(teacher, SCHEDULE, c)
    distiller.step()
    with count_flops() as forward, torch.no_grad():  # F: one network on one of the two batches
        teacher(torch.randn(6, 1, 16, 16), torch.full((6,), 5), torch.zeros(6).long())
    with count_flops() as iteration:
        distiller.step()
    assert iteration.total / forward.total == pytest.approx(22, rel=0.01)


def test_networks_are_in_the_published_modes():
    """Dropout is on in the network that trains, and off in those that serve it."""
    teacher = unet()
    distiller = MaskedDistiller(teacher, SCHEDULE, config())
    seen = []
    names = {"generator": distiller.generator, "fake": distiller.fake_score, "true": distiller.true_score}
    for name, network in names.items():
        network.register_forward_hook(lambda m, *_, name=name: seen.append((name, m.training, torch.is_grad_enabled())))
    distiller.step()
    fake_step = [("generator", False, False), ("fake", True, True)]
    generator_step = [("generator", True, True), ("true", False, True), ("fake", False, True)]
    assert seen == fake_step + generator_step


def test_saliency_is_that_of_the_noise_prediction_loss_on_given_images():
    teacher = unet(dropout=0.0)
    c = config(mask={"kind": "saliency", "accumulate": "square"})
    images, labels = torch.rand(5, 1, 8, 8) * 2 - 1, torch.full((5,), 2)
    distiller = MaskedDistiller(copy.deepcopy(teacher), SCHEDULE, c)
    mask = distiller.build_mask([(images, labels)])
    rng = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (5,), generator=rng)
    epsilon = torch.randn(images.shape, generator=rng)
    ((epsilon - teacher.eval()(SCHEDULE.add_noise(images, epsilon, t), t, labels)) ** 2).sum(
        (1, 2, 3)
    ).mean().backward()
    saliency = {name: p.grad.square() for name, p in teacher.named_parameters()}
    assert mask == BlockMask.from_saliency(saliency, 0.3, "row")


def test_overrides():
    two = MaskedDistiller(unet(), SCHEDULE, config(forget=(2, 3), override=(1, 0)))
    assert two.draws.override(torch.tensor([2, 3, 2])).tolist() == [1, 0, 1]
    one = MaskedDistiller(unet(), SCHEDULE, config(forget=(2, 3), override=(1,)))
    assert one.draws.override(torch.tensor([2, 3, 2])).tolist() == [1, 1, 1]
    free = MaskedDistiller(unet(), SCHEDULE, config(forget=(2, 3), override=None))
    assert set(free.draws.override(torch.full((50,), 2)).tolist()) == {0, 1}


def test_the_learning_rate_rule():
    random = MaskedDistiller(unet(), SCHEDULE, config(mask={"lr_scale": "mass"}))
    assert random.lr_scale == 1.0
    random.build_mask()
    assert random.lr_scale == pytest.approx(1 / random.mask.density)
    salient = MaskedDistiller(unet(), SCHEDULE, config(mask={"lr_scale": "mass", "kind": "saliency"}))
    mask = salient.build_mask()
    assert mask.density < mask.mass < 1
    assert salient.lr_scale == pytest.approx(1 / math.sqrt(mask.mass * mask.density))
    by_density = MaskedDistiller(unet(), SCHEDULE, config(mask={"lr_scale": "density", "kind": "saliency"}))
    assert by_density.build_mask() == mask and by_density.lr_scale == pytest.approx(1 / mask.density)
    dense = MaskedDistiller(unet(), SCHEDULE, config(mask={"lr_scale": "mass", "kind": "dense"}))
    dense.build_mask()
    assert dense.lr_scale == 1.0


def test_warm_up():
    distiller = MaskedDistiller(unet(), SCHEDULE, config(warmup_steps=4))
    rates = []
    for _ in range(6):
        distiller.step()
        rates.append(distiller.generator_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_resume_is_the_same_to_the_bit():
    c = config(mask={"kind": "saliency"})
    whole = MaskedDistiller(unet(dropout=0.0), SCHEDULE, c)
    for _ in range(4):
        whole.step()
    half = MaskedDistiller(unet(dropout=0.0), SCHEDULE, c)
    for _ in range(2):
        half.step()
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = MaskedDistiller(unet(dropout=0.0), SCHEDULE, c)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        resumed.step()
    assert resumed.steps_done == 4 and resumed.mask == whole.mask
    assert torch.equal(resumed.active.values, whole.active.values)
    assert torch.equal(resumed.active.ema, whole.active.ema)
    other = MaskedDistiller(unet(), SCHEDULE, config(seed=9))
    other.build_mask()
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(whole.state_dict())


def test_sampling_does_not_disturb_training():
    runs = []
    for sampled in (False, True):
        distiller = MaskedDistiller(unet(), SCHEDULE, config())
        torch.manual_seed(3)
        distiller.step()
        if sampled:
            first = distiller.sample([0, 1, 2], seed=5)
            assert torch.equal(first, distiller.sample(torch.tensor([0, 1, 2]), seed=5)) and first.shape == (3, 1, 8, 8)
        distiller.step()
        runs.append(distiller.active.values.clone())
    assert torch.equal(*runs)


def test_save_and_load(tmp_path):
    distiller = MaskedDistiller(unet(), SCHEDULE, config())
    for metrics in distiller.run(2, progress=False):
        assert math.isfinite(metrics["generator_loss"]) and math.isfinite(metrics["fake_score_loss"])
    distiller.save(tmp_path / "out")
    loaded = models.load(tmp_path / "out" / "model")
    labels, noise = torch.tensor([0, 2, 3]), torch.randn(3, 1, 8, 8)
    generation = models.load_config(tmp_path / "out" / "model")["generation"]
    images = models.generate(loaded, generation, labels, noise=noise)
    assert torch.equal(images, distiller.sample(labels, noise=noise).clamp(-1, 1))
    assert BlockMask.load(tmp_path / "out" / "mask.safetensors") == distiller.mask
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileFormatError, match="file"):
        distiller.save(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_the_delta_beside_the_model_leads_from_the_true_score_to_it_and_back(tmp_path):
    teacher = unet()
    distiller = MaskedDistiller(teacher, SCHEDULE, config(ema_decay=0.5))
    for _ in range(2):
        distiller.step()
    distiller.save(tmp_path)
    model, delta = models.load(tmp_path / "model"), Delta.load(tmp_path / "delta")
    moved = copy.deepcopy(teacher)
    delta.apply(moved)
    delta.revert(model)  # its folder remembers that it carries the delta
    with distiller.averaged() as averaged:
        assert all(torch.equal(moved.state_dict()[name], weight) for name, weight in averaged.state_dict().items())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in teacher.state_dict().items())
    assert delta.metadata["generation"] == json.loads(json.dumps(distiller.generation))
    distiller.step()  # the live weights have moved on: saving again is a new delta
    distiller.save(tmp_path, overwrite=True)
    Delta.load(tmp_path / "delta").revert(models.load(tmp_path / "model"))


def test_no_delta_where_it_could_not_hold_everything(tmp_path):
    narrowed = MaskedDistiller(unet(), SCHEDULE, config())
    narrowed.build_mask()
    narrowed.generator.half()
    for number, distiller in enumerate((MaskedDistiller(BatchNormed(), SCHEDULE, config()), narrowed)):
        if distiller is not narrowed:
            distiller.step()
        distiller.save(tmp_path / str(number))
        assert (tmp_path / str(number) / "model").is_dir()
        assert not (tmp_path / str(number) / "delta").exists()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(4, 1)

    def forward(self, x_t, t, condition):
        return self.conv(x_t) + self.label(condition)[:, :, None, None] + t.view(-1, 1, 1, 1) / 1000


class BatchNormed(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x_t, t, condition):
        return super().forward(self.norm(x_t), t, condition)


def test_any_module_will_do(tmp_path):
    distiller = MaskedDistiller(Plain(), SCHEDULE, config())
    distiller.step()
    distiller.save(tmp_path)
    assert (tmp_path / "model" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_diffusers_unet(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **small, **blocks)
    schedule = NoiseSchedule.from_diffusers(diffusers.DDPMScheduler())
    before = copy.deepcopy(network.state_dict())
    distiller = MaskedDistiller(network, schedule, config(mask={"kind": "saliency", "density": 0.2}))
    for _ in range(2):
        distiller.step()
    for name, parameter in distiller.mask.parameters.items():
        outside = ~parameter.to_dense()
        assert torch.equal(distiller.generator.get_parameter(name)[outside], before[name][outside])
    distiller.save(tmp_path)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "model")
    with distiller.averaged() as averaged:
        assert all(torch.equal(averaged.state_dict()[name], weight) for name, weight in loaded.state_dict().items())
    unconditional = diffusers.UNet2DModel(sample_size=8, **(small | {"num_class_embeds": None}), **blocks)
    with pytest.raises(TypeError, match="num_class_embeds"):
        MaskedDistiller(unconditional, schedule, config())


def test_a_diverged_run_says_so():
    distiller = MaskedDistiller(unet(), SCHEDULE, config(generator_lr=1e30, clip_value=None))
    with pytest.raises(NonFiniteError, match=r"step \d+: .*_loss is"):
        list(distiller.run(20, progress=False))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"forget": (4,)}, "unknown class 4; the model has classes 0 to 3"),
        ({"forget": (), "mask": {"kind": "saliency"}}, "nothing is to be forgotten"),
        ({"forget": (0, 1, 2, 3), "override": None}, "every class is forgotten"),
        ({"forget": (2, 2)}, "named twice"),
        ({"override": (2,)}, "class 2 is to be forgotten"),
        ({"override": (0, 1)}, "one for each of the 1 forgotten"),
        ({"mask": {"density": 0}}, r"in \(0, 1\]"),
        ({"mask": {"kind": "magnitude"}}, "MaskConfig.kind: expected one of"),
        ({"batch_size": 0}, "positive integer"),
        ({"t_min": 712}, "t_min < t_max"),
        ({"generator_lr": float("nan")}, "generator_lr: expected a positive"),
        ({"sample_shape": (8, 8)}, r"\(channels, height, width\)"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_settings_survive_json_and_refuse_unknown_keys():
    c = config(forget=[2, 3], override=None)
    assert DistillConfig.from_dict(c.to_dict()) == c
    with pytest.raises(ValueError, match="unknown key 'frget'"):
        DistillConfig.from_dict(c.to_dict() | {"frget": [1]})
    with pytest.raises(ValueError, match="reach timestep 1000"):
        MaskedDistiller(unet(), SCHEDULE, config(t_max=1001))
