"""Classes in commands: by name wherever they are asked for, told in every result, and compared where two meet."""

import json
import warnings
from pathlib import Path

import image_sets
import numpy as np
import pytest
import torch
from test_distiller import SCHEDULE

from pecker_fast import BlockMask, models
from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.classes import Classes
from pecker_fast.cli import main
from pecker_fast.commands.classes import Chosen, chosen
from pecker_fast.commands.comparing import load_task
from pecker_fast.commands.source import distill_config, load_source
from pecker_fast.data import load_dataset
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.parser import build_parser

NAMES = ("cat", "big dog", "cow", "emu")
OTHER = ("cat", "cow", "big dog", "emu")
DDIM = {"kind": "ddim", "steps": 2, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 8, 8]}
TINY = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
TINY |= {"image_size": 8, "channels": 1}
QUICK = ("--max_train_steps", "1", "--train_batch_size", "4", "--forget_batch_size", "4", "--t_init", "500", "--quiet")
RANDOM = ("--mask", "random")


def network(folder, names=NAMES, unseen=(), judge=False):
    torch.manual_seed(0)
    model = DigitsClassifier(width=4, num_classes=4) if judge else DDPMUNet(**TINY, num_classes=4)
    Classes(4, names, unseen).put_on(model)
    models.save(model, folder, None if judge else DDIM, overwrite=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a teacher, a judge and images, all of the same classes."""
    monkeypatch.chdir(tmp_path)
    network("teacher")
    network("judge", judge=True)
    pictures("data.npz")
    return tmp_path


def pictures(file, names=NAMES, labels=None):
    labels = np.arange(16) % 4 if labels is None else labels
    image_sets.npz(Path(file), image_sets.random_pixels(len(labels), 8, 1), labels, names)


def run(capsys, *arguments):
    """What it prints as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """What it says on stderr."""
    assert main([*map(str, arguments)]) in (2, 3)
    return capsys.readouterr().err


def unlearn(*more, source="teacher", mask=RANDOM, out="out"):
    return ("unlearn", "--pretrained_model_name_or_path", source, *more, *QUICK, *mask, "--output_dir", out)


EVALUATED = ("--judge", "judge", "--train_data_dir", "data.npz", "--num", "4", "--quiet")

# -- names in, names out ---------------------------------------------------------------------------


def test_names_are_taken_and_told_from_the_first_command_to_the_last(here, capsys):
    asked = ("--forget_class", "big dog", "--override_class", "cow")
    values = run(capsys, *unlearn(*asked))
    assert (values["forget_class"], values["forget_class_names"]) == ([1], ["big dog"])
    config = read_json("out/distill_config.json")
    assert (config["forget"], config["override"], config["retain"]) == ([1], [2], None)
    assert read_json("out/model/config.json")["class_names"] == list(NAMES)
    assert "forget_class: [big dog]" in (here / "out" / "config.yaml").read_text()

    drawn = run(capsys, "sample", "--model", "out/model", "--class", "big dog", "0", "--num", "2", "--output", "d.npz")
    assert (drawn["class"], drawn["class_names"]) == ([1, 0], ["big dog", "cat"])
    assert load_dataset("d.npz").class_names == NAMES
    judged = run(capsys, "evaluate", "--model", "out/model", "--forget_class", "big dog", *EVALUATED)
    assert (judged["forget_class"], judged["forget_class_names"], judged["images"]) == ([1], ["big dog"], 16)
    run(capsys, "evaluate", "--images", "d.npz", "--forget_class", "big dog", *EVALUATED)

    fields = ("apply", "--model", "teacher", "--delta", "out/delta", "--output_dir", "applied")
    run(capsys, "delta", *fields)
    assert models.classes_in(models.load_config("applied")) == Classes(4, NAMES)
    info = run(capsys, "delta", "info", "--delta", "out/delta")["deltas"]["out/delta"]
    assert info["name"] == "forget 1 (big dog)"


def test_people_read_the_name(here, capsys):
    assert main([flag for flag in unlearn("--forget_class", "1") if flag != "--quiet"]) == 0
    assert "Forgot class 1 (big dog) in 1 steps" in capsys.readouterr().out
    shown = [flag for flag in EVALUATED if flag != "--quiet"]
    assert main(["evaluate", "--model", "out/model", "--forget_class", "1", *shown]) == 0
    assert "class 1 (big dog)" in capsys.readouterr().out
    assert main(["sample", "--model", "out/model", "--class", "3", "--num", "1", "--output", "e.npz"]) == 0
    assert "1 images of class 3 (emu)" in capsys.readouterr().out
    baseline = ("unlearn", "--pretrained_model_name_or_path", "teacher", "--method", "esd", "--forget_class", "cow")
    assert main([*baseline, "--max_train_steps", "1", "--train_batch_size", "2", "--output_dir", "esd"]) == 0
    assert "Unlearned class 2 (cow) by esd" in capsys.readouterr().out
    mask = ("mask", "--pretrained_model_name_or_path", "teacher", "--forget_class", "emu", "--mask", "random")
    assert main([*mask, "--output_file", "m.safetensors"]) == 0
    assert "For class 3 (emu)." in capsys.readouterr().out


def test_a_yaml_file_has_names_and_numbers(here, capsys):
    (here / "run.yaml").write_text("forget_class: [big dog, 0]\noverride_class: emu\n")
    plan = run(capsys, *unlearn("--config", "run.yaml"), "--dry_run")["settings"]
    assert (plan["forget"], plan["forget_class_names"], plan["override"]) == ([1, 0], ["big dog", "cat"], [3])
    assert run(capsys, *unlearn("--config", "run.yaml"))["forget_class"] == [1, 0]
    again = run(capsys, "unlearn", "--config", "out/config.yaml", "--output_dir", "again")
    assert again["forget_class"] == [1, 0]


def test_requests_and_the_distilled_folder_name_them(here, capsys):
    steps = ("--max_train_steps", "1", "--train_batch_size", "4", "--t_init", "500", "--quiet")
    run(capsys, "distill", "--pretrained_model_name_or_path", "teacher", *steps, "--output_dir", "distilled")
    for name in ("model", "fake_score"):
        assert models.classes_in(models.load_config(f"distilled/{name}")) == Classes(4, NAMES)
    run(capsys, *unlearn("--init", "distilled", "--forget_class", "cow", out="cow"))
    assert read_json("cow/request.json")["forget_names"] == ["cow"]
    second = unlearn("--init", "distilled", "--earlier", "cow", "--forget_class", "emu", out="emu")
    assert run(capsys, *second)["forget_class_names"] == ["emu"]
    again = unlearn("--init", "distilled", "--earlier", "cow", "--forget_class", "cow", out="x")
    assert "class 2 is forgotten already" in refused(capsys, *again)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("unlearn", ("--forget_class", "dog")),
        ("unlearn", ("--forget_class", "cat", "--override_class", "dog")),
        ("unlearn", ("--forget_class", "cat", "--retain_class", "dog")),
        ("unlearn", ("--method", "esd", "--forget_class", "dog")),
        ("mask", ("--forget_class", "dog", "--output_file", "m.safetensors")),
        ("sample", ("--class", "dog", "--output", "d.npz")),
        ("evaluate", ("--forget_class", "dog", "--judge", "judge", "--train_data_dir", "data.npz")),
        ("compare", ("--forget_class", "dog", "--judge", "judge", "--train_data_dir", "data.npz")),
        (
            "compare",
            ("--tuning_class", "dog", "--judge", "judge", "--train_data_dir", "data.npz", "--forget_class", "1"),
        ),
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(here, capsys, command, flags):
    subject = "--model" if command in ("sample", "evaluate") else "--pretrained_model_name_or_path"
    where = () if command in ("sample", "evaluate", "mask") else ("--output_dir", "out")
    found = refused(capsys, command, subject, "teacher", *flags, *where)
    assert "unknown class 'dog'; the model has classes 0 to 3: cat, big dog, cow, emu; did you mean" in found
    assert not (here / "out").exists()


def test_the_digits_have_the_names_of_their_numbers(capsys):
    assert run(capsys, "demo", "--forget_class", "3", "--dry_run")["plan"]["runs"]["masked"]["forget"] == [3]
    assert "unknown class 'three'" in refused(capsys, "demo", "--forget_class", "three", "--dry_run")
    assert run(capsys, "compare", "--forget_class", "7", "--dry_run")["settings"]["forget_class_names"] == ["7"]


# -- two that meet ---------------------------------------------------------------------------------

BASELINE = ("--method", "fine_tune", "--max_train_steps", "1", "--train_batch_size", "2", "--quiet")


def meetings():
    """Name -> arguments of a command in which "x", of other classes, meets the rest."""
    teacher = ("--pretrained_model_name_or_path", "teacher")
    compared = ("compare", *teacher, "--output_dir", "out", "--forget_class", "1")
    found = ("--forget_class", "1", "--quiet")
    return {
        "judge, model": ("evaluate", "--model", "teacher", "--judge", "x", *found),
        "judge, data": ("evaluate", "--model", "teacher", "--judge", "judge", "--train_data_dir", "x.npz", *found),
        "judge, images": ("evaluate", "--images", "x.npz", "--judge", "judge", "--train_data_dir", "data.npz", *found),
        "judge of a stop": unlearn("--forget_class", "1", "--judge", "x", "--stop_on", "ua>=0.5"),
        "data of a mask": ("mask", *teacher, "--forget_class", "1", "--train_data_dir", "x.npz", "--output_file", "m"),
        "data of a baseline": ("unlearn", *teacher, "--forget_class", "1", *BASELINE, "--train_data_dir", "x.npz")
        + ("--output_dir", "out"),
        "judge of a comparison": (*compared, "--judge", "x", "--train_data_dir", "split"),
        "data of a comparison": (*compared, "--judge", "judge", "--train_data_dir", "split of x"),
        "distilled": unlearn("--init", "distilled", "--forget_class", "1"),
        "delta": ("delta", "apply", "--model", "teacher", "--delta", "delta", "--output_dir", "out"),
        "original": ("delta", "extract", "--before", "teacher", "--after", "x teacher", "--mask_path", "m.safetensors")
        + ("--output_dir", "out"),
    }


@pytest.mark.parametrize("meeting", meetings())
def test_other_classes_are_refused_wherever_two_meet(here, capsys, meeting):
    network("x", OTHER, judge=True)
    network("x teacher", OTHER)
    pictures("x.npz", OTHER)
    for folder, names in (("split", NAMES), ("split of x", OTHER)):
        for part in ("train", "test"):
            pictures(f"{folder}/{part}.npz", names)
    if meeting in ("distilled", "delta"):
        steps = ("--max_train_steps", "1", "--train_batch_size", "4", "--t_init", "500", "--quiet")
        assert main(["distill", "--pretrained_model_name_or_path", "teacher", *steps, "--output_dir", "distilled"]) == 0
        assert main([*unlearn("--forget_class", "1", out="first")]) == 0
        (here / "first" / "delta").rename(here / "delta")
        network("teacher", OTHER)  # the same weights
    if meeting == "original":
        BlockMask.random(models.load("teacher"), 0.5).save("m.safetensors")
    before = sorted(here.iterdir())
    message = refused(capsys, *meetings()[meeting])
    first, second = ("big dog", "cow") if "'cow', in" not in message else ("cow", "big dog")
    assert f"class 1 is {first!r}, in" in message and f"it is {second!r}" in message
    assert "cat, big dog, cow, emu" in message and "cat, cow, big dog, emu" in message
    assert sorted(here.iterdir()) == before, "nothing is written"


def test_folders_without_names_are_compared_by_number_and_that_is_said_once(here, capsys):
    config = read_json("teacher/config.json")
    del config["class_names"]
    write_json("teacher/config.json", config)
    for command in (
        ("evaluate", "--model", "teacher", "--forget_class", "big dog", *EVALUATED),
        unlearn("--forget_class", "1", "--stop_on", "ua>=0.01", "--stop_every", "1", "--judge", "judge"),
    ):
        assert main([*command]) == 0
        told = capsys.readouterr().err
        assert told.count("warning: no names of classes: ") == 1 and "only the number of classes was compared" in told
    assert "whose names are not known" in refused(capsys, *unlearn("--forget_class", "cat", out="b"))


# -- classes without an image ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        (np.arange(40) % 4 + 1, None, "1 of 5 classes have none: 0;"),
        ((np.arange(40) % 4) * 2, None, "3 of 7 classes have none: 1, 3, 5;"),
        (np.where(np.arange(40) < 30, np.arange(40) % 3, 255), None, "252 of 256 classes have none: 3, 4, 5"),
        (np.arange(40) % 3, NAMES, "1 of 4 classes have none: 3 (emu);"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "judge"])
def test_classes_without_an_image_are_told(tmp_path, capsys, command, labels, names, told):
    pictures(tmp_path / "d.npz", names, labels)
    values = (command, "--train_data_dir", tmp_path / "d.npz", "--output_dir", tmp_path / "out", "--dry_run", "--json")
    assert main([*map(str, values)]) == 0
    out, err = capsys.readouterr()
    unseen = [label for label in range(max(labels) + 1 if names is None else 4) if label not in labels]
    assert json.loads(out)["settings"]["classes_without_images"] == unseen
    assert err.count("warning: not every class has an image") == 1 and told in err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(8) - 1, "label -1 of image 0 is out of range; expected 0 to 99999; leave out images that have no"),
        (np.arange(8.0), "got labels (8,) float64"),
        (np.eye(8, dtype=np.uint8), "got labels (8, 8) uint8 for 8 images; rows of a one-hot table become numbers"),
        (np.arange(8) % 2 == 0, "got labels.npy of (8,) bool"),
    ],
)
def test_labels_that_are_no_numbers_of_classes(tmp_path, capsys, labels, message):
    np.savez(tmp_path / "d.npz", images=np.zeros((8, 8, 8, 3), np.uint8), labels=labels)
    assert message in refused(
        capsys, "pretrain", "--train_data_dir", tmp_path / "d.npz", "--output_dir", tmp_path / "o"
    )


@pytest.mark.parametrize(
    "command",
    [
        unlearn("--forget_class", "cat"),
        unlearn("--forget_class", "1", "--override_class", "0"),
        unlearn("--forget_class", "1", "--retain_class", "0", "2"),
        unlearn("--forget_class", "0", "--method", "esd", mask=()),
        ("mask", "--pretrained_model_name_or_path", "gap", "--forget_class", "0"),
        ("compare", "--pretrained_model_name_or_path", "gap", "--judge", "judge", "--train_data_dir", "data.npz")
        + ("--forget_class", "0", "--output_dir", "out"),
        (
            "evaluate",
            "--model",
            "teacher",
            "--forget_class",
            "0",
            "--judge",
            "gap judge",
            "--train_data_dir",
            "data.npz",
        ),
    ],
)
def test_what_was_never_seen_cannot_be_forgotten_or_kept(here, capsys, command):
    network("gap", unseen=(0,))
    network("gap judge", unseen=(0,), judge=True)
    arguments = [
        "gap" if one == "teacher" and command[0] != "evaluate" else one
        for one in command
        if not (command[0] == "unlearn" and "esd" in command and one in ("--t_init", "500"))
    ]
    found = refused(capsys, *arguments)
    assert "class 0 (cat) has no image among those of its training, as 1 of 4 classes have none: 0 (cat)" in found


def test_a_mask_by_images_of_other_classes_alone_is_refused(here, capsys):
    pictures("some.npz", labels=np.arange(16) % 3)
    mask = ("mask", "--pretrained_model_name_or_path", "teacher", "--train_data_dir", "some.npz")
    assert "--forget_class: class 3 (emu) has no image in some.npz" in refused(capsys, *mask, "--forget_class", "emu")


def test_nothing_counts_on_a_class_that_was_never_seen(here, capsys):
    """Not as retained in a training, not in an evaluation, and not as what takes another one's place."""
    network("gap", unseen=(0,))
    options = build_parser().parse_args([*unlearn("--forget_class", "3", source="gap")])
    source = load_source(options.pretrained_model_name_or_path, "cpu")
    assert distill_config(options, source).retained == (1, 2)
    assert chosen(options, source.classes) == Chosen((3,), None, None)
    judged = run(capsys, "evaluate", "--model", "gap", "--forget_class", "3", *EVALUATED)
    assert judged["images"] == 12 and judged["classes_without_images"] == [0]
    esd = unlearn("--forget_class", "3", "--method", "esd", source="gap", mask=())
    plan = run(capsys, *(one for one in esd if one not in ("--t_init", "500")), "--dry_run")["settings"]
    assert plan["retain"] == [1, 2]


def test_a_model_that_never_knew_a_class_can_be_evaluated_where_the_judge_does(here, capsys):
    network("gap", unseen=(0,))
    values = run(capsys, "evaluate", "--model", "gap", "--forget_class", "cat", *EVALUATED)
    assert values["images"] == 16 and values["forget_class"] == [0]


def test_classes_to_retain_are_what_is_kept_and_judged(here, capsys):
    asked = ("--forget_class", "cat", "--retain_class", "cow", "emu")
    run(capsys, *unlearn(*asked))
    assert read_json("out/distill_config.json")["retain"] == [2, 3]
    values = run(capsys, "evaluate", "--model", "out/model", *asked, *EVALUATED)
    assert values["images"] == 12 and values["retain_class"] == [2, 3]


# -- comparisons -----------------------------------------------------------------------------------


def test_a_comparison_does_without_what_was_never_seen(here):
    network("gap", unseen=(0,))
    for part in ("train", "test"):
        pictures(f"split/{part}.npz")
    flags = ("--judge", "judge", "--train_data_dir", "split", "--output_dir", "out")
    options = build_parser().parse_args(["compare", "--pretrained_model_name_or_path", "gap", *flags])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = load_task(options)
    assert task.classes == Classes(4, NAMES, (0,))
    assert task.retained((3,)) == (1, 2) and task.overrides((3,)) == (1,)
