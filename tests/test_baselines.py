"""Baselines: each update rule against plain torch in float64, and the promises around it."""

import copy
import json

import pytest
import torch
from baselines import CLASSES, NULL, SCHEDULE, SHAPE, Plain, Tiny, baseline, config, images, tiny
from torch import nn

from pecker_fast import Baseline, BaselineConfig, BlockMask, Delta, MaskConfig, models, salun, salun_mask_config
from pecker_fast.baselines import METHODS
from pecker_fast.baselines.data import Images
from pecker_fast.baselines.fisher import diagonal_fisher
from pecker_fast.errors import NonFiniteError
from pecker_fast.flops import count_flops
from pecker_fast.models import DDPMUNet
from pecker_fast.sampling import ddim_partial
from pecker_fast.stopping import fresh_seed

FORGETTING = tuple(method for method in METHODS if method != "retrain")


def difference(run, bug=None, steps=3):
    """Largest difference between a run's weights and those of the same thing in plain torch."""
    run.prepare()
    plain = Plain(run, bug).steps(steps, tuple(name for name, _ in run.active.named_parameters()))
    for _ in run.run(steps, progress=False):
        pass
    weights = run.network.state_dict()
    return max(float((weights[name] - weight).abs().max()) for name, weight in plain.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_each_rule_is_the_one_written_out(method):
    assert difference(baseline(method)) < 1e-12


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("esd", {"null_class": True, "negative_guidance": 1.5, "sampling_guidance": 2.0}),
        ("esd", {"retain_weight": 0.7, "override": (0,)}),
        ("selective_amnesia", {"ewc_weight": 3.0, "forget_weight": 0.5, "retain_weight": 2.0}),
        ("gradient_ascent", {"forget_weight": 0.2, "retain_weight": 0.9, "max_grad_norm": 0.05}),
        ("gradient_ascent", {"retain_weight": 0.0, "max_grad_norm": None}),
        ("random_label", {"forget_weight": 2.0, "retain_weight": 0.1}),
        ("random_label", {"null_class": True, "class_dropout": 0.4}),
    ],
)
def test_settings_reach_the_rules(method, settings):
    assert difference(baseline(method, **settings)) < 1e-12


@pytest.mark.parametrize("bug", ["step first", "gradients kept", "target attached", "sum of pixels"])
def test_the_traps_of_published_code_would_show(bug):
    assert difference(baseline("random_label"), bug) > 1e-5


def test_published_weights_are_explicit():
    cifar = {"forget": (0,), "num_classes": 10, "sample_shape": (3, 32, 32)}
    found = {method: BaselineConfig(method=method, **cifar).weights for method in METHODS}
    assert found == {
        "fine_tune": (0.0, 1.0),
        "gradient_ascent": (3072.0, 3.072),
        "random_label": (1.0, 3.072),
        "esd": (1.0, 0.0),
        "selective_amnesia": (3072.0, 3072.0),
        "retrain": (0.0, 1.0),
    }
    assert config("random_label", retain_weight=0.0).weights == (1.0, 0.0)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["row", "element", (2, 3)])
@pytest.mark.parametrize("method", FORGETTING)
def test_weights_off_the_mask_keep_every_bit(method, block):
    model = tiny(torch.float32)
    mask = {"kind": "random", "block": block}
    run = baseline(method, model, mask=mask, weight_decay=0.1, ema_decay=0.5)
    for _ in run.run(3, progress=False):
        pass
    with run.averaged() as averaged:
        states = [averaged.state_dict()]
    states.append(run.network.state_dict())
    before = model.state_dict()
    for after in states:
        for name, parameter in run.mask.parameters.items():
            active = parameter.to_dense()
            assert torch.equal(after[name][~active], before[name][~active])
    assert any(not torch.equal(states[-1][name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["fine_tune", "esd"])
def test_a_saliency_mask_by_given_images_or_the_models_own(method):
    mask = {"kind": "saliency", "block": "element"}
    run = baseline(method, mask=mask)
    assert run.build_mask().numel == round(0.3 * run.mask.total) and run.mask.mass > 0.3
    own = Baseline(tiny(), SCHEDULE, config("esd", mask=mask))
    assert own.build_mask() != run.mask


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_saluns_mask_is_the_published_one(guidance):
    model = tiny()
    settings = {"num_classes": CLASSES, "sample_shape": SHAPE, "batch_size": 5, "forget": (3,), "null_class": True}
    mask = salun_mask_config(batches=3, batch_size=4)
    c = salun(mask=mask, **settings | {"saliency_guidance": guidance, "sampling_steps": 4})
    found = Baseline(model, SCHEDULE, c, data=images()).build_mask()

    rng, x = torch.Generator().manual_seed(0), images().images[images().labels == 3].double()
    order = torch.cat([torch.randperm(5, generator=rng)])
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for _ in range(3):
        while len(order) < 4:
            order = torch.cat([order, torch.randperm(5, generator=rng)])
        index, order = order[:4], order[4:]
        half = torch.randint(40, (2,), generator=rng)
        t, label = torch.cat([half, 39 - half]), torch.full((4,), 3)
        epsilon = torch.randn((4, *SHAPE), generator=rng).double()
        x_t = SCHEDULE.add_noise(x[index], epsilon, t)
        prediction = (1 + guidance) * model(x_t, t, label) - guidance * model(x_t, t, torch.full((4,), NULL))
        model.zero_grad()
        (epsilon - prediction).square().sum((1, 2, 3)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for summed, parameter in zip(total, model.parameters(), strict=True):
            summed += parameter.grad
    saliency = torch.cat([summed.abs().float().flatten() for summed in total])
    expected = torch.zeros(len(saliency), dtype=torch.bool)
    expected[saliency.argsort(descending=True, stable=True)[: len(saliency) // 2]] = True
    dense = torch.cat([found.parameters[name].to_dense().flatten() for name, _ in model.named_parameters()])
    assert torch.equal(dense, expected)


def test_salun_is_random_label_under_its_mask():
    shared = {"forget": (0,), "num_classes": 10, "sample_shape": (3, 32, 32)}
    found = salun(**shared)
    mask = found.mask
    assert found == BaselineConfig(method="random_label", mask=salun_mask_config(), **shared)
    assert (mask.density, mask.block, mask.scope, mask.accumulate, mask.lr_scale) == (
        *(0.5, "element", "global", "signed_sum", "none"),
    )
    guided = salun("gradient_ascent", null_class=True, **shared)
    assert (guided.class_dropout, guided.saliency_guidance, guided.learning_rate) == (0.1, 2.0, 1e-4)
    with pytest.raises(ValueError, match="salun: method: expected one of random_label, gradient_ascent, got 'esd'"):
        salun("esd", **shared)


def test_an_epoch_shows_every_image_once():
    drawn = Images(torch.arange(5.0), torch.arange(5), torch.Generator().manual_seed(0))
    seen = torch.cat([labels for _, labels in drawn.epochs(5, 3)])
    assert all(sorted(epoch.tolist()) == list(range(5)) for epoch in seen.split(5))


# -- Selective Amnesia -----------------------------------------------------------------------------


def test_fisher_of_a_linear_model():
    w, x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True), torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    samples = [[(w * row).sum() ** 2, (w * row).sum()] for row in x.double()]
    gradients = torch.stack([(2 * (w * row).sum() + 1) * row for row in x.double()]).detach()
    torch.testing.assert_close(diagonal_fisher([w], samples)[0], gradients.square().mean(0))
    with pytest.raises(ValueError, match="at least one sample"):
        diagonal_fisher([w], [])


@pytest.mark.parametrize("timesteps", [3, None])
def test_fisher_sums_over_timesteps_before_it_squares(timesteps):
    run = baseline("selective_amnesia", fisher_timesteps=timesteps, fisher_samples=2, batch_size=16)
    run.prepare()
    rng, model = torch.Generator().manual_seed(fresh_seed("fisher", 0)), tiny()
    t = torch.tensor([0, 13, 26]) if timesteps else torch.arange(40)
    noise = torch.randn((8, *SHAPE), generator=rng).double()
    labels = torch.arange(4).repeat_interleave(2)
    with torch.no_grad():
        samples = ddim_to_the_end(model, noise, labels)
    squares = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x0, label in zip(samples, labels, strict=True):
        model.zero_grad()
        for some in t.split(16):
            epsilon = torch.randn((len(some), *SHAPE), generator=rng).double()
            x_t = SCHEDULE.add_noise(x0.expand(len(some), *SHAPE), epsilon, some)
            loss = (epsilon - model(x_t, some, label.expand(len(some)))).square().sum()
            (loss * 40 / len(t)).backward()
        for square, parameter in zip(squares, model.parameters(), strict=True):
            square += parameter.grad**2 / 8
    by_name = dict(zip(dict(model.named_parameters()), squares, strict=True))
    for (name, _), fisher in zip(run.active.named_parameters(), run.work.memory.fisher, strict=True):
        torch.testing.assert_close(fisher.flatten(), by_name[name].flatten(), rtol=1e-9, atol=1e-12)


def ddim_to_the_end(model, noise, labels):
    x_t, t = ddim_partial(model, SCHEDULE, noise, labels, steps=4, stop=3, clip=1.0)
    return SCHEDULE.predict_x0(x_t, model(x_t, t, labels), 9).clamp(-1, 1)


def test_what_holds_it_back_is_information():
    free, held = (baseline("selective_amnesia", ewc_weight=weight) for weight in (0.0, 1e6))
    moved = []
    for run in (free, held):
        metrics = [dict(step) for step in run.run(4, progress=False)]
        moved.append(float(run.work.drift().detach()))
    assert moved[1] < moved[0] / 10
    assert metrics[0]["ewc_loss"] == 0.0 < metrics[1]["ewc_loss"]


# -- retraining ------------------------------------------------------------------------------------


def unet(seed=0, **settings):
    torch.manual_seed(seed)
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    return DDPMUNet(image_size=4, channels=1, num_classes=CLASSES, **small | settings)


def test_retraining_starts_from_scratch_and_leaves_the_original_alone():
    model = unet(1)
    before = copy.deepcopy(model.state_dict())
    run = Baseline(model, SCHEDULE, config("retrain", seed=7), data=images())
    torch.manual_seed(7)
    initial = DDPMUNet(**model.config).state_dict()
    assert all(torch.equal(weight, initial[name]) for name, weight in run.network.state_dict().items())
    run.step()
    for network in (model, run.true_score):
        assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert not torch.equal(run.network.state_dict()["conv_in.weight"], initial["conv_in.weight"])


def test_what_cannot_be_built_again_needs_a_fresh_network():
    with pytest.raises(ValueError, match="'retrain' cannot build Tiny again, only DDPMUNet; give a network with"):
        Baseline(tiny(), SCHEDULE, config("retrain"), data=images())
    with pytest.raises(ValueError, match="fresh: expected the model's weights by name and shape"):
        Baseline(tiny(), SCHEDULE, config("retrain"), data=images(), fresh=unet())
    with pytest.raises(ValueError, match="fresh: only 'retrain' starts from another network"):
        Baseline(tiny(), SCHEDULE, config("esd"), fresh=Tiny())


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random_label", "selective_amnesia", "esd"])
def test_a_resumed_run_is_the_run(method):
    def make(seed=3):
        mask = {"kind": "random", "density": 0.5}
        return baseline(method, tiny(torch.float32, dropout=0.3), mask=mask, ema_decay=0.5, seed=seed)

    whole, first, second = make(), make(), make()
    torch.manual_seed(1)
    for run, steps in ((whole, 4), (first, 2)):
        for _ in run.run(steps, progress=False):
            pass
    second.load_state_dict(first.state_dict())
    torch.manual_seed(2)  # dropout is the run's own
    for _ in second.run(2, progress=False):
        pass
    with whole.averaged() as one, second.averaged() as other:
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())
    with pytest.raises(ValueError, match="saved with another seed: 3"):
        make(seed=4).load_state_dict(first.state_dict())


def test_a_run_leaves_global_chance_and_the_model_alone():
    model = tiny(torch.float32, dropout=0.3)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    run = baseline("random_label", model)
    run.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and flags == [parameter.requires_grad for parameter in model.parameters()]
    assert not any(parameter.requires_grad for parameter in run.true_score.parameters())


def test_dropout_is_on_in_the_network_that_trains_alone():
    run = baseline("random_label", tiny(torch.float32, dropout=0.5))
    seen = []
    run.network.dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    run.step()
    assert seen == [False, True, True]  # the pseudo target, the forgotten images, the retained ones


def test_samples_are_those_of_the_average():
    run = baseline("fine_tune", tiny(torch.float32), ema_decay=0.9)
    for _ in run.run(2, progress=False):
        pass
    drawn = run.sample([1, 3], seed=0)
    with run.averaged() as network:
        noise = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
        assert torch.equal(
            drawn, models.generate(network, run.generation, torch.tensor([1, 3]), noise=noise).clamp(-1, 1)
        )
    assert drawn.shape == (2, *SHAPE) and float(drawn.abs().max()) <= 1


def test_what_is_saved(tmp_path):
    model = unet()
    run = Baseline(model, SCHEDULE, config("random_label", mask={"kind": "random"}, ema_decay=0.5), data=images())
    for _ in run.run(2, progress=False):
        pass
    run.save(tmp_path / "out")
    saved = models.load(tmp_path / "out" / "model").state_dict()
    with run.averaged() as network:
        assert all(torch.equal(weight, saved[name]) for name, weight in network.state_dict().items())
    assert models.load_config(tmp_path / "out" / "model")["generation"] == run.generation
    assert BlockMask.load(tmp_path / "out" / "mask.safetensors") == run.mask
    settings = json.loads((tmp_path / "out" / "baseline_config.json").read_text())
    assert BaselineConfig.from_dict(settings) == run.config
    Delta.load(tmp_path / "out" / "delta").apply(model, progress=False)
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


def test_numbers_that_are_not_finite_stop_a_run():
    model = tiny(torch.float32)
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: retain_loss is nan"):
        list(baseline("fine_tune", model).run(2, progress=False))


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"), [("random_label", "saliency"), ("selective_amnesia", "random"), ("gradient_ascent", "dense")]
)
def test_flops_are_those_of_the_work(method, kind):
    run = baseline(method, tiny(torch.float32), mask={"kind": kind})
    with pytest.raises(RuntimeError, match="no mask yet"):
        run.flops()
    with count_flops() as of_mask:
        run.build_mask()
    state = run.draws.rng.get_state()
    counted = run.flops(10)
    assert torch.equal(run.draws.rng.get_state(), state) and run.steps_done == 0
    with count_flops() as of_setup:
        run.prepare()
    with count_flops() as of_step:
        run.step()
    assert (counted["total"], counted["mask"]["total"]) == (of_step.total, of_mask.total)
    assert counted["setup"]["total"] == of_setup.total
    assert counted["total_with_mask"] == of_step.total + round((of_mask.total + of_setup.total) / 10)


def test_esd_counts_its_sampling_on_average():
    run = baseline("esd", tiny(torch.float32), null_class=True)
    run.build_mask()
    found = []
    for run.work.stop in range(4):
        with count_flops() as count:
            run.step()
        found.append(count.total)
    run.work.stop = None
    assert run.flops()["total"] == sum(found) / 4


def test_every_method_says_what_it_needs():
    assert set(Baseline.NEEDS) == set(METHODS)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "salun"}, "BaselineConfig.method: expected one of fine_tune"),
        ({"forget": ()}, "BaselineConfig.forget: expected at least one class"),
        ({"forget": (4,)}, "BaselineConfig.forget: unknown class 4"),
        ({"forget": (1, 1)}, "a class is named twice"),
        ({"override": (3,)}, "BaselineConfig.override: class 3 is to be forgotten"),
        ({"forget": (0, 1, 2, 3)}, "every class is forgotten"),
        ({"learning_rate": 0}, "BaselineConfig.learning_rate: expected a positive number"),
        ({"retain_weight": -1.0}, "BaselineConfig.retain_weight: expected a number >= 0 or None"),
        (
            {"mask": {"kind": "saliency", "saliency": "distillation"}},
            "saliency='noise_prediction' alone",
        ),
        ({"method": "retrain", "mask": {"kind": "random"}}, "'retrain' trains every weight"),
        ({"class_dropout": 0.1}, "class_dropout: 0.1 needs a model that was trained with a null class"),
        ({"saliency_guidance": 2.0}, "saliency_guidance: 2.0 needs a model"),
        ({"null_class": 1}, "BaselineConfig.null_class: expected True or False"),
        ({"sample_shape": (1, 4)}, r"expected \(channels, height, width\)"),
        ({"betas": (0.9,)}, "expected two numbers"),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=text):
        config(**{"method": "fine_tune"} | settings)


def test_data_that_does_not_fit():
    data = images()
    for wrong, text in [
        (None, "method 'random_label' trains on labelled images; give data"),
        (data.subset(data.labels != 3), "needs images of every class to forget, there are none of class 3"),
        (data.subset(data.labels != 1), "needs images of every class to retain, there are none of class 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            Baseline(tiny(), SCHEDULE, config("random_label"), data=wrong)
    for settings, text in [
        ({"sample_shape": (1, 8, 8)}, r"data: expected images of \(1, 8, 8\)"),
        ({"num_classes": 5}, "data: expected 5 classes"),
        ({"sampling_steps": 41}, "sampling_steps: expected at most the schedule's 40"),
    ]:
        with pytest.raises(ValueError, match=text):
            Baseline(tiny(), SCHEDULE, config("fine_tune", **settings), data=data)
    kept = data.subset(data.labels != 3)
    run = Baseline(tiny(), SCHEDULE, config("fine_tune", mask={"kind": "saliency"}), data=kept)
    with pytest.raises(ValueError, match="the mask is chosen by images of class"):
        run.build_mask()
    with pytest.raises(ValueError, match="fisher_timesteps: expected at most the schedule's 40, got 41"):
        baseline("selective_amnesia", fisher_timesteps=41).prepare()


def test_one_mask_and_nothing_to_save_before_it():
    run = baseline("fine_tune")
    for refused in (lambda: run.save("nowhere"), run.state_dict):
        with pytest.raises(RuntimeError, match="build_mask"):
            refused()
    run.build_mask()
    with pytest.raises(RuntimeError, match="has a mask already"):
        run.build_mask()
    with pytest.raises(ValueError, match="'retrain' trains every weight, from scratch; give it a dense mask"):
        baseline("retrain").use_mask(BlockMask.random(tiny(), 0.5, "row"))
    with pytest.raises(ValueError, match="was not made for this Tiny"):
        baseline("fine_tune").use_mask(BlockMask.random(nn.Linear(2, 2), 0.5, "row"))


def test_settings_survive_json():
    made = config("random_label", override=(0,), mask=MaskConfig(region=("conv_in.",), block=(2, 3)))
    assert BaselineConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
