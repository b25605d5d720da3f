"""Training helpers: they learn, repeat themselves, leave the random state alone and stop at nonsense."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pecker_fast import pretrain
from pecker_fast.data import ImageData
from pecker_fast.errors import NonFiniteError
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.pretrain import train_classifier, train_denoiser
from pecker_fast.sampling import one_step_sample
from pecker_fast.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for networks as small as these a second one only waits


def _halves(count=32):
    """Two easy classes: bright above, or bright below."""
    labels = torch.arange(count) % 2
    images = torch.full((count, 1, 8, 8), -1.0)
    images[labels == 0, :, :4] = 1.0
    images[labels == 1, :, 4:] = 1.0
    return ImageData(images, labels, ("above", "below"))


def _unet(dropout=0.1):
    return DDPMUNet(
        width=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        image_size=8,
        channels=1,
        num_classes=2,
        dropout=dropout,
        norm_groups=4,
    )


def _train(model, **options):
    settings = {"steps": 3, "batch_size": 8, "progress": False, **options}
    return train_denoiser(model, _halves(), SCHEDULE, **settings)


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def _denoising_loss(model):
    data = _halves(64)
    generator = torch.Generator().manual_seed(1)
    epsilon = torch.randn(data.images.shape, generator=generator)
    t = torch.randint(1000, (64,), generator=generator)
    with torch.no_grad():
        return float(F.mse_loss(model(SCHEDULE.add_noise(data.images, epsilon, t), t, data.labels), epsilon))


def test_denoiser_learns_and_samples_the_class():
    model = _unet(dropout=0.0)
    before = _denoising_loss(model.eval())
    average = _train(model, steps=100, batch_size=32, learning_rate=1e-2)
    assert _denoising_loss(average) < 0.25 * before
    assert not average.training
    labels = torch.tensor([0, 1] * 32)
    images = one_step_sample(average, SCHEDULE, torch.randn(64, 1, 8, 8), labels, t_init=500)
    above = images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))
    assert int((above == (labels == 0)).sum()) >= 48  # 32 by chance; about 60 is usual


def test_denoiser_repeats_itself_and_leaves_the_random_state_alone():
    model = _unet()
    first, second, other = (copy.deepcopy(model) for _ in range(3))
    state = torch.get_rng_state()
    a = _train(first, seed=7)
    torch.manual_seed(123)
    b = _train(second, seed=7)
    assert _equal(a, b)
    assert _equal(first, second)
    assert not _equal(a, _train(other, seed=8))
    torch.set_rng_state(state)
    _train(copy.deepcopy(model), seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_average_is_the_documented_one():
    seen, model = [], _unet()

    class Recorder(DDPMUNet):
        def forward(self, x_t, t, condition):
            seen.append(self.conv_out.bias.detach().clone())
            return super().forward(x_t, t, condition)

    recorder = Recorder(**model.config)
    average = _train(recorder, steps=4, ema_decay=0.2)
    values = [*seen[1:], recorder.conv_out.bias.detach()]
    expected = values[0]
    for step, value in enumerate(values[1:], start=1):
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.conv_out.bias.detach(), expected)


def test_class_dropout_uses_the_null_class():
    class Recorder(DDPMUNet):
        labels: list[int] = []

        def forward(self, x_t, t, condition):
            self.labels += condition.tolist()
            return super().forward(x_t, t, condition)

    model = Recorder(**_unet().config)
    _train(model, steps=4, batch_size=32)
    assert set(model.labels) == {0, 1}
    _train(model, steps=4, batch_size=32, class_dropout=0.5)
    assert 0.25 < model.labels[128:].count(2) / 128 < 0.75


@pytest.mark.parametrize("count", [1, 6, 7])
def test_timesteps_come_in_mirrored_pairs(count):
    t = pretrain.antithetic_timesteps(count, 1000, torch.Generator().manual_seed(0))
    assert t.shape == (count,)
    half = (count + 1) // 2
    assert torch.equal(t[half:], 999 - t[: count - half])
    assert 0 <= int(t.min()) <= int(t.max()) < 1000


def test_classifier_learns():
    data = _halves()
    model = train_classifier(DigitsClassifier(width=4, num_classes=2), data, steps=30, progress=False)
    assert not model.training
    assert torch.equal(model(data.images).argmax(1), data.labels)


def test_progress_bar_goes_to_stderr_and_can_be_turned_off(capfd):
    train_classifier(DigitsClassifier(width=2, num_classes=2), _halves(), steps=2, progress=False)
    assert capfd.readouterr() == ("", "")
    train_classifier(DigitsClassifier(width=2, num_classes=2), _halves(), steps=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training classifier" in err


def test_non_finite_loss_stops_the_training():
    data = _halves()
    data.images[3] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1 of 5"):
        train_classifier(DigitsClassifier(width=2, num_classes=2), data, steps=5, progress=False)
    with pytest.raises(NonFiniteError, match="denoiser"):
        train_denoiser(_unet(), data, SCHEDULE, steps=5, batch_size=64, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"class_dropout": 1.0}, "class_dropout"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _train(_unet(), **options)


def test_frozen_parameters_and_empty_data_are_refused():
    model = _unet()
    model.conv_in.requires_grad_(False)
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        _train(model)
    with pytest.raises(ValueError, match="empty"):
        train_classifier(DigitsClassifier(), _halves().subset(torch.tensor([], dtype=torch.int64)))
