"""Every file of configs/ runs on the command that it names, and those of publications have their numbers."""

import json
from pathlib import Path

import pytest
import torch

from pecker_fast import NoiseSchedule, models
from pecker_fast.cli import main
from pecker_fast.config_file import read
from pecker_fast.models import DDPMUNet
from pecker_fast.parser import build_parser

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))

SFD = {
    "forget": [0],
    "override": [1],
    "generator_lr": 1e-5,
    "clip_value": 1.0,
    "betas": [0.0, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "sid_alpha": 1.2,
    "t_init": 440,
    "t_min": 38,
    "t_max": 712,
    "retain_weight": 1.0,
    "forget_weight": 0.01,
    "max_train_steps": 50000,
}
"""What every published setting of Score Forgetting Distillation has."""
DIFFER = {"cifar10": {"batch_size": 128, "fake_score_lr": 1e-5}, "stl10": {"batch_size": 64, "fake_score_lr": 3e-5}}


def _parse(path):
    return build_parser().parse_args([*read(path)["command"].split(), "--config", str(path)])


def test_all_are_there():
    names = {path.stem for path in FILES}
    for data in ("cifar10", "stl10"):
        assert {f"{data}_{name}" for name in ("pecker", "random", "sfd", "sfd_stage1", "sfd_stage2")} <= names
    assert {f"digits_{name}" for name in ("pecker", "random", "sfd", "pretrain")} <= names
    assert {f"{data}_{name}" for data in ("cifar10", "stl10", "digits") for name in ("salun", "sa")} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_parses_and_says_how_to_run_it(path):
    options, text = _parse(path), path.read_text()
    assert options.output_dir == Path("runs", *path.stem.split("_", 1)) or path.stem == "digits_pretrain"
    comment = text[: text.index("\ncommand: ")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert comment.endswith(f"pecker-fast {options.command} --config configs/{path.name}")
    assert "published" in comment or "Numbers: " in comment
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    ddim = {"kind": "ddim", "steps": 2, "schedule": NoiseSchedule.linear().to_dict(), "sample_shape": [3, 32, 32]}
    folder = tmp_path_factory.mktemp("model") / "teacher"
    models.save(DDPMUNet(**small), folder, ddim)
    return str(folder)


def _resolved(name, teacher, capsys):
    """What the command would run with."""
    path = FOLDER / f"{name}.yaml"
    more = ("--pretrained_model_name_or_path", teacher, "--dry_run", "--json")
    assert main([read(path)["command"], "--config", str(path), *more]) == 0
    return json.loads(capsys.readouterr().out)["settings"]


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_published_distillations_have_their_numbers(data, teacher, capsys):
    expected = SFD | DIFFER[data] | {"forget_batch_size": DIFFER[data]["batch_size"]}
    kinds = {"sfd": ("dense", "none"), "pecker": ("saliency", "mass"), "random": ("random", "mass")}
    for kind, (mask, lr_scale) in kinds.items():
        settings = _resolved(f"{data}_{kind}", teacher, capsys)
        assert {key: settings[key] for key in expected} == expected
        assert (settings["mask"]["kind"], settings["mask"]["lr_scale"]) == (mask, lr_scale)
    stage1 = _resolved(f"{data}_sfd_stage1", teacher, capsys)
    same = {key for key in expected if not key.startswith(("forget", "override", "retain", "max_train"))}
    assert {key: stage1["config"][key] for key in same} == {key: expected[key] for key in same} | {
        "fake_score_lr": 3e-5
    }
    stage2 = _parse(FOLDER / f"{data}_sfd_stage2.yaml")
    assert (stage2.fake_score_lr, stage2.generator_lr, stage2.max_train_steps) == (3e-5, 1e-5, 50000)
    assert stage2.init == _parse(FOLDER / f"{data}_sfd_stage1.yaml").output_dir


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_selective_amnesia_has_its_numbers(data, teacher, capsys):
    settings = _resolved(f"{data}_sa", teacher, capsys)
    expected = {
        "method": "selective_amnesia",
        "max_train_steps": 20000,
        "batch_size": DIFFER[data]["batch_size"],
        "learning_rate": 1e-4,
        "betas": [0.9, 0.999],
        "max_grad_norm": 1.0,
        "ema_decay": 0.9999,
        "ewc_weight": 10.0,
        "fisher_samples": 500,
        "class_dropout": 0.0,
    }
    assert {key: settings[key] for key in expected} == expected
    assert (
        settings["retain_weight"] == settings["forget_weight"] == 3 * 32 * 32
    )  # gamma is 1: both are sums over pixels


def test_salun_has_its_numbers(capsys, tmp_path):
    ddim = {"kind": "ddim", "steps": 2, "schedule": NoiseSchedule.linear().to_dict(), "sample_shape": [1, 8, 8]}
    models.save(DDPMUNet.digits(4), tmp_path / "teacher", ddim)
    settings = _resolved("digits_salun", str(tmp_path / "teacher"), capsys)
    assert settings["method"] == "random_label"
    assert (settings["max_train_steps"], settings["learning_rate"], settings["retain_weight"]) == (1000, 1e-4, 3.072)
    mask = {"kind": "saliency", "density": 0.5, "block": "element", "scope": "global", "lr_scale": "none"}
    assert {key: settings["mask"][key] for key in mask} == mask
    salun = read(FOLDER / "cifar10_salun.yaml")
    digits = read(FOLDER / "digits_salun.yaml")
    own = {"forget_class", "override_class", "pretrained_model_name_or_path", "output_dir"}
    missing = {"train_data_dir", "null_class", "class_dropout"}
    assert {key for key in salun if salun[key] != digits.get(key)} == own | missing


def test_the_control_differs_from_pecker_in_the_choice_alone():
    for data in ("cifar10", "stl10", "digits"):
        chosen, random = (read(FOLDER / f"{data}_{kind}.yaml") for kind in ("pecker", "random"))
        looking = {"mask", "output_dir", "mask_scope", "mask_accumulate", "mask_batches", "mask_batch_size", "saliency"}
        assert {key for key in chosen if chosen[key] != random.get(key)} == looking
        assert random.keys() <= chosen.keys()
