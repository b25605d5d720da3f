"""The judge of any data set: its network, its training and what it tells of itself."""

import json
from types import SimpleNamespace

import image_sets
import pytest
import torch

from pecker_fast import models
from pecker_fast.cli import main
from pecker_fast.commands.judging import load_judge
from pecker_fast.data import ImageData
from pecker_fast.digits_task import evaluate_images as evaluate_digits
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.evaluation import evaluate_images, predict
from pecker_fast.metrics import FeatureStatistics, frechet_distance, wilson_interval
from pecker_fast.models import DDPMUNet, DigitsClassifier, ImageClassifier
from pecker_fast.pretrain import augmented, train_classifier

FILES = ("config.json", "diffusion_pytorch_model.safetensors", "judge.json")


def _judge(**changes):
    return ImageClassifier(**{"width": 4, "blocks_per_stage": 1, "image_size": 16, "num_classes": 3, **changes}).eval()


def _halves(count=40, size=16):
    """Bright above, bright below, or bright all over."""
    labels = torch.arange(count) % 3
    images = torch.full((count, 3, size, size), -1.0)
    images[labels != 1, :, : size // 2] = 1.0
    images[labels != 0, :, size // 2 :] = 1.0
    return ImageData(images + 0.1 * torch.randn(images.shape), labels, ("above", "below", "all"))


def test_classifier_by_hand():
    """One block a stage, written out."""
    judge, images = _judge(), torch.randn(2, 3, 16, 16)
    conv, norm, _, first, second, third = judge.body
    x = norm(conv(images)).relu()
    x = (x + first.norm2(first.conv2(first.norm1(first.conv1(x)).relu()))).relu()
    for block in (second, third):
        shortcut = block.shortcut[1](block.shortcut[0](x[..., ::2, ::2]))
        x = (shortcut + block.norm2(block.conv2(block.norm1(block.conv1(x)).relu()))).relu()
    assert x.shape == (2, 16, 4, 4)
    features = x.flatten(2).mean(2)
    torch.testing.assert_close(judge.features(images), features)
    torch.testing.assert_close(judge(images), judge.head(features))


def test_classifier_comes_back_from_its_folder(tmp_path):
    judge = _judge(channels=1)
    models.save(judge, tmp_path / "judge")
    again, images = models.load(tmp_path / "judge"), torch.randn(2, 1, 16, 16)
    assert again.config == judge.config == ImageClassifier(**judge.config).config
    assert torch.equal(again(images), judge(images))


def test_classifier_refuses_bad_arguments_and_images():
    for name, value in (("width", 0), ("blocks_per_stage", True), ("image_size", 6)):
        with pytest.raises(ValueError, match=name):
            _judge(**{name: value})
    for shape in ((2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\)"):
            _judge()(torch.zeros(shape))


def test_augmented_images_are_flipped_and_shifted_ones():
    images = torch.arange(2 * 2 * 8 * 16.0).view(2, 2, 8, 16)
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        drawn = augmented(images, generator)
        assert drawn.shape == images.shape
        for image, original in zip(drawn, images, strict=True):
            wanted = {}
            for flip in (False, True):
                source = original.flip(2) if flip else original
                padded = torch.nn.functional.pad(source[None], (1, 1, 1, 1), mode="reflect")[0]
                for y in range(3):
                    for x in range(3):
                        wanted[flip, y, x] = padded[:, y : y + 8, x : x + 16]
            fits = [key for key, value in wanted.items() if torch.equal(value, image)]
            assert len(fits) == 1
            seen.add(fits[0])
    assert len(seen) == 18  # every flip and shift


def test_training_learns_and_augmentation_is_off_unless_asked():
    data = _halves(size=8)
    settings = {"steps": 3, "batch_size": 16, "learning_rate": 1e-2, "progress": False}
    trained = {}
    for name, augment in (("default", {}), ("off", {"augment": False}), ("on", {"augment": True})):
        torch.manual_seed(0)
        trained[name] = train_classifier(_judge(image_size=8), data, **settings, **augment)
    weights = {name: judge.head.weight for name, judge in trained.items()}
    assert torch.equal(weights["default"], weights["off"])
    assert not torch.equal(weights["default"], weights["on"])
    judge = train_classifier(_judge(image_size=8), data, **settings | {"steps": 25, "batch_size": 40})
    assert (predict(data.images, judge) == data.labels).float().mean() > 0.9


@pytest.mark.parametrize("settings", [{}, {"features": 5}], ids=str)
def test_evaluation_in_chunks_is_evaluation_at_once(settings, monkeypatch):
    torch.manual_seed(0)
    judge = DigitsClassifier(width=4, **settings).eval()
    images, labels = torch.randn(30, 1, 8, 8), torch.arange(30) % 10
    real = ImageData(torch.randn(50, 1, 8, 8).clamp(-1, 1), torch.arange(50) % 10, tuple("0123456789"))
    with torch.no_grad():
        features = judge.features(images.clamp(-1, 1))
        guesses = judge.head(features).argmax(1)
        kept, forgotten = ~torch.isin(labels, torch.tensor([3, 5])), torch.isin(labels, torch.tensor([3, 5]))
        statistics = FeatureStatistics(), FeatureStatistics()
        statistics[0].update(features[kept])
        statistics[1].update(judge.features(real.images[~torch.isin(real.labels, torch.tensor([3, 5]))]))
    away = int((~torch.isin(guesses[forgotten], torch.tensor([3, 5]))).sum())
    expected = {
        "unlearning_accuracy": away / 6,
        "unlearning_accuracy_ci95": list(wilson_interval(away, 6)),
        "retain_accuracy": int((guesses == labels)[kept].sum()) / 24,
        "frechet_distance": frechet_distance(*statistics),
    }
    assert evaluate_digits(images, labels, judge, real, (3, 5)) == expected  # digits fit into one chunk: the same bits
    monkeypatch.setattr("pecker_fast.evaluation._VALUES", 7 * 64)
    chunked = evaluate_images(images, labels, judge, real, (3, 5))
    distance = chunked.pop("frechet_distance")
    assert distance == pytest.approx(expected.pop("frechet_distance"), rel=1e-4)
    assert chunked == expected
    assert torch.equal(predict(images.clamp(-1, 1), judge), guesses)


def test_evaluation_refuses_what_cannot_be_measured():
    judge, real = _judge(), _halves(9)
    with pytest.raises(ValueError, match="empty"):
        evaluate_images(real.images, real.labels.clamp(max=1), judge, real, (2,))
    broken = real.images.clone()
    broken[0] = float("nan")
    with pytest.raises(NonFiniteError):
        evaluate_images(broken, real.labels, judge, real, (1,))


def test_command_judges_digits_and_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = ["judge", "--dry_run", "--json", "--width", "4"]
    assert main(plan) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["settings"]["images"], values["settings"]["held_out_images"]) == (1438, 359)
    assert values["would_write"] == [f"judge/{name}" for name in (*FILES, "config.yaml")]
    assert not list(tmp_path.iterdir())
    small = ["judge", "--width", "4", "--max_train_steps", "2", "--train_batch_size", "4"]
    assert main([*small, "--output_dir", "out"]) == 0
    assert "held-out images  [95 % CI" in capsys.readouterr().out
    assert isinstance(models.load("out"), DigitsClassifier)
    report = json.loads((tmp_path / "out" / "judge.json").read_text())
    right = round(report["held_out_accuracy"] * 359)
    assert report["held_out_accuracy_ci95"] == list(wilson_interval(right, 359))
    image_sets.npz(tmp_path / "two.npz", image_sets.random_pixels(2, 16), [0, 1])
    assert main([*small, "--train_data_dir", "two.npz"]) == 2
    assert "to hold a fifth out" in capsys.readouterr().err
    image_sets.npz(tmp_path / "odd.npz", image_sets.random_pixels(6, 18), [0, 0, 0, 1, 1, 1])
    assert main([*small, "--train_data_dir", "odd.npz"]) == 2
    assert "divisible by 4" in capsys.readouterr().err


def test_a_network_that_is_no_classifier_judges_nothing(tmp_path):
    """Saved without a way to draw images, which is how classifiers are saved too."""
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    models.save(DDPMUNet(**small, image_size=8, channels=1), tmp_path / "unet")
    source = SimpleNamespace(sample_shape=(1, 8, 8), num_classes=10)
    for given in (None, source):
        with pytest.raises(FileFormatError, match="unet: is a model that draws images; --judge takes a classifier's"):
            load_judge(tmp_path / "unet", given)
