"""Damaged files, hundreds a reader: each is refused by name with a reason within a second, or read as what it says."""

import random
import time

import bombs
import image_sets
import numpy as np
import pytest

from pecker_fast.data import load_dataset
from pecker_fast.errors import FileFormatError

MUTANTS = 200
SECONDS = 1
COUNT = 3
PIXELS, LABELS = image_sets.random_pixels(COUNT), np.array([0, 9, 4])
SMALL = image_sets.random_pixels(COUNT, size=4)
LARGE = image_sets.random_pixels(COUNT, size=96)
KINDS = {
    "cifar10-binary": (lambda root: image_sets.cifar10_binary(root, PIXELS, LABELS), "data_batch_1.bin"),
    "cifar10-python": (lambda root: image_sets.cifar10_python(root, PIXELS, LABELS), "data_batch_1"),
    "stl10": (lambda root: image_sets.stl10(root, LARGE, LABELS), "train_y.bin"),
    "stl10 images": (lambda root: image_sets.stl10(root, LARGE, LABELS), "train_X.bin"),
    "parquet": (lambda root: image_sets.parquet(root / "x.parquet", SMALL, LABELS), "x.parquet"),
    "npz": (lambda root: image_sets.npz(root / "x.npz", SMALL, LABELS, image_sets.NAMES), "x.npz"),
    "plain npz": (lambda root: image_sets.npz(root / "x.npz", SMALL, LABELS, image_sets.NAMES, False), "x.npz"),
    "folder": (lambda root: image_sets.folder(root, SMALL, LABELS, image_sets.NAMES), "deer/0002.png"),
}


def _mutants(content, kind):
    """Flipped bits and bytes, cuts, insertions, and edits of the first and last bytes, where headers are."""
    draw = random.Random(kind)
    ends = min(60, len(content))

    def somewhere():
        return draw.choice((draw.randrange(len(content)), draw.randrange(ends), -1 - draw.randrange(ends)))

    for index in range(MUTANTS):
        changed = bytearray(content)
        match index % 5:
            case 0:
                changed[somewhere()] ^= 1 << draw.randrange(8)
            case 1:
                for _ in range(draw.randint(1, 4)):
                    changed[somewhere()] = draw.randrange(256)
            case 2:
                del changed[draw.randrange(len(content)) :]
            case 3:
                start = somewhere() % len(content)
                changed[start:start] = draw.randbytes(draw.choice((1, 4, 3073)))
            case 4:
                start = somewhere() % len(content)
                changed[start : start + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"))
        yield bytes(changed)


def _replace(file, content):
    file.unlink()  # some file systems wait for the disk when a file is written over
    file.write_bytes(content)


def _outcome(root):
    """The data, or why there are none; a second of the processor is many times what either takes."""
    started = time.process_time()
    try:
        found = load_dataset(root)
    except FileFormatError as error:
        found = error
    assert time.process_time() - started < SECONDS
    return found


def _same(a, b):
    return np.array_equal(a.images, b.images) and a.labels.equal(b.labels) and a.class_names == b.class_names


def _values_differing(a, b):
    """Pixels and labels that are not the same; None if the data have another form."""
    if a.images.shape != b.images.shape or a.class_names != b.class_names:
        return None
    return int((a.images != b.images).sum() + (a.labels != b.labels).sum())


def _bytes_differing(a, b):
    """None where bytes were put in or taken out."""
    return int((np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).sum()) if len(a) == len(b) else None


def _allowed(kind, whole, found, content, mutant):
    """Whether ``found`` is what the mutant says: raw formats have no checksum, and changed pixels are data."""
    if kind in ("parquet", "npz", "plain npz", "folder"):  # these have their own checksums
        return _same(whole, found)
    if kind == "cifar10-binary":
        records = np.frombuffer(mutant, np.uint8).reshape(-1, 3073)
        images = image_sets.as_images(records[:, 1:].reshape(-1, 3, 32, 32))
        return np.allclose(found.images, images, rtol=0, atol=1e-6) and found.labels.tolist() == records[:, 0].tolist()
    changed, values = _bytes_differing(content, mutant), _values_differing(whole, found)
    return changed is not None and values is not None and values <= changed


@pytest.fixture(scope="module", params=KINDS)
def outcomes(request, tmp_path_factory):
    """Kind, the whole data, and for every mutant its bytes and what came of it."""
    write, name = KINDS[request.param]
    root = tmp_path_factory.mktemp("set")
    write(root)
    file = root / name
    content, whole = file.read_bytes(), load_dataset(root)
    results = []
    for mutant in _mutants(content, request.param):
        _replace(file, mutant)
        results.append((mutant, _outcome(root)))
    _replace(file, content)
    return request.param, root, file, whole, results


def test_mutants_are_refused_by_name_or_read_as_they_are(outcomes):
    kind, root, file, whole, results = outcomes
    content = file.read_bytes()
    refused = [error for _, error in results if isinstance(error, FileFormatError)]
    for error in refused:
        assert str(error).startswith(str(root)) and file.name.replace("_y", "_X") in str(error).replace("_y", "_X")
        assert len(str(error).partition(": ")[2]) > 10, error
    for mutant, found in results:
        assert isinstance(found, FileFormatError) or _allowed(kind, whole, found, content, mutant)
    assert len(results) == MUTANTS and len(refused) > MUTANTS // 4
    # A control: the check can fail. Without the refusals, what the file was would not be what a mutant says.
    assert not all(_allowed(kind, whole, whole.subset([1, 0, 2]), content, mutant) for mutant, _ in results[:9])


def test_with_checksums_every_mutant_is_refused(outcomes):
    _, root, file, whole, results = outcomes
    image_sets.sums(root)
    content = file.read_bytes()
    for mutant, _ in results:
        _replace(file, mutant)
        if mutant != content:
            with pytest.raises(FileFormatError, match=rf"{file.name}: (SHA-256 is|cannot be read)"):
                load_dataset(root)
    _replace(file, content)
    assert _same(load_dataset(root), whole)
    (root / "SHA256SUMS").unlink()


@pytest.mark.parametrize("kind", [*bombs.BOMBS, "slow"])
def test_bombs_are_refused_within_the_second(kind, tmp_path):
    image_sets.cifar10_python(tmp_path, PIXELS, LABELS)
    (tmp_path / "data_batch_1").write_bytes(bombs.SLOW if kind == "slow" else bombs.BOMBS[kind][0])
    assert "data_batch_1: byte" in str(_outcome(tmp_path))


def test_a_bomb_of_names_is_refused_within_the_second(tmp_path):
    image_sets.cifar10_python(tmp_path, PIXELS, LABELS)
    (tmp_path / "batches.meta").write_bytes(bombs.NAMES)
    assert "batches.meta: expected the names of 10 classes" in str(_outcome(tmp_path))
