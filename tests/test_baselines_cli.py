"""``pecker-fast unlearn --method``: each flag reaches the setting that it is named for, or is refused by name."""

import json

import pytest
import torch
from PIL import Image
from test_cli import _error, _one_thread, _tiny, here, teacher  # noqa: F401

from pecker_fast import BaselineConfig, BlockMask, models, salun_mask_config
from pecker_fast.cli import main
from pecker_fast.commands import dataset, unlearn_baseline
from pecker_fast.commands.source import Source, load_source
from pecker_fast.data import ImageData
from pecker_fast.errors import FileFormatError


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    data = ImageData(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10, tuple("0123456789"))
    monkeypatch.setattr(unlearn_baseline, "load_images", lambda path, source: data)


def unlearn(teacher, method, *more):  # noqa: F811
    source = ("--pretrained_model_name_or_path", str(teacher), "--forget_class", "3", "--device", "cpu")
    return main(["unlearn", "--method", method, *source, "--output_dir", "out", *more])


def settings(capsys, teacher, method, *more):  # noqa: F811
    assert unlearn(teacher, method, "--dry_run", "--json", *more) == 0
    return json.loads(capsys.readouterr().out)["settings"]


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--learning_rate 0.5 --lr_warmup_steps 7", {"learning_rate": 0.5, "warmup_steps": 7}),
        ("--max_grad_norm 0", {"max_grad_norm": None}),
        ("--max_grad_norm 3", {"max_grad_norm": 3.0}),
        ("--null_class on --class_dropout 0.2", {"null_class": True, "class_dropout": 0.2}),
        ("--ewc_weight 3 --fisher_samples 4", {"ewc_weight": 3.0, "fisher_samples": 4}),
        ("--fisher_timesteps 9 --replay_samples 5", {"fisher_timesteps": 9, "replay_samples": 5}),
        ("--num_inference_steps 11 --seed 4", {"sampling_steps": 11, "seed": 4}),
        ("--train_batch_size 6 --forget_batch_size 2", {"batch_size": 6, "forget_batch_size": 2}),
        ("--retain_weight 2 --forget_weight 0.5", {"retain_weight": 2.0, "forget_weight": 0.5}),
        ("--ema_decay 0.9 --seed 0", {"max_train_steps": 500, "ema_decay": 0.9}),
        ("--ema_decay 0.9 --weight_decay 0.1", {"ema_decay": 0.9, "weight_decay": 0.1}),
    ],
)
def test_flags_are_settings(flags, changes, teacher, capsys):  # noqa: F811
    found = settings(capsys, teacher, "selective_amnesia", *flags.split())
    assert found == settings(capsys, teacher, "selective_amnesia") | changes


def test_what_is_not_given_is_the_configs(teacher, capsys):  # noqa: F811
    found = settings(capsys, teacher, "esd", "--negative_guidance", "1", "--override_class", "8")
    model = {"forget": (3,), "override": (8,), "num_classes": 10, "sample_shape": (1, 8, 8), "sampling_steps": 2}
    expected = BaselineConfig(method="esd", negative_guidance=1.0, **model).to_dict()
    assert found == {"max_train_steps": 500, **json.loads(json.dumps(expected))}


def test_other_names_of_distilling(teacher, capsys):  # noqa: F811
    assert settings(capsys, teacher, "pecker") == settings(capsys, teacher, "distill")
    assert settings(capsys, teacher, "sfd") == settings(capsys, teacher, "distill", "--mask", "dense")
    assert unlearn(teacher, "sfd", "--mask", "random") == 2
    assert "--method sfd trains every weight" in _error(capsys, "unlearn")


def test_salun_has_its_mask_unless_flags_say_otherwise(teacher, capsys):  # noqa: F811
    found = settings(capsys, teacher, "salun")
    assert (found["method"], found["mask"]) == ("random_label", salun_mask_config().to_dict())
    found = settings(capsys, teacher, "salun", "--mask", "random", "--mask_density", "0.2", "--null_class", "on")
    assert found["mask"] == salun_mask_config(kind="random", density=0.2).to_dict()
    assert (found["class_dropout"], found["saliency_guidance"]) == (0.1, 2.0)
    assert settings(capsys, teacher, "random_label")["mask"]["kind"] == "dense"


@pytest.mark.parametrize(
    ("method", "flags", "text"),
    [
        ("distill", "--learning_rate 1", "--learning_rate: has no say in --method distill"),
        ("distill", "--train_data_dir x", "--train_data_dir: has no say in --method distill"),
        ("esd", "--generator_lr 1", "--generator_lr: is of --method distill; it has no say in --method esd"),
        ("salun", "--stop_on ua>=0.9", "--stop_on: is of --method distill"),
        ("retrain", "--resume_from_checkpoint latest", "--resume_from_checkpoint: is of --method distill"),
        ("fine_tune", "--preset fast", "--preset: is of --method distill"),
        ("fine_tune", "--forget_weight 1", "--forget_weight: has no say in --method fine_tune"),
        ("fine_tune", "--forget_batch_size 2", "--forget_batch_size: has no say in --method fine_tune without"),
        ("gradient_ascent", "--override_class 1", "--override_class: has no say in --method gradient_ascent"),
        ("salun", "--ewc_weight 1", "--ewc_weight: has no say in --method salun"),
        ("random_label", "--negative_guidance 1", "--negative_guidance: has no say in --method random_label"),
        ("esd", "--class_dropout 0.1", "--class_dropout: has no say in --method esd"),
        ("esd", "--mask_density 0.1", "--mask_density: has no say where every weight trains; give --mask"),
        ("esd", "--mask_path m --block row", "--block: has no say where --mask_path gives the mask"),
        ("retrain", "--mask random", "'retrain' trains every weight, from scratch"),
        ("erase", "", "invalid choice: 'erase'"),
        ("random_label", "--class_dropout 0.1", "class_dropout: 0.1 needs a model that was trained with a null class"),
    ],
)
def test_flags_without_a_say_are_refused(method, flags, text, here, teacher, capsys):  # noqa: F811
    assert unlearn(teacher, method, *flags.split()) == 2
    assert text in _error(capsys, "unlearn")
    assert not list(here.iterdir())


@pytest.mark.parametrize("method", ["salun", "esd", "selective_amnesia", "retrain"])
def test_a_run_leaves_a_model_of_many_steps(method, here, teacher, capsys):  # noqa: F811
    few = "--max_train_steps 2 --train_batch_size 4 --quiet --json".split()
    more = {
        "salun": "--mask_batches 1",
        "selective_amnesia": "--fisher_samples 1 --fisher_timesteps 2 --replay_samples 1",
    }
    assert unlearn(teacher, method, *few, *more.get(method, "").split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["method"], values["step"], values["forget_class"]) == (method, 2, [3])
    share = values["trainable_parameters"] / values["parameters"]
    assert share == pytest.approx(0.5, abs=1e-3) if method == "salun" else share == 1
    config = json.loads((here / "out" / "baseline_config.json").read_text())
    assert BaselineConfig.from_dict(config).sampling_steps == 2
    assert len((here / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert {"model", "delta", "mask.safetensors"} <= {path.name for path in (here / "out").iterdir()}
    assert models.load_config(here / "out" / "model")["generation"]["kind"] == "ddim"


def test_a_given_mask(here, teacher, capsys):  # noqa: F811
    mask = BlockMask.random(_tiny(), 0.3, "row")
    mask.save(here / "mask")
    few = "--max_train_steps 1 --train_batch_size 4 --quiet --mask_path mask".split()
    assert unlearn(teacher, "fine_tune", *few) == 0
    assert BlockMask.load(here / "out" / "mask.safetensors") == mask
    BlockMask.random(_tiny(width=8), 0.3, "row").save(here / "mask")
    assert unlearn(teacher, "fine_tune", *few) == 3
    assert "mask: does not fit" in _error(capsys, "unlearn")


def test_images_by_folder_or_the_digits(tmp_path, monkeypatch, teacher):  # noqa: F811
    source = load_source(teacher, "cpu")
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        Image.new("L", (8, 8), label).save(tmp_path / "images" / str(label) / "a.png")
    assert dataset.load_images(tmp_path / "images", source).labels.tolist() == list(range(10))
    monkeypatch.setattr(dataset, "load_digits", lambda: "digits")
    assert dataset.load_images(None, source) == "digits"
    other = Source(source.model, source.schedule, 7, (3, 16, 16))
    with pytest.raises(ValueError, match="--train_data_dir: needed, because the model draws 7 classes"):
        dataset.load_images(None, other)
    with pytest.raises(FileFormatError, match="expected 7 classes, those of the model, got 10"):
        dataset.load_images(tmp_path / "images", Source(source.model, source.schedule, 7, (1, 8, 8)))
