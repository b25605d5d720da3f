"""Folders and clones with splits, as people and the Hub name them; what was taken is said."""

import json

import image_sets
import numpy as np
import pytest
import torch

from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main
from pecker_fast.data import load_dataset
from pecker_fast.data.splits import of_split
from pecker_fast.errors import FileFormatError
from pecker_fast.torch_file import read_torch

PIXELS, LABELS = image_sets.random_pixels(6, 8), np.array([0, 1, 0, 1, 0, 1])
NAMES = ("cat", "dog")
PARTS = {"train": slice(0, 2), "validation": slice(2, 4), "test": slice(4, 6)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def _folders(root, **named):
    for split, name in named.items():
        image_sets.folder(root / name, PIXELS[PARTS[split]], LABELS[PARTS[split]], NAMES)
    return root


def _clone(root, *, config="data", **named):
    for split, name in named.items():
        image_sets.parquet(root / config / name, PIXELS[PARTS[split]], LABELS[PARTS[split]], NAMES)
    (root / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    (root / ".gitattributes").write_text("*.parquet filter=lfs")
    (root / ".git").mkdir()
    return root


def _is(data, part):
    expected = torch.from_numpy(image_sets.as_images(PIXELS[part]))
    return data.class_names == NAMES and data.images.shape == expected.shape and bool((data.images == expected).all())


LAYOUTS = {
    "train, valid, test": lambda root: _folders(root, train="train", validation="valid", test="test"),
    "Training, Val, Testing": lambda root: _folders(root, train="Training", validation="Val", test="Testing"),
    "train, validation, eval": lambda root: _folders(root, train="train", validation="validation", test="eval"),
    "one folder around them": lambda root: (
        _folders(root / "set" / "data", train="train", validation="dev", test="test") and root
    ),
    "beside other folders": lambda root: _folders(root, train="train", validation="val", test="test"),
    "a clone": lambda root: _clone(
        root,
        train="train-00000-of-00001.parquet",
        validation="validation-00000-of-00001.parquet",
        test="test-00000-of-00001.parquet",
    ),
    "a clone with one configuration": lambda root: _clone(
        root, config="plain_text", train="train-0.parquet", validation="valid-0.parquet", test="test-0.parquet"
    ),
    "a clone with folders of splits": lambda root: _clone(
        root, config="default", train="train/0000.parquet", validation="validation/0000.parquet", test="test/0.parquet"
    ),
    "files named at the end": lambda root: _clone(
        root, config=".", train="pets_train.parquet", validation="pets-val.parquet", test="pets.test.parquet"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_is_taken_and_others_where_asked(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    if layout == "beside other folders":
        (tmp_path / "annotations").mkdir()
    data = load_dataset(tmp_path)
    assert _is(data, PARTS["train"])
    said = "split train of train, test, validation was read; another one is chosen with split (--split)"
    assert data.notes[0] == said
    assert data.notes[1:] == (("left out beside the class folders: annotations",) if "beside" in layout else ())
    for split, part in PARTS.items():
        assert _is(load_dataset(tmp_path, split=split), part)
    everything = load_dataset(tmp_path, split="all")
    assert len(everything) == 6 and everything.class_names == NAMES
    assert not any("split" in note for note in everything.notes)


def test_shards_are_read_in_their_order(tmp_path):
    for number, index in ((10, 2), (2, 1), (0, 0)):
        name = f"train-{number}-of-00011.parquet"
        image_sets.parquet(tmp_path / "data" / name, PIXELS[[index]], LABELS[[index]], NAMES)
    assert _is(load_dataset(tmp_path), slice(0, 3))


def test_a_split_that_is_not_there_says_which_are(tmp_path):
    _folders(tmp_path / "a", train="train", validation="valid")
    with pytest.raises(
        FileFormatError, match=r"no folder files of split 'test'; it has train, validation .split, --split"
    ):
        load_dataset(tmp_path / "a", split="test")
    _folders(tmp_path / "b", validation="valid", test="test")
    with pytest.raises(FileFormatError, match=r"no folder files of split 'train'; it has test, validation"):
        load_dataset(tmp_path / "b")
    image_sets.cifar10_binary(tmp_path / "c", image_sets.random_pixels(2), [0, 1])
    with pytest.raises(FileFormatError, match=r"no cifar10-binary files of split 'validation'; it has train"):
        load_dataset(tmp_path / "c", split="validation")
    _folders(tmp_path / "d", train="train", validation="val")
    (tmp_path / "d" / "valid" / "cat").mkdir(parents=True)
    with pytest.raises(FileFormatError, match="val and valid are both of split 'validation'"):
        load_dataset(tmp_path / "d")


@pytest.mark.parametrize("names", [("train", "test"), ("train",), ("val", "test", "training")])
def test_splits_do_not_become_classes(tmp_path, names):
    """Pictures right in them have no class."""
    image_sets.folder(tmp_path, PIXELS[: len(names)], range(len(names)), names)
    with pytest.raises(FileFormatError, match="holds no class folders"):
        load_dataset(tmp_path, split="all")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    image_sets.folder(tmp_path, PIXELS[:3], range(3), ("bus", "car", "train"))
    assert load_dataset(tmp_path).class_names == ("bus", "car", "train")


def test_one_folder_around_the_classes(tmp_path):
    image_sets.folder(tmp_path / "set" / "images", PIXELS[:2], LABELS[:2], NAMES)
    assert _is(load_dataset(tmp_path), slice(0, 2))


def test_of_several_configurations_one_is_to_be_named(tmp_path):
    for config in ("en", "fr"):
        image_sets.parquet(tmp_path / config / "train-0.parquet", PIXELS[:2], LABELS[:2], NAMES)
    with pytest.raises(FileFormatError, match=r"holds 2 configurations, en, fr; name the folder of one"):
        load_dataset(tmp_path)
    assert _is(load_dataset(tmp_path / "fr"), slice(0, 2))


def test_a_table_deep_among_pictures_is_no_data_set(tmp_path):
    image_sets.folder(tmp_path, PIXELS[:2], LABELS[:2], NAMES)
    image_sets.parquet(tmp_path / "cat" / "index.parquet", PIXELS[:1], LABELS[:1], NAMES)
    assert len(load_dataset(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.npz", "train"),
        ("cifar10_train.npz", "train"),
        ("testA.npz", "test"),
        ("x.VALIDATION.npz", "validation"),
        ("dev1.npz", "validation"),
        ("contest.npz", None),
        ("valley.npz", None),
        ("constrained.npz", None),
    ],
)
def test_where_a_file_says_its_split(tmp_path, name, split):
    file, other = tmp_path / name, tmp_path / ("train.npz" if split == "test" else "test.npz")
    for asked in ("train", "test", "validation"):
        assert (file in of_split(tmp_path, [file, other], asked)) == (asked == split)


@pytest.mark.parametrize(
    "name", ["train-0.parquet", "data/train-0.parquet", "x.npz", "data_batch_1.bin", "data_batch_1", "cat/1.png"]
)
def test_pointers_of_git_lfs_are_named_as_such(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(FileFormatError, match=rf"{name}: is a Git LFS pointer, .* git lfs pull"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("read", [read_safetensors, read_torch])
def test_pointers_in_place_of_weights_too(tmp_path, read):
    (tmp_path / "weights").write_text(POINTER)
    with pytest.raises(FileFormatError, match="weights: is a Git LFS pointer"):
        read(tmp_path / "weights")


def test_commands_say_what_was_taken(tmp_path, capsys):
    data = tmp_path / "data"
    _folders(data, train="train", test="test")
    (data / "train" / "cat" / "x.heic").write_bytes(b"")
    command = ["pretrain", "--train_data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    notes = [
        f"{data}: split train of train, test was read; another one is chosen with split (--split)",
        f"{data}: left out 1 file: .heic",
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == notes
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"note: {note}" for note in notes]
