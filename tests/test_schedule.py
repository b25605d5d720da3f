"""Noise schedules and samplers against published constants, closed forms and diffusers."""

import json

import pytest
import torch

from pecker_fast.sampling import ddim_sample, one_step_sample
from pecker_fast.schedule import NoiseSchedule


def test_linear_has_the_published_values_at_440():
    schedule = NoiseSchedule.linear()
    assert schedule.num_train_timesteps == 1000
    assert round(schedule.alpha(440), 5) == 0.37109
    assert round(schedule.std(440), 5) == 0.92860
    assert round(schedule.sigma(440), 4) == 2.5023


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_table_agrees_with_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    ours = getattr(NoiseSchedule, name)()
    scheduler = diffusers.DDPMScheduler(1000, ours.recipe["beta_start"], ours.recipe["beta_end"], beta_schedule=name)
    theirs = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=2e-5, atol=0)
    assert torch.equal(theirs.alphas_cumprod.float(), scheduler.alphas_cumprod)


def test_scaled_linear_is_not_linear():
    a, b = NoiseSchedule.scaled_linear(), NoiseSchedule.linear(beta_start=0.00085, beta_end=0.012)
    assert abs(a.alpha(500) - b.alpha(500)) > 0.01


def test_from_diffusers_refuses_other_predictions_and_objects():
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="prediction_type='v_prediction'"):
        NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(TypeError, match="object"):
        NoiseSchedule.from_diffusers(object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_coefficients_are_the_scalar_ones_rounded_once(dtype):
    schedule = NoiseSchedule.linear()
    t = torch.tensor([0, 440, 999])
    like = torch.zeros(3, 2, 4, 4, dtype=dtype)
    for method in (schedule.alpha, schedule.std, schedule.sigma):
        value = method(t, like)
        assert value.shape == (3, 1, 1, 1)
        assert value.dtype == dtype
        expected = torch.tensor([method(int(step)) for step in t], dtype=torch.float64).to(dtype)
        assert torch.equal(value.flatten(), expected)


def test_predict_x0_inverts_add_noise():
    schedule = NoiseSchedule.linear()
    x0, epsilon = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    for t in (700, torch.tensor([0, 1, 440, 700, 999])):
        x_t = schedule.add_noise(x0, epsilon, t)
        torch.testing.assert_close(schedule.predict_x0(x_t, epsilon, t), x0, rtol=0, atol=1e-10)
    per_sample = schedule.add_noise(x0, epsilon, torch.full((5,), 700))
    torch.testing.assert_close(per_sample, schedule.add_noise(x0, epsilon, 700), rtol=0, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(50, 1e-3, 0.1),
        NoiseSchedule.scaled_linear(),
        NoiseSchedule(torch.tensor([0.9, 0.3, 1e-5], dtype=torch.float64)),
    ],
)
def test_dict_round_trip_is_exact(schedule):
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert again.to_dict() == schedule.to_dict()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "cosine"},
        {"kind": ["linear"]},
        {"kind": "linear", "beta": 1},
        {"kind": "linear", "beta_start": "x"},
        {"kind": "linear", "num_train_timesteps": 0},
        {"kind": "linear", "num_train_timesteps": 10**12},
        {"kind": "linear", "beta_start": 0.5, "beta_end": 0.1},
        {"kind": "table"},
        {"kind": "table", "alphas_cumprod": []},
        {"kind": "table", "alphas_cumprod": [0.5, 0.5]},
        {"kind": "table", "alphas_cumprod": [0.5, float("nan")]},
        {"kind": "table", "alphas_cumprod": [1.0, 0.5]},
    ],
)
def test_from_dict_refuses(values):
    with pytest.raises(ValueError, match=r"schedule|alphas_cumprod|num_train_timesteps|beta_start"):
        NoiseSchedule.from_dict(values)


def test_timesteps_are_checked():
    schedule = NoiseSchedule.linear()
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="timestep"):
            schedule.alpha(t)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        schedule.alpha(torch.tensor([1]), torch.zeros(2, 1))
    with pytest.raises(TypeError, match="like"):
        schedule.sigma(torch.tensor([1]))
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule(torch.tensor([0.5]))


def _epsilon_of(schedule, x0):
    """The exact noise for data that is always ``x0``: every sampler must return it."""
    return lambda x_t, t, condition: (x_t - schedule.alpha(t, x_t) * x0) / schedule.std(t, x_t)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_ddim_finds_the_only_image(steps):
    schedule = NoiseSchedule.linear()
    x0 = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    seen = []

    def model(x_t, t, condition):
        seen.append(int(t[0]))
        return _epsilon_of(schedule, x0)(x_t, t, condition)

    sample = ddim_sample(model, schedule, noise, torch.zeros(3), steps=steps)
    torch.testing.assert_close(sample, x0, rtol=0, atol=1e-9)
    assert seen[0] == 999
    assert len(seen) == steps == len(set(seen))
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddim_agrees_with_diffusers(clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        beta_schedule="linear",
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x_t = noise
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        epsilon = torch.tanh(x_t + t / 1000)
        x_t = scheduler.step(epsilon, t, x_t, use_clipped_model_output=True).prev_sample

    def model(x, t, condition):
        return torch.tanh(x + t[0] / 1000)

    ours = ddim_sample(model, schedule, noise, torch.zeros(2), steps=20, clip=clip)
    torch.testing.assert_close(ours, x_t, rtol=1e-4, atol=1e-5)


def test_one_step_is_sigma_times_noise_minus_prediction():
    schedule = NoiseSchedule.linear()
    noise = torch.randn(2, 1, 4, 4)
    calls = []

    def model(x_t, t, condition):
        calls.append((x_t, t, condition))
        return 0.25 * x_t

    condition = torch.tensor([3, 4])
    sample = one_step_sample(model, schedule, noise, condition, t_init=440)
    ((x_t, t, seen),) = calls
    assert torch.equal(t, torch.tensor([440, 440]))
    assert seen is condition
    torch.testing.assert_close(x_t, 0.92860 * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample, 2.5023 * (noise - 0.25 * x_t), rtol=1e-4, atol=1e-4)


def test_samplers_check_steps():
    schedule, noise = NoiseSchedule.linear(10), torch.zeros(1, 1, 2, 2)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=r"\[1, 10\]"):
            ddim_sample(lambda x, t, c: x, schedule, noise, torch.zeros(1), steps=steps)
    with pytest.raises(ValueError, match="clip"):
        ddim_sample(lambda x, t, c: x, schedule, noise, torch.zeros(1), steps=1, clip=0.0)
    with pytest.raises(ValueError, match="timestep"):
        one_step_sample(lambda x, t, c: x, schedule, noise, torch.zeros(1), t_init=10)
