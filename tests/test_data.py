"""Readers of images: right pixels and labels, and clear refusals."""

import builtins

import numpy as np
import pytest
import torch

from pecker_fast.data import ImageData, load_digits, load_image_folder
from pecker_fast.errors import FileFormatError


def _data(count=6):
    labels = torch.arange(count) % 2
    return ImageData(torch.arange(float(count)).view(-1, 1, 1, 1), labels, ("even", "odd"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int64), "images"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "images"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "labels"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 2]), "0 to 2"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 0]), "-1 to 0"),
    ],
)
def test_image_data_checks_itself(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageData(images, labels, ("a", "b"))


def test_split_is_stratified_disjoint_and_repeatable():
    data = _data(20)
    train, held_out = data.split(0.2)
    assert (len(train), len(held_out)) == (16, 4)
    assert held_out.labels.bincount().tolist() == [2, 2]
    assert sorted(torch.cat([train.images, held_out.images]).flatten().tolist()) == list(range(20))
    again = data.split(0.2)[1]
    assert torch.equal(again.images, held_out.images)
    assert not torch.equal(data.split(0.2, seed=1)[1].images, held_out.images)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="held_out"):
            data.split(share)


def test_subset_keeps_order_and_names():
    part = _data().subset(torch.tensor([5, 0]))
    assert part.images.flatten().tolist() == [5.0, 0.0]
    assert part.labels.tolist() == [1, 0]
    assert part.class_names == ("even", "odd")


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = load_digits()
    raw = datasets.load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert torch.equal((data.images[:, 0] + 1) * 8, torch.from_numpy(raw.images).float())
    assert float(data.images.min()) == -1.0
    assert float(data.images.max()) == 1.0
    assert data.labels.tolist() == raw.target.tolist()
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (1438, 359)
    assert min(held_out.labels.bincount().tolist()) >= 34


def _hide(monkeypatch, package):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    _hide(monkeypatch, "sklearn")
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[demo\]"):
        load_digits()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    _hide(monkeypatch, "PIL")
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[demo\]"):
        load_image_folder(tmp_path, image_size=4)


@pytest.fixture
def image_folder(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    for name, shift in (("b/2.png", 0), ("b/10.PNG", 50), ("a/x.png", 100)):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(pixels + np.uint8(shift)).save(path)
    (tmp_path / "root" / "b" / "notes.txt").write_text("not an image")
    (tmp_path / "root" / ".cache").mkdir()
    (tmp_path / "root" / "readme.md").write_text("")
    return tmp_path / "root"


def test_image_folder_pixels_labels_and_order(image_folder):
    data = load_image_folder(image_folder, image_size=4)
    assert data.class_names == ("a", "b")
    assert data.labels.tolist() == [0, 1, 1]
    pixels = torch.arange(48.0).view(4, 4, 3).permute(2, 0, 1)
    expected = torch.stack([pixels + 100, pixels + 50, pixels]) / 127.5 - 1  # a/x, b/10, b/2
    torch.testing.assert_close(data.images, expected, rtol=0, atol=1e-6)


def test_image_folder_in_grey(image_folder):
    data = load_image_folder(image_folder, image_size=4, channels=1)
    assert data.images.shape == (3, 1, 4, 4)
    # ITU-R 601 luma of (0, 1, 2) rounds to 1.
    assert float(data.images[2, 0, 0, 0]) == pytest.approx(1 / 127.5 - 1)
    with pytest.raises(ValueError, match="channels"):
        load_image_folder(image_folder, image_size=4, channels=2)


def test_image_folder_refuses_wrong_layouts(tmp_path, image_folder):
    with pytest.raises(FileFormatError, match=r"absent: no such folder"):
        load_image_folder(tmp_path / "absent", image_size=4)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileFormatError, match="no class folders"):
        load_image_folder(empty, image_size=4)
    (image_folder / "c").mkdir()
    with pytest.raises(FileFormatError, match=r"c: holds no"):
        load_image_folder(image_folder, image_size=4)


def test_image_folder_refuses_bad_images(image_folder):
    with pytest.raises(FileFormatError, match=r"x\.png: expected 5x5 pixels, got 4x4"):
        load_image_folder(image_folder, image_size=5)
    image_module = pytest.importorskip("PIL.Image")
    path = image_folder / "a" / "x.png"
    whole = path.read_bytes()
    image_module.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)
    with pytest.raises(FileFormatError, match=r"x\.png: expected 8-bit"):
        load_image_folder(image_folder, image_size=4)
    for content in (b"", b"GIF89a", whole[:40], whole[:50], whole[:50] + b"\0" * 30 + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"x\.png"):
            load_image_folder(image_folder, image_size=4)
