"""Readers of the published formats: the right pixels, labels and names, and refusals that say what is wrong."""

import pickle
import re
import zipfile

import image_sets
import numpy as np
import pytest
import torch
from test_data import _hide

from pecker_fast.data import ImageData, load_dataset, write_npz
from pecker_fast.data.stored import spread
from pecker_fast.errors import FileFormatError

COUNT = 7
PIXELS, LABELS = image_sets.random_pixels(COUNT), image_sets.random_labels(COUNT)
EXPECTED = torch.from_numpy(image_sets.as_images(PIXELS))


def _check(data, images=EXPECTED, labels=LABELS, names=image_sets.NAMES):
    torch.testing.assert_close(data.images, images, rtol=0, atol=1e-6)
    assert data.labels.tolist() == labels.tolist()
    assert data.class_names == names


def _repickled(protocol):
    return lambda content: pickle.dumps(content, protocol=protocol)


WRITERS = {
    "binary": lambda root: image_sets.cifar10_binary(root, PIXELS, LABELS),
    "python": lambda root: image_sets.cifar10_python(root, PIXELS, LABELS),
    **{
        f"python {protocol}": lambda root, protocol=protocol: image_sets.cifar10_python(
            root, PIXELS, LABELS, write=_repickled(protocol)
        )
        for protocol in (2, 3, 4, 5)
    },
    "python of numpy 1": lambda root: image_sets.cifar10_python(
        root, PIXELS, LABELS, write=lambda content: pickle.dumps(content, 3).replace(b"numpy._core", b"numpy.core")
    ),
    "parquet": lambda root: image_sets.parquet(root / "train-0.parquet", PIXELS, LABELS),
    "npz": lambda root: image_sets.npz(root / "any.npz", PIXELS, LABELS, image_sets.NAMES),
    "plain npz": lambda root: image_sets.npz(root / "any.npz", PIXELS, LABELS, image_sets.NAMES, compressed=False),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_cifar10_in_every_form(kind, tmp_path):
    WRITERS[kind](tmp_path)
    _check(load_dataset(tmp_path))
    half = load_dataset(tmp_path, image_size=16, limit=3, channels=1)
    chosen = PIXELS[[0, 2, 4]].astype(int)
    grey = (19595 * chosen[:, 0] + 38470 * chosen[:, 1] + 7471 * chosen[:, 2] + 0x8000) >> 16
    boxes = grey.reshape(3, 1, 16, 2, 16, 2).mean((3, 5))
    _check(half, torch.from_numpy(image_sets.as_images(boxes)), LABELS[[0, 2, 4]])


def test_stl10_has_columns_and_counts_from_one(tmp_path):
    pixels, labels = image_sets.random_pixels(4, size=96), np.array([0, 9, 4, 4])
    image_sets.stl10(tmp_path, pixels, labels)
    data = load_dataset(tmp_path)
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    _check(data, torch.from_numpy(image_sets.as_images(pixels)), labels, names)
    assert not torch.equal(data.images, data.images.mT)  # a control: the other order is another image
    small = load_dataset(tmp_path, image_size=32)
    boxes = pixels.reshape(4, 3, 32, 3, 32, 3).astype(np.float64).mean((3, 5))
    _check(small, torch.from_numpy(image_sets.as_images(boxes)), labels, names)


def test_folder_tells_its_own_size_and_colours(tmp_path):
    names = ("dots", "lines")
    pixels, labels = image_sets.random_pixels(5, size=6, channels=1), np.array([0, 0, 0, 1, 1])
    image_sets.folder(tmp_path, pixels, labels, names)
    _check(load_dataset(tmp_path), torch.from_numpy(image_sets.as_images(pixels)), labels, names)
    colour = image_sets.random_pixels(1, size=6)[0]
    (tmp_path / "lines" / "0003.png").write_bytes(image_sets.png(colour))
    mixed = load_dataset(tmp_path)  # one picture in colour makes all of them so
    expected = np.concatenate([pixels[:3].repeat(3, 1), colour[None], pixels[4:].repeat(3, 1)])
    _check(mixed, torch.from_numpy(image_sets.as_images(expected)), labels, names)


def test_splits(tmp_path):
    train, test = PIXELS[:4], PIXELS[4:]
    for kind, write in {
        "binary": lambda root, *a: image_sets.cifar10_binary(root, *a),
        "python": lambda root, *a: image_sets.cifar10_python(root, *a),
    }.items():
        suffix = ".bin" if kind == "binary" else ""
        write(tmp_path / kind, train[:2], LABELS[:2], f"data_batch_2{suffix}")
        write(tmp_path / kind, train[2:], LABELS[2:4], f"data_batch_10{suffix}")
        write(tmp_path / kind, test, LABELS[4:], f"test_batch{suffix}")
    for split, part in (("train", slice(0, 4)), ("test", slice(4, None))):
        image_sets.parquet(tmp_path / "parquet" / f"{split}-0.parquet", PIXELS[part], LABELS[part])
        image_sets.npz(tmp_path / "npz" / f"{split}.npz", PIXELS[part], LABELS[part], image_sets.NAMES)
    for kind in ("binary", "python", "parquet", "npz"):
        _check(load_dataset(tmp_path / kind), EXPECTED[:4], LABELS[:4])
        _check(load_dataset(tmp_path / kind, split="test"), EXPECTED[4:], LABELS[4:])
        _check(load_dataset(tmp_path / kind, split="all"))
    for split, part in (("train", slice(0, 4)), ("test", slice(4, None))):
        order = np.arange(len(PIXELS[part])) % 2
        image_sets.folder(tmp_path / "folder" / split, PIXELS[part], order, "ab")
        data = load_dataset(tmp_path / "folder", split=split)
        _check(data, EXPECTED[part][order.argsort(kind="stable")], np.sort(order), ("a", "b"))
    image_sets.folder(tmp_path / "unsplit", PIXELS, LABELS % 2, "ab")
    with pytest.raises(FileFormatError, match="holds no folder files of split 'test'"):
        load_dataset(tmp_path / "unsplit", split="test")


def test_one_file_is_a_data_set(tmp_path):
    image_sets.npz(tmp_path / "a.npz", PIXELS, LABELS)
    data = load_dataset(tmp_path / "a.npz")
    _check(data, names=tuple(map(str, range(LABELS.max() + 1))))  # nobody said what they are called
    image_sets.parquet(tmp_path / "b.parquet", PIXELS, LABELS, columns=("image", "labels"), names=None)
    _check(load_dataset(tmp_path / "b.parquet"), names=data.class_names)
    with pytest.raises(FileFormatError, match="one file has no splits"):
        load_dataset(tmp_path / "a.npz", split="test")
    with pytest.raises(FileFormatError, match="holds parquet and npz; say which with format"):
        load_dataset(tmp_path)
    _check(load_dataset(tmp_path, format="npz"), names=data.class_names)


def test_written_npz_comes_back(tmp_path):
    data = ImageData(EXPECTED, torch.from_numpy(LABELS), image_sets.NAMES)
    write_npz(data, tmp_path / "x.npz")
    _check(load_dataset(tmp_path / "x.npz"))
    with pytest.raises(FileFormatError, match="cannot be written"):
        write_npz(data, tmp_path / "absent" / "x.npz")


def test_spread_keeps_every_class_of_sorted_data():
    assert spread(10, None).tolist() == list(range(10)) == spread(10, 99).tolist()
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="limit"):
        spread(10, 0)


def test_checksums(tmp_path):
    for write in (
        lambda root: image_sets.cifar10_binary(root / "d", PIXELS, LABELS),
        lambda root: image_sets.folder(root / "d", PIXELS, LABELS % 2, "ab"),
        lambda root: image_sets.npz(root / "d" / "x.npz", PIXELS, LABELS),
    ):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        write(root)
        root = root / "d"
        whole = load_dataset(root)
        image_sets.sums(root)
        assert torch.equal(load_dataset(root).images, whole.images)
        file = next(file for file in sorted(root.rglob("*")) if file.suffix in (".bin", ".png", ".npz"))
        name = file.relative_to(root).as_posix()
        with pytest.raises(FileFormatError, match=rf"{file.name}: SHA-256 is .*, expected 0000"):
            load_dataset(root, checksums={name: "0" * 64, "batches.meta.txt": "0" * 64})
        with pytest.raises(FileFormatError, match="has no SHA-256"):
            load_dataset(root, checksums={})
        (root / "SHA256SUMS").write_text("abc  x\n")
        with pytest.raises(FileFormatError, match="SHA256SUMS: line 1"):
            load_dataset(root)


def _npz_with(file, **arrays):
    np.savez(file, **{"images": PIXELS.transpose(0, 2, 3, 1), "labels": LABELS, **arrays})


def _deflated(file, header_shape, size):
    """An npz whose images claim ``header_shape`` and are ``size`` zeros, a thousandth of it on the disk."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": header_shape}
        with archive.open("images.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
        with archive.open("labels.npy", "w") as stream:
            np.lib.format.write_array(stream, np.zeros(header_shape[0], np.int64))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: _npz_with(f, images=np.zeros((2, 4, 4, 3))), r"float64; floats in \[-1, 1\] become uint8 by"),
        (lambda f: _npz_with(f, images=PIXELS[:, 0]), "got images"),
        (lambda f: _npz_with(f, images=np.zeros((7, 4, 4, 2), np.uint8)), "1 or 3 channels, got 2"),
        (lambda f: _npz_with(f, images=np.zeros((7, 4, 5, 3), np.uint8)), "square images .* got 3 of 4x5"),
        (lambda f: _npz_with(f, labels=LABELS[:-1]), "got labels .6,. int64"),
        (lambda f: _npz_with(f, labels=LABELS.astype(float)), "got labels"),
        (lambda f: _npz_with(f, labels=LABELS - 9), "label .* is out of range"),
        (lambda f: _npz_with(f, labels=LABELS + 100_000), "label .* is out of range"),
        (lambda f: _npz_with(f, labels=np.full(7, 2**64 - 1, np.uint64)), "got labels"),
        (lambda f: _npz_with(f, class_names=np.array(["a", "b"])), "out of range; expected 0 to 1"),
        (lambda f: _npz_with(f, class_names=np.array(["a"] * 10)), "same name"),
        (lambda f: _npz_with(f, class_names=np.arange(10)), "class_names"),
        (lambda f: _npz_with(f, images=np.array([{}], object)), "object"),
        (lambda f: _npz_with(f, other=LABELS), "got images, labels, other"),
        (lambda f: np.savez(f, images=PIXELS), "got images"),
        (lambda f: np.savez(f, images=PIXELS[:0].transpose(0, 2, 3, 1), labels=LABELS[:0]), "holds no images"),
        (lambda f: _deflated(f, (1, 1024, 1024, 3), 3 << 20), "claims .* looks like a zip bomb"),
        (lambda f: _deflated(f, (9, 9**7, 1, 3), 1 << 20), "does not fit into"),
        (lambda f: _deflated(f, (2, 8, 8, 3), 1 << 20), "is followed by something else"),
        (lambda f: f.write_bytes(b""), "cannot be read as an npz"),
    ],
)
def test_npz_refusals(damage, text, tmp_path, monkeypatch):
    monkeypatch.setattr("pecker_fast.data.npz._FREE", 2 << 20)  # a small bomb is quick to make
    damage(tmp_path / "x.npz")
    with pytest.raises(FileFormatError, match=rf"x\.npz: .*{text}"):
        load_dataset(tmp_path / "x.npz")


def _edit(file, change):
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "name", "change", "text"),
    [
        ("binary", "data_batch_1.bin", lambda b: b[:-1], "records of 3073 bytes"),
        ("binary", "data_batch_1.bin", lambda b: b"", "it is empty"),
        ("binary", "data_batch_1.bin", lambda b: b"\x0a" + b[1:], "label 10 of image 0"),
        ("binary", "batches.meta.txt", lambda b: b[20:], "names of 10 classes, got list of 8"),
        ("binary", "batches.meta.txt", lambda b: b"\xff" + b, "names as text"),
        ("python", "data_batch_1", lambda b: b[:-9], "its end where"),
        ("python", "data_batch_1", lambda b: b"PK" + b, "opcode"),
        ("python", "data_batch_1", lambda b: b.replace(b"M\x00\x0c", b"M\x01\x0c"), "shape does not fit its bytes"),
        ("python", "data_batch_1", lambda b: b.replace(b"U\x02u1", b"U\x02i1"), "other dtypes"),
        ("python", "data_batch_1", lambda b: b.replace(b"U\x04data", b"U\x04dada"), "expected data of"),
        ("python", "data_batch_1", lambda b: b.replace(b"U\x06labels", b"U\x06fables"), "expected labels as a list"),
        ("python", "data_batch_1", lambda b: b.replace(b"](K", b"](K\x0aK", 1), "list of 7 integers, got list of 8"),
        ("python", "data_batch_1", lambda b: re.sub(rb"\]\(K.", b"](Kc", b, count=1, flags=re.S), "label 99"),
        ("python", "batches.meta", lambda b: pickle.dumps([1], 2), "expected a pickled dict, got list"),
        ("parquet", "train-0.parquet", lambda b: b[: len(b) // 2], "truncated, damaged or not parquet"),
        ("parquet", "train-0.parquet", lambda b: b"", "truncated, damaged or not parquet"),
    ],
)
def test_refusals(kind, name, change, text, tmp_path):
    WRITERS[kind](tmp_path)
    _edit(tmp_path / name, change)
    with pytest.raises(FileFormatError, match=rf"{name}: .*{text}"):
        load_dataset(tmp_path)


def test_stl10_refusals(tmp_path):
    pixels, labels = image_sets.random_pixels(2, size=96), np.array([0, 9])
    for name, change, text in (
        ("train_X.bin", lambda b: b[:-1], "27648 bytes for each of the 2 labels of train_y.bin, got 55295"),
        ("train_y.bin", lambda b: b"\0" + b[1:], "label 0 of image 0 is out of range; expected 1 to 10"),
        ("train_y.bin", lambda b: b[:1] + b"\x0b", "label 11 of image 1"),
        ("class_names.txt", lambda b: b"one two", "names of 10 classes, got 2"),
    ):
        image_sets.stl10(tmp_path, pixels, labels)
        _edit(tmp_path / name, change)
        with pytest.raises(FileFormatError, match=rf"{name}: .*{text}"):
            load_dataset(tmp_path)
    image_sets.stl10(tmp_path, pixels, labels)
    (tmp_path / "train_y.bin").unlink()
    with pytest.raises(FileFormatError, match=r"train_y\.bin: cannot be read"):
        load_dataset(tmp_path)


def test_parquet_refusals(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    for write, text in (
        (lambda: image_sets.parquet(file, PIXELS, LABELS, names=("a", "b")), "out of range; expected 0 to 1"),
        (lambda: image_sets.parquet(file, PIXELS, LABELS, columns=("picture", "label")), "one column image or img"),
        (lambda: image_sets.parquet(file, PIXELS, LABELS, columns=("img", "fine")), "one column label or labels"),
        (lambda: image_sets.parquet(file, PIXELS[:0], LABELS[:0]), "holds no images"),
        (lambda: pq.write_table(pa.table({"img": ["x"], "label": [0]}), file), "img 0 holds no bytes"),
        (lambda: pq.write_table(pa.table({"img": [b"x"], "label": [0]}), file), "img 0: not a readable image"),
        (lambda: pq.write_table(pa.table({"img": [b"x"], "label": [None]}), file), "expected an integer label"),
        (lambda: pq.write_table(pa.table({"img": [b"x"], "label": ["3"]}), file), "expected an integer label"),
    ):
        write()
        with pytest.raises(FileFormatError, match=rf"x\.parquet.*{text}"):
            load_dataset(file)
    bad = pa.table({"img": [b"x"], "label": [0]}).replace_schema_metadata({"huggingface": "{"})
    pq.write_table(bad, file)
    with pytest.raises(FileFormatError, match="huggingface metadata"):
        load_dataset(file)


def test_bad_arguments(tmp_path):
    WRITERS["npz"](tmp_path)
    for arguments, text in (
        ({"split": "val"}, "split must be one of train, test, all"),
        ({"format": "png"}, "format must be one of"),
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"limit": 0}, "limit must be"),
        ({"image_size": 20}, "must be one of 32, 16, 8, 4, so that whole boxes"),
        ({"image_size": 64}, "must be one of 32"),
    ):
        with pytest.raises(ValueError, match=text):
            load_dataset(tmp_path, **arguments)
    (tmp_path / "empty").mkdir()
    for path, text in ((tmp_path / "empty", "looked for data_batch"), (tmp_path / "absent", "no such file or folder")):
        with pytest.raises(FileFormatError, match=text):
            load_dataset(path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileFormatError, match="expected a folder, or one"):
        load_dataset(tmp_path / "notes.txt")


def test_missing_pyarrow_names_the_extra(monkeypatch, tmp_path):
    WRITERS["parquet"](tmp_path)
    _hide(monkeypatch, "pyarrow")
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[data\]"):
        load_dataset(tmp_path)
