"""The exported network is stock diffusers, and predicts and draws what ours does."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DModel

from pecker_fast import NoiseSchedule, models
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.models.diffusers_export import FILES, export_diffusers, to_diffusers
from pecker_fast.models.one_step_scheduler import one_step_scheduler
from pecker_fast.sampling import ddim_sample, one_step_sample
from pecker_fast.written import NAME

SCHEDULE = NoiseSchedule.linear()


def _generation(kind, **more):
    return {"kind": kind, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 8, 8], **more}


def _stirred(model):
    """No two norms and biases alike, so that none can stand in for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def _attending():
    """As the CIFAR-10 network, an eighth as wide: attention at its second level alone, a null class."""
    return _stirred(DDPMUNet(width=16, channel_mult=(1, 2, 2, 2), norm_groups=16, dropout=0.1))


def _parity(model, size):
    torch.manual_seed(1)
    classes = model.config["num_classes"]
    x = torch.randn(3, model.config["channels"], size, size)
    t, labels = torch.tensor([0, 440, 999]), torch.tensor([0, classes - 1, classes])
    with torch.no_grad():
        expected = model.eval()(x, t, labels)
        got = to_diffusers(model)(x, t, class_labels=labels).sample
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return got


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return _stirred(DDPMUNet.digits(8))


def test_digits_agree(digits):
    got = _parity(digits, 8)
    with torch.no_grad():  # what the classes do is in the table: shifted labels must be seen
        other = to_diffusers(digits)(
            torch.zeros(3, 1, 8, 8), torch.tensor([0, 440, 999]), torch.tensor([1, 2, 3])
        ).sample
    assert not torch.allclose(got, other, atol=1e-3)


def test_attention_and_the_null_class_agree():
    _parity(_attending(), 32)


def test_the_published_architecture_agrees():
    model = _stirred(DDPMUNet.cifar10())
    assert sum(p.numel() for p in model.parameters()) == 38_632_323
    x, t, labels = torch.randn(1, 3, 32, 32), torch.tensor([440]), torch.tensor([10])
    with torch.no_grad():
        torch.testing.assert_close(to_diffusers(model)(x, t, labels).sample, model(x, t, labels), rtol=1e-5, atol=1e-5)


def test_one_euler_step_draws_what_the_generator_draws(tmp_path, digits):
    models.save(digits, tmp_path / "ours", _generation("one_step", t_init=440))
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {*FILES, NAME}
    unet = UNet2DModel.from_pretrained(tmp_path / "theirs")
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "theirs")
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [440]
    x, t = noise * scheduler.init_noise_sigma, scheduler.timesteps[0]
    with torch.no_grad():
        epsilon = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
    drawn = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(
        drawn, one_step_sample(digits, SCHEDULE, noise, labels, t_init=440), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_one_step_of_stable_diffusion(predicts, digits):
    """Network of either kind in stock diffusers, against the formula, at the published timestep."""
    schedule, t_init = NoiseSchedule.scaled_linear(), 625
    scheduler = one_step_scheduler(schedule, t_init, predicts)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [t_init]

    def epsilon(x_t, t, labels):
        output = digits(x_t, t, labels)
        return output if predicts == "epsilon" else schedule.alpha(t_init) * output + schedule.std(t_init) * x_t

    noise, labels, t = torch.randn(4, 1, 8, 8), torch.arange(4), scheduler.timesteps[0]
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        output = digits(scheduler.scale_model_input(x, t), t.long().expand(4), labels)
    drawn = scheduler.step(output, t, x).prev_sample
    expected = one_step_sample(epsilon, schedule, noise, labels, t_init=t_init)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    other = one_step_sample(epsilon, schedule, noise, labels, t_init=t_init - 1)
    assert not torch.allclose(drawn, other, rtol=0, atol=1e-4)  # a control: the next timestep is told apart


def test_one_step_needs_a_timestep_and_a_prediction_that_it_knows():
    with pytest.raises(ValueError, match="t_init: expected 0 to 999, got 1000"):
        one_step_scheduler(SCHEDULE, 1000)
    with pytest.raises(ValueError, match="prediction_type: expected 'epsilon' or 'v_prediction', got 'sample'"):
        one_step_scheduler(SCHEDULE, 440, "sample")


def test_ddim_draws_the_same(tmp_path, digits):
    models.save(digits, tmp_path / "ours", _generation("ddim", steps=5))
    export_diffusers(tmp_path / "ours", tmp_path / "theirs")
    unet, scheduler = (
        UNet2DModel.from_pretrained(tmp_path / "theirs"),
        DDIMScheduler.from_pretrained(tmp_path / "theirs"),
    )
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(x, ddim_sample(digits, SCHEDULE, noise, labels, steps=5, clip=1.0), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got DigitsClassifier"):
        to_diffusers(DigitsClassifier(width=4))
    uneven = DDPMUNet(width=6, channel_mult=(1, 2), attention_resolutions=(), image_size=8, norm_groups=4)
    with pytest.raises(ValueError, match=r"this network has \[2, 4\]"):
        to_diffusers(uneven)
    models.save(DigitsClassifier(width=4), tmp_path / "judge")
    with pytest.raises(FileFormatError, match="judge: expected the folder of a DDPMUNet"):
        export_diffusers(tmp_path / "judge", tmp_path / "out")
    assert not (tmp_path / "out").exists()
