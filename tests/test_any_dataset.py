"""Data sets that the repository has never seen run through every command, with no line of code for them."""

import json

import image_sets
import numpy as np
import pytest
import torch

from pecker_fast import models
from pecker_fast.cli import main
from pecker_fast.commands.dataset import load_images
from pecker_fast.commands.source import load_source
from pecker_fast.data import load_dataset
from pecker_fast.errors import FileFormatError
from pecker_fast.models import DDPMUNet
from pecker_fast.pretrain import train_denoiser
from pecker_fast.schedule import NoiseSchedule

NAMES = ("bar", "disc", "ring")
SMALL = ("--width", "4", "--max_train_steps", "2", "--train_batch_size", "4", "--quiet")


def _shapes(count, size=16, seed=0):
    """Coloured bars, discs and rings somewhere on a dark ground: (N, 3, H, W) uint8 and labels."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.sort(np.arange(count) % len(NAMES))
    pixels = np.full((count, 3, size, size), 20, np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        cy, cx = draw.uniform(0.4, 0.6, 2) * size
        r = np.hypot(y - cy, x - cx) / size
        shape = (abs(y - cy) < size / 8, r < 0.3, (r > 0.25) & (r < 0.4))[label]
        image[:, shape] = draw.integers(100, 256, (3, 1))
    return pixels, labels


@pytest.fixture(scope="module", params=["npz", "folder"])
def shapes(request, tmp_path_factory):
    """The same shapes in one of two forms."""
    root = tmp_path_factory.mktemp(request.param)
    pixels, labels = _shapes(18)
    if request.param == "npz":
        image_sets.npz(root / "shapes.npz", pixels, labels, NAMES)
    else:
        image_sets.folder(root / "shapes", pixels, labels, NAMES)
    return root / ("shapes.npz" if request.param == "npz" else "shapes")


def _run(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_from_images_to_a_judged_erasure(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("--train_data_dir", shapes)
    trained = _run(capsys, "pretrain", *data, *SMALL, "--output_dir", "teacher", "--class_dropout", "0.1")
    assert trained["classes"] == list(NAMES)
    config = models.load_config("teacher")
    assert config["generation"]["sample_shape"] == [3, 16, 16]
    assert config["architecture"]["channel_mult"] == [1, 2, 2]
    assert config["architecture"]["attention_resolutions"] == [8]

    judged = _run(capsys, "judge", *data, *SMALL, "--output_dir", "judge", "--augment")
    assert json.loads((tmp_path / "judge" / "judge.json").read_text())["held_out_images"] == 3
    assert judged["held_out_accuracy_ci95"][0] <= judged["held_out_accuracy"] <= judged["held_out_accuracy_ci95"][1]

    source = ("--pretrained_model_name_or_path", "teacher", "--forget_class", "1")
    few = ("--forget_batch_size", "2", "--mask_batches", "1", "--t_init", "500")
    _run(capsys, "mask", *source, *few[:4], *data, "--output_file", "mask.safetensors", "--quiet")
    steps = ("--max_train_steps", "2", "--train_batch_size", "4", "--quiet")
    _run(
        capsys, "unlearn", *source, *few[:2], *few[4:], *steps, "--mask_path", "mask.safetensors", "--output_dir", "out"
    )

    found = ("--forget_class", "1", "--judge", "judge", *data, "--quiet")
    values = _run(capsys, "evaluate", "--model", "out/model", "--num", "4", *found)
    assert values["images"] == 12
    low, high = values["unlearning_accuracy_ci95"]
    assert 0 <= low <= values["unlearning_accuracy"] <= high <= 1
    drawn = ("--class", "0", "1", "2", "--num", "4", "--output", "drawn.npz", "--quiet")
    _run(capsys, "sample", "--model", "out/model", *drawn)
    again = _run(capsys, "evaluate", "--images", "drawn.npz", *found)
    assert again["retain_accuracy"] == pytest.approx(values["retain_accuracy"], abs=0.2)
    assert again["frechet_distance"] == pytest.approx(values["frechet_distance"], rel=0.05)
    assert load_dataset("drawn.npz").images.shape == (12, 3, 16, 16)  # what is drawn is a data set too


def test_real_images_have_no_distance_to_themselves(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("--train_data_dir", shapes)
    _run(capsys, "judge", *data, *SMALL, "--output_dir", "judge")
    pixels, labels = _shapes(18)
    image_sets.npz(tmp_path / "real.npz", pixels, labels)
    found = ("--forget_class", "1", "--judge", "judge", *data, "--quiet")
    assert _run(capsys, "evaluate", "--images", "real.npz", *found)["frechet_distance"] == pytest.approx(0, abs=1e-6)
    image_sets.npz(tmp_path / "noise.npz", image_sets.random_pixels(18, 16), labels)
    assert _run(capsys, "evaluate", "--images", "noise.npz", *found)["frechet_distance"] > 1e-3


def test_evaluate_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels, labels = _shapes(18)
    image_sets.npz(tmp_path / "shapes.npz", pixels, labels, NAMES)
    image_sets.npz(tmp_path / "two.npz", pixels[:12], labels[:12], NAMES[:2])
    image_sets.npz(tmp_path / "small.npz", pixels[:, :, ::2, ::2], labels, NAMES)
    assert main(["judge", "--train_data_dir", "shapes.npz", *SMALL, "--output_dir", "judge"]) == 0
    tiny = {"num_res_blocks": 1, "attention_resolutions": (), "image_size": 16, "norm_groups": 2, "num_classes": 2}
    schedule = {"steps": 1, "schedule": NoiseSchedule.linear().to_dict(), "sample_shape": [3, 16, 16]}
    models.save(DDPMUNet(width=4, channel_mult=(1,), **tiny), tmp_path / "model", {"kind": "ddim", **schedule})
    images, data, judge = ("--images", "shapes.npz"), ("--train_data_dir", "shapes.npz"), ("--judge", "judge")
    for arguments, code, text in (
        ((*images, *judge), 2, "name them with --train_data_dir"),
        ((*images, *data), 2, "name another with --judge"),
        (
            (*images, *judge, "--train_data_dir", "two.npz"),
            3,
            "two.npz: expected 3 classes, those of the judge judge, got 2",
        ),
        ((*images, *judge, "--train_data_dir", "small.npz"), 2, "the images are 8x8; image_size"),
        (("--images", "small.npz", *judge, *data), 3, "expected images (N, 16, 16, 3), got (N, 8, 8, 3)"),
        (("--model", "model", *judge, *data), 3, "3 classes of (3, 16, 16), got 2 of (3, 16, 16)"),
        (("--model", "model"), 3, "the judge of the digits"),
        ((*images, "--judge", "model", *data), 3, "takes a classifier's folder"),
        ((*images, "--judge", "absent", *data), 3, "no such folder"),
        ((*images, *judge, "--train_data_dir", "absent"), 3, "no such file or folder"),
    ):
        assert main(["evaluate", "--forget_class", "1", *arguments, "--quiet"]) == code
        assert text in capsys.readouterr().err
    with pytest.raises(FileFormatError, match="expected 2 classes, those of the model, got 3"):
        load_images(tmp_path / "shapes.npz", load_source(tmp_path / "model", "cpu"))
    with pytest.raises(ValueError, match="--train_data_dir: needed"):
        load_images(None, load_source(tmp_path / "model", "cpu"))


def test_pretrain_takes_what_the_images_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_sets.cifar10_binary(tmp_path / "cifar", image_sets.random_pixels(6), [0, 1, 2, 3, 4, 5])
    plan = ("--train_data_dir", "cifar", "--output_dir", "out", "--dry_run", "--quiet")
    architecture = {}
    for size in (32, 16, 8):
        values = _run(capsys, "pretrain", *plan, "--resolution", size, "--max_train_samples", "3")
        assert values["settings"]["images"] == 3
        architecture[size] = values["settings"]["architecture"]
    shared = {"width": 16, "num_res_blocks": 1, "channels": 3, "num_classes": 10, "dropout": 0.0, "norm_groups": 8}
    assert architecture == {
        32: {**shared, "image_size": 32, "channel_mult": [1, 2, 2, 2], "attention_resolutions": [16]},
        16: {**shared, "image_size": 16, "channel_mult": [1, 2, 2], "attention_resolutions": [8]},
        8: {**shared, "image_size": 8, "channel_mult": [1, 2], "attention_resolutions": [4]},
    }
    wide = _run(capsys, "pretrain", *plan, "--width", "64", "--num_res_blocks", "2", "--channels", "1")
    assert wide["settings"]["architecture"] == {
        **architecture[32],
        "width": 64,
        "num_res_blocks": 2,
        "channels": 1,
        "norm_groups": 16,
    }
    for arguments, text in (
        (["--split", "test", *plan], "holds no cifar10-binary files of split 'test'"),
        (["--data_format", "npz", *plan], "holds no npz files"),
        (["--resolution", "20", *plan], "must be one of 32, 16, 8, 4"),
        (["--max_train_samples", "3", "--output_dir", "out"], "give --train_data_dir too"),
        (["--resolution", "16", "--output_dir", "out"], "the built-in digits are 8x8"),
        (["--class_dropout", "1", *plan], "expected a number from 0, below 1"),
    ):
        assert main(["pretrain", *arguments]) in (2, 3)
        assert text in capsys.readouterr().err


def test_stl10_trains_a_step(tmp_path):
    image_sets.stl10(tmp_path, image_sets.random_pixels(4, size=96), [0, 3, 9, 3])
    data = load_dataset(tmp_path, image_size=32)
    model = DDPMUNet(width=4, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=2)
    before = model.conv_in.weight.clone()
    train_denoiser(model, data, NoiseSchedule.linear(), steps=1, batch_size=2, progress=False)
    assert not torch.equal(model.conv_in.weight, before)
    assert load_dataset(tmp_path, image_size=48).images.shape == (4, 3, 48, 48)
