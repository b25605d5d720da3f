"""What classes are called: their order, their names wherever a model goes, and how they are asked for."""

import image_sets
import numpy as np
import pytest
import torch
from test_distiller import SCHEDULE, config

from pecker_fast import Delta, MaskedDistiller, models
from pecker_fast.baselines import Baseline, BaselineConfig
from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.classes import Classes, check_same
from pecker_fast.data import ImageData, load_dataset
from pecker_fast.data.cifar10 import NAMES as CIFAR10
from pecker_fast.data.files import natural_key
from pecker_fast.data.stl10 import NAMES as STL10
from pecker_fast.errors import FileFormatError
from pecker_fast.evaluation import evaluate_images
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.pretrain import train_classifier, train_denoiser

ANIMALS = Classes(3, ("cat", "big dog", "cow, or ox"))
NUMBERS = tuple(map(str, range(12)))
TINY = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
TINY |= {"image_size": 8, "channels": 1}
DDIM = {"kind": "ddim", "steps": 2, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 8, 8]}


def named(*names, unseen=()):
    return Classes(len(names), names, unseen)


# -- their order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        NUMBERS,
        ("1", "2", "10", "none"),
        ("0_airplane", "1_bird", "2_cat", "10_truck"),
        ("class2", "class10", "class10b"),
        ("02", "3", "010", "011"),
        ("01", "1"),
        ("a", "a1", "a1b", "b"),
        ("9" * 4999, "1" + "0" * 5000),  # longer than Python makes a number of
    ],
)
def test_names_are_sorted_as_numbers_where_they_are_numbers(names):
    assert tuple(sorted(reversed(names), key=natural_key)) == names


@pytest.mark.parametrize("inside", ["", "train"])
def test_folders_are_classes_in_that_order(tmp_path, inside):
    pixels = image_sets.random_pixels(12, 8)
    image_sets.folder(tmp_path / inside, pixels, range(12), NUMBERS)
    data = load_dataset(tmp_path)
    assert data.class_names == NUMBERS
    assert np.array_equal(data.images.numpy(), image_sets.as_images(pixels)) and data.labels.tolist() == [*range(12)]


def test_names_that_a_file_lists_keep_their_order(tmp_path):
    text_order = tuple(sorted(NUMBERS))
    image_sets.npz(tmp_path / "a.npz", image_sets.random_pixels(12, 8), range(12), text_order)
    image_sets.parquet(tmp_path / "b.parquet", image_sets.random_pixels(12, 8), range(12), text_order)
    assert load_dataset(tmp_path / "a.npz").class_names == text_order
    assert load_dataset(tmp_path / "b.parquet").class_names == text_order


# -- how they are asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "asked", "label"),
    [
        (ANIMALS, "big dog", 1),
        (ANIMALS, "cow, or ox", 2),
        (ANIMALS, 0, 0),
        (ANIMALS, "name:cat", 0),
        (ANIMALS, "index:2", 2),
        (named(*NUMBERS), 10, 10),
        (named(*map(str, range(1, 11))), 10, 9),  # a name, and no number of a class
        (named("1", "10", "2"), "name:2", 2),
        (named("1", "10", "2"), "index:2", 2),
        (named("2", "1"), "index:1", 1),
        (named("2", "1"), "name:1", 1),
        (named("00", "01", "02"), 2, 2),
        (named("0_airplane", "1_bird"), 1, 1),
        (named("index:0", "b"), "index:0", 0),
        (named("x", "index:0"), "index:0", 1),
        (named("café", "tea"), "cafe\u0301", 0),  # as macOS writes it
        (Classes(5), 4, 4),
        (named("2d", "3d"), 1, 1),
    ],
)
def test_a_class_by_number_or_name(classes, asked, label):
    assert classes.find("--flag", [asked]) == (label,)


@pytest.mark.parametrize(
    ("classes", "asked", "message"),
    [
        (ANIMALS, "Big dog", "unknown class 'Big dog'.* did you mean 'big dog'"),
        (ANIMALS, "automobile", "unknown class 'automobile'; the model has classes 0 to 2: cat, big dog, cow, or ox"),
        (ANIMALS, 3, "unknown class 3; the model has classes 0 to 2"),
        (ANIMALS, -1, "unknown class -1"),
        (ANIMALS, "index:3", "unknown class 3"),
        (ANIMALS, "name:0", "unknown class '0'"),
        (Classes(5), "cat", "unknown class 'cat'; the model has classes 0 to 4, whose names are not known"),
        (named("0", "1", "10", "2"), 2, r"class 2 \(10\) has this number, class 3 \(2\) this name; say index:2 or"),
        (named(*map(str, range(1, 11))), 2, r"class 2 \(3\) .* class 1 \(2\) .* name:2"),
        (named("01", "02", "03"), 2, r"class 2 \(03\) .* class 1 \(02\) .* say index:2 or name:02"),
        (named("1_airplane", "2_bird", "3_cat"), 1, r"class 1 \(2_bird\) .* name:1_airplane"),
    ],
)
def test_what_no_class_or_two_could_be_meant_by_is_refused(classes, asked, message):
    with pytest.raises(ValueError, match=f"--flag.*{message}"):
        classes.find("--flag", [asked])


# -- two that meet ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (named("a", "b", "c"), named("b", "a", "c"), "class 0 is 'b', in one it is 'a'.*in another order"),
        (named(*CIFAR10), named(*STL10), "class 1 is 'bird', in one it is 'automobile'"),
        (named("cat", "car"), named("cat", "automobile"), "class 1 is 'automobile'.*give it one name"),
        (named("cat", "dog"), named("cat", "Dog"), "class 1"),
        (named("a", "b"), named("a", "b", "c"), "other: expected 2 classes, those of one, got 3"),
        (Classes(2), Classes(3), "got 3"),
    ],
)
def test_other_classes_are_refused_and_the_first_difference_named(one, other, message):
    with pytest.raises(ValueError, match=message) as error:
        check_same({"one": one, "other": other})
    if one.named and one.count == other.count:
        assert all(name in str(error.value) for name in (*one.names, *other.names)), "both lists"


@pytest.mark.parametrize(
    ("sides", "told"),
    [
        ({"a": named("x", "é"), "b": named("x", "e\u0301")}, None),
        ({"a": named("0", "1"), "b": named("0", "1")}, None),
        ({"a": named("x", "y"), "b": Classes(2)}, "no names of classes: b; only the number"),
        ({"a": Classes(2), "b": Classes(2)}, "no names of classes: a, b; only the number"),
        ({"a": named("x", "y"), "b": named("0", "1"), "c": named("x", "y")}, "no names of classes: b; only the number"),
    ],
)
def test_numbers_are_compared_where_names_are_missing_and_that_is_said(sides, told):
    found = check_same(sides)
    assert found is None if told is None else found.startswith(told)


def images(names, labels=None, shape=(1, 8, 8)):
    labels = torch.arange(len(names)).repeat(4) if labels is None else torch.tensor(labels)
    return ImageData(torch.zeros(len(labels), *shape), labels, tuple(names))


def carrying(network, *names):
    Classes(len(names), names).put_on(network)
    return network


def test_everything_that_brings_two_together_compares_them():
    """Networks and images in memory; commands are in test_class_commands.py."""
    data, other = images("abc"), images("acb")
    network, judge = (
        carrying(DDPMUNet(**TINY, num_classes=3), *"abc"),
        carrying(DigitsClassifier(num_classes=3), *"abc"),
    )
    settings = {"forget": (0,), "override": (1,), "num_classes": 3}
    baseline = BaselineConfig(method="fine_tune", sample_shape=(1, 8, 8), **settings)
    meetings = {
        "generator": lambda found: MaskedDistiller(
            network,
            SCHEDULE,
            config(**settings),
            generator=carrying(DDPMUNet(**TINY, num_classes=3), *found.class_names),
        ),
        "fake_score": lambda found: MaskedDistiller(
            network,
            SCHEDULE,
            config(**settings),
            fake_score=carrying(DDPMUNet(**TINY, num_classes=3), *found.class_names),
        ),
        "baseline": lambda found: Baseline(network, SCHEDULE, baseline, data=found),
        "judged": lambda found: evaluate_images(found.images, found.labels, judge.eval(), found, [0]),
        "trained on": lambda found: train_classifier(judge, found, steps=1, batch_size=2, progress=False),
    }
    for meeting, meet in meetings.items():
        with pytest.raises(ValueError, match=r"class 1 is 'c', in .* it is 'b'"):
            meet(other)
        assert meet(data) is not None, meeting


# -- where they go ---------------------------------------------------------------------------------


def test_a_folder_has_what_its_model_was_trained_on(tmp_path):
    data = images(["cat", "dog", "cow", "emu"], [0, 0, 2, 3])
    expected = Classes(4, ("cat", "dog", "cow", "emu"), unseen=(1,))
    teacher = train_denoiser(DDPMUNet(**TINY, num_classes=4), data, SCHEDULE, steps=1, batch_size=2, progress=False)
    judge = train_classifier(DigitsClassifier(width=4, num_classes=4), data, steps=1, batch_size=2, progress=False)
    for name, network, generation in (("teacher", teacher, DDIM), ("judge", judge, None)):
        models.save(network, tmp_path / name, generation)
        assert models.classes_in(models.load_config(tmp_path / name)) == expected
        again = models.load(tmp_path / name)
        models.save(again, tmp_path / f"{name} again", generation)
        assert Classes.of_module(models.load(tmp_path / f"{name} again")) == expected


def test_what_was_seen_once_has_been_seen():
    network = DigitsClassifier(width=4, num_classes=3)
    for labels, unseen in (([0, 0], (1, 2)), ([1, 1], (2,)), ([0, 2], ())):
        train_classifier(network, images("abc", labels), steps=1, batch_size=2, progress=False)
        assert Classes.of_module(network).unseen == unseen


@pytest.mark.parametrize("method", ["distiller", "baseline"])
def test_an_erasure_keeps_them(tmp_path, method):
    settings = {"forget": (1,), "override": (0,), "num_classes": 3}
    network = carrying(DDPMUNet(**TINY, num_classes=3), *ANIMALS.names)
    if method == "distiller":
        run = MaskedDistiller(network, SCHEDULE, config(**settings))
    else:
        run = Baseline(network, SCHEDULE, BaselineConfig(method="esd", sample_shape=(1, 8, 8), **settings))
    run.step()
    run.save(tmp_path / "out")
    assert models.classes_in(models.load_config(tmp_path / "out" / "model")) == ANIMALS
    delta = Delta.load(tmp_path / "out" / "delta")
    assert delta.record.name == "forget 1 (big dog)"
    assert Classes.listed_in(delta.metadata) == ANIMALS


def test_names_of_another_number_of_classes_are_refused_before_they_are_written(tmp_path):
    network = carrying(DDPMUNet(**TINY, num_classes=3), "a", "b")
    with pytest.raises(ValueError, match="class_names: expected 3 different names"):
        models.save(network, tmp_path / "m", DDIM)
    with pytest.raises(ValueError, match="data: expected 3 classes, the model's, got 2"):
        train_classifier(DigitsClassifier(width=4, num_classes=3), images("ab"), steps=1, batch_size=2, progress=False)
    assert not (tmp_path / "m").exists()


def test_parts_of_one_data_set_name_the_first_class_that_differs(tmp_path):
    for part, names in (("train", ("a", "b", "c")), ("test", ("a", "c", "b"))):
        image_sets.npz(tmp_path / f"{part}.npz", image_sets.random_pixels(3, 8), range(3), names)
    with pytest.raises(FileFormatError, match="class 1 is 'c' there, else 'b'"):
        load_dataset(tmp_path, split="all")


def test_older_folders_are_read_and_stay_as_they_are(tmp_path):
    network = DDPMUNet(**TINY, num_classes=3)
    models.save(network, tmp_path / "old", DDIM)
    config = read_json(tmp_path / "old" / "config.json")
    assert not {"class_names", "classes_without_images"} & config.keys()
    assert models.classes_in(config) == Classes(3) == Classes.of_module(models.load(tmp_path / "old"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", ["a", "b"]),
        ("class_names", ["a", "a", "b"]),
        ("class_names", ["a", "", "b"]),
        ("class_names", ["a", 1, "b"]),
        ("class_names", "abc"),
        ("classes_without_images", [3]),
        ("classes_without_images", [True]),
        ("classes_without_images", 1),
    ],
)
def test_damaged_classes_are_refused(tmp_path, key, value):
    models.save(DDPMUNet(**TINY, num_classes=3), tmp_path / "m", DDIM)
    write_json(tmp_path / "m" / "config.json", {**read_json(tmp_path / "m" / "config.json"), key: value})
    with pytest.raises(FileFormatError, match=rf"config\.json: .*{key}"):
        models.load(tmp_path / "m")
