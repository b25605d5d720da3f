"""`load_dataset`: any data set that the readers know, told apart by what lies there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from pecker_fast.data import cifar10, folder, npz, parquet, splits, stl10
from pecker_fast.data.files import natural
from pecker_fast.data.images import ImageData
from pecker_fast.data.stored import StoredImages, joined
from pecker_fast.errors import FileFormatError

DataFormat = Literal["cifar10-binary", "cifar10-python", "parquet", "stl10", "npz", "folder"]
Split = Literal["train", "test", "all", "validation"]
LOGGER = "pecker_fast.data"
"""Is told the notes of what is read."""
FORMATS: tuple[str, ...] = get_args(DataFormat)
SPLITS: tuple[str, ...] = get_args(Split)

_FINDERS: dict[str, Callable[[Path, str], list[Path]]] = {
    "cifar10-binary": cifar10.binary_files,
    "cifar10-python": cifar10.python_files,
    "parquet": splits.parquet_files,
    "stl10": stl10.stl10_files,
    "npz": lambda root, split: splits.of_split(root, natural(root.glob("*.npz")), split),
    "folder": splits.class_roots,
}
_LOOKED_FOR = (
    "data_batch_*.bin or test_batch.bin (CIFAR-10, binary), data_batch_* or test_batch (CIFAR-10, python), *.parquet, "
    "train_X.bin or test_X.bin (STL-10), *.npz, or one subfolder of pictures per class"
)


def load_dataset(
    path: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    split: Split = "train",
    format: DataFormat | None = None,
    limit: int | None = None,
    checksums: Mapping[str, str] | None = None,
) -> ImageData:
    """Read labelled images: CIFAR-10 (binary, python), Hugging Face parquet, STL-10, npz or an image folder.

    Files are mapped or read piece by piece and stay 8-bit until a block of images is converted; nothing is unpickled.

    Args:
        path: The folder, or one .npz or .parquet file.
        image_size: Height and width wanted: those of the images, or a whole fraction of them, for which boxes of
            pixels are averaged (32 to 16: the mean of each 2x2). None keeps them.
        channels: 1 or 3; colours become ITU-R 601 luma, grey is repeated. None keeps them.
        split: "train", "test", "validation" or "all" of them. A set without splits is all "train".
        format: One of ``FORMATS``; None finds out.
        limit: At most so many images, evenly spaced over the data, so that sorted files keep all their classes.
        checksums: Name of a file -> SHA-256; None takes those of a ``SHA256SUMS`` beside the data, if it is there.

    Returns:
        Images (N, C, H, W) float32 in [-1, 1], labels int64, class names; notes say what was not read.

    Raises:
        FileFormatError: Nothing known lies there, or a file is missing, truncated, damaged or hostile; the message
            names it.
        ValueError: An argument is out of range or does not fit the images.
        ImportError: Pillow, or pyarrow for parquet, is not installed.
    """
    for name, value, known in (("split", split, SPLITS), ("format", format, (None, *FORMATS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
    root = Path(path)
    stored = _stored_file(root, split, format, checksums) if root.is_file() else _stored(root, split, format, checksums)
    data = stored.load(image_size=image_size, channels=channels, limit=limit)
    for note in data.notes:
        logging.getLogger(LOGGER).info("%s: %s", root, note)
    return data


def detect_format(path: Path) -> DataFormat:
    """Which of ``FORMATS`` lies in a folder.

    Raises:
        FileFormatError: None of them, or several.
    """
    if not path.is_dir():
        raise FileFormatError(f"{path}: no such file or folder; looked for {_LOOKED_FOR}")
    found = [name for name in FORMATS if name != "folder" and _FINDERS[name](path, "all")]
    if len(found) > 1:
        raise FileFormatError(f"{path}: holds {' and '.join(found)}; say which with format (--data_format)")
    if not found and not splits.class_roots(path, "all"):
        raise FileFormatError(f"{path}: holds no class folders and no known files; looked for {_LOOKED_FOR}")
    return found[0] if found else "folder"  # type: ignore[return-value]


def _stored(root: Path, split: str, format: str | None, checksums: Mapping[str, str] | None) -> StoredImages:
    chosen = format or detect_format(root)
    files = _FINDERS[chosen](root, split) if root.is_dir() else []
    if not files:
        there = _splits(root, chosen) if root.is_dir() else []
        has = f"it has {', '.join(there)} (split, --split)" if there else f"looked for {_LOOKED_FOR}"
        raise FileFormatError(
            f"{root}: holds no {chosen} files of split {split!r}; {has}; a set without splits is 'train'"
        )
    stored = _read(root, chosen, files, checksums)
    return replace(stored, notes=(*_said(root, chosen, split), *stored.notes))


def _said(root: Path, chosen: str, split: str) -> Iterator[str]:
    """What was taken of several splits, and what lies beside them."""
    there = _splits(root, chosen)
    if split != "all" and len(there) > 1:
        yield f"split {split} of {', '.join(there)} was read; another one is chosen with split (--split)"
    if chosen == "folder" and (left := splits.left_out(root)):
        yield f"left out beside the class folders: {', '.join(left)}"


def _splits(root: Path, chosen: str) -> list[str]:
    return [name for name in splits.NAMED if _FINDERS[chosen](root, name)]


def _read(root: Path, chosen: str, files: list[Path], checksums: Mapping[str, str] | None) -> StoredImages:
    match chosen:
        case "cifar10-binary":
            return cifar10.read_binary(root, files, checksums)
        case "cifar10-python":
            return cifar10.read_python(root, files, checksums)
        case "parquet":
            return parquet.read_parquet(root, files, checksums)
        case "stl10":
            return stl10.read_stl10(root, files, checksums)
        case "npz":
            return joined(root, [npz.read_npz(file, checksums) for file in files])
    return joined(root, [folder.read_folder(part, base=root, checksums=checksums) for part in files])


def _stored_file(file: Path, split: str, format: str | None, checksums: Mapping[str, str] | None) -> StoredImages:
    """One file, which has no splits."""
    known = {".npz": "npz", ".parquet": "parquet"}.get(file.suffix.lower())
    if known is None or format not in (None, known):
        raise FileFormatError(f"{file}: expected a folder, or one .npz or .parquet file; looked for {_LOOKED_FOR}")
    if split == "test":
        raise FileFormatError(f"{file}: one file has no splits; name the folder, or leave split at 'train'")
    return npz.read_npz(file, checksums) if known == "npz" else parquet.read_parquet(file.parent, [file], checksums)
