"""Flags of presets, switches and masks: each reaches the setting that it is named for."""

import json

import pytest
from test_cli import DDIM, _error, _one_thread, _tiny, here, teacher  # noqa: F401

from pecker_fast import BlockMask, DistillConfig, NoiseSchedule, models
from pecker_fast.cli import main
from pecker_fast.config import SWITCHES


def settings(capsys, teacher, *more):  # noqa: F811
    source = ("--pretrained_model_name_or_path", str(teacher), "--forget_class", "3", "--output_dir", "out")
    assert main(["unlearn", *source, "--dry_run", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["settings"]


@pytest.mark.parametrize("preset", ["published", "exact", "fast"])
def test_a_preset_is_the_configs(preset, teacher, capsys):  # noqa: F811
    found = settings(capsys, teacher, "--preset", preset)
    config = DistillConfig(preset=preset, forget=(3,), num_classes=10, sample_shape=(1, 8, 8)).to_dict()
    names = ("preset", "forget_batch_size", *SWITCHES)
    assert [found[name] for name in names] == [config[name] for name in names]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_by_name(switch, teacher, capsys):  # noqa: F811
    usual = settings(capsys, teacher)
    changed = settings(capsys, teacher, f"--{switch.replace('_', '-')}", "off" if usual[switch] else "on")
    assert [name for name in usual if usual[name] != changed[name]] == [switch]


def test_masks(teacher, capsys):  # noqa: F811
    usual = settings(capsys, teacher)
    assert usual["fake_score_mask"] is None and settings(capsys, teacher, "--fake_score_mask", "dense") == usual
    assert settings(capsys, teacher, "--fake_score_mask", "same")["fake_score_mask"] == "same"
    given = ("--saliency", "forget_specific", "--saliency_warmup", "3", "--mask_lr_scale_max", "2.5")
    mask = settings(capsys, teacher, *given)["mask"]
    changes = {"saliency": "forget_specific", "saliency_warmup": 3, "lr_scale_max": 2.5}
    assert mask == usual["mask"] | changes
    given = ("--mask_region", "decoder", "--mask_norms", "off", "--mask_budget", "flops", "--mask_rank", "flop")
    changes = {"region": "decoder", "norms": False, "budget": "flops", "rank": "flop"}
    assert settings(capsys, teacher, *given)["mask"] == usual["mask"] | changes
    assert settings(capsys, teacher, "--mask_region", "up.0.,conv_out.")["mask"]["region"] == ["up.0.", "conv_out."]


def test_clipping_can_be_turned_off(teacher, capsys):  # noqa: F811
    given = ((), ("--clip_value", "0.5"), ("--clip_value", "0"))
    found = [settings(capsys, teacher, *more)["clip_value"] for more in given]
    assert found == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--clip_value -1", "DistillConfig.clip_value: expected a positive number"),
        ("--merge_batches yes", "expected on or off, got 'yes'"),
        ("--preset faster", "invalid choice: 'faster'"),
        ("--fake_score_mask sparse", "invalid choice: 'sparse'"),
        ("--saliency_warmup -1", "MaskConfig.saliency_warmup: expected an integer >= 0"),
        ("--mask_region attic", "expected all, encoder, middle, decoder, or prefixes"),
        ("--mask_norms maybe", "expected on or off"),
        ("--mask_lr_scale_max 0", "expected a positive number"),
    ],
)
def test_values_that_make_no_sense(more, text, here, teacher, capsys):  # noqa: F811
    source = ("--pretrained_model_name_or_path", str(teacher), "--forget_class", "3", "--output_dir", "out")
    assert main(["unlearn", *source, *more.split()]) == 2
    assert text in _error(capsys, "unlearn")


TOO_LATE = ("--t_max", "5000", "--t_init", "1")


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("command", "more", "code", "text"),
    [
        ("unlearn", TOO_LATE, 2, "t_max=5000 reach timestep 4999, but the schedule has 1000"),
        (
            "unlearn",
            ("--t_init", "1000"),
            2,
            "t_init=1000 and t_max=712 reach timestep 1000, but the schedule has 1000",
        ),
        ("distill", TOO_LATE, 2, "t_max=5000 reach timestep 4999, but the schedule has 1000"),
        ("mask", (), 2, "t_init=440 and t_max=712 reach timestep 711, but the schedule has 500"),
        ("unlearn", ("--mask_path", "wide"), 3, "wide: does not fit teacher: the mask was not made for this DDPMUNet"),
        ("unlearn", ("--mask_path", "none"), 3, "none: does not fit teacher: the mask has no active block"),
    ],
)
def test_a_dry_run_refuses_what_the_run_does(command, more, code, text, dry, tmp_path, monkeypatch, teacher, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    if command == "mask":  # which has no flags of timesteps
        models.save(_tiny(), teacher, {**DDIM, "schedule": NoiseSchedule.linear(500).to_dict()}, overwrite=True)
    BlockMask.random(_tiny(width=8), 0.2).save(tmp_path / "wide")
    empty = BlockMask.random(_tiny(), 0.2)
    (empty - empty).save(tmp_path / "none")
    output = "--output_file" if command == "mask" else "--output_dir"
    classes = () if command == "distill" else ("--forget_class", "3")
    source = ("--pretrained_model_name_or_path", "teacher", output, "out", *classes)
    assert main([command, *source, *more, *dry]) == code
    assert text in _error(capsys, command)
    assert not (tmp_path / "out").exists()


def test_every_saliency_unlearns(here, teacher):  # noqa: F811
    source = ("--pretrained_model_name_or_path", str(teacher), "--forget_class", "3", "--quiet", "--block", "row")
    quick = "--max_train_steps 1 --train_batch_size 4 --mask_batches 1 --t_init 500 --saliency_warmup 1".split()
    for saliency in ("distillation", "forget_specific"):
        more = ("--saliency", saliency, "--fake_score_mask", "same", "--preset", "fast", "--output_dir", saliency)
        assert main(["unlearn", *source, *quick, *more]) == 0


def test_doctor_counts_presets_and_switches(here, teacher, capsys):  # noqa: F811
    def count(*more):
        arguments = ["doctor", "--flops", "--model", str(teacher), "--mask_density", "0.3", "--block", "row"]
        assert main([*arguments, "--device", "cpu", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["flops"]

    exact = count("--preset", "exact")
    fast = count("--preset", "fast", "--fake_score_mask", "same")
    assert fast["total"] < exact["total"] and fast["generator"]["forward"] < exact["generator"]["forward"]
    assert fast["forget_batch_size"] == 16 and fast["switches"]["reuse_generator_forward"] is False
    fewer, all_of_it = (found["fake_score"] for found in (fast, exact))
    assert fewer["weight_gradient"] / fewer["forward"] < 0.7 * all_of_it["weight_gradient"] / all_of_it["forward"]
    apart = count("--merge_batches", "off", "--reuse_generator_forward", "on")
    assert apart["generator"]["forward"] < exact["generator"]["forward"] and not apart["switches"]["merge_batches"]
    assert main(["doctor", "--skip_frozen", "off"]) == 2
    assert "--skip_frozen says what --flops counts" in _error(capsys, "doctor")


def test_stage_one_takes_switches_too(here, teacher, capsys):  # noqa: F811
    arguments = [
        "distill",
        "--pretrained_model_name_or_path",
        str(teacher),
        "--output_dir",
        "out",
        "--dry_run",
        "--json",
    ]
    assert main([*arguments, "--preset", "fast", "--stop_gradient", "on"]) == 0
    values = json.loads(capsys.readouterr().out)
    found = values["settings"]["config"]
    assert (found["forget"], found["mask"]["kind"], found["stop_gradient"]) == ([], "dense", True)
    assert "out/fake_score" in values["would_write"] and not list(here.iterdir())
