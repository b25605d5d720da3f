"""Image folders: pictures in ``root/<class name>/``, class indices in the order of the names, with 2 before 10."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pecker_fast.data import pictures
from pecker_fast.data.files import check_sums
from pecker_fast.data.images import ImageData
from pecker_fast.data.splits import hidden, subfolders
from pecker_fast.data.stored import BLOCK, Indices, Pixels, StoredImages
from pecker_fast.errors import FileFormatError


def load_image_folder(path: str | Path, *, image_size: int, channels: int = 3) -> ImageData:
    """Read every image below ``path``, one folder a class.

    Images are not resized: which filter was used changes Frechet distances, so that is left to the user
    (`pecker_fast.data.load_dataset` averages boxes where asked). Pictures are turned as EXIF says, of several in a
    file the first is taken, transparency is dropped. Hidden files are ignored, others are counted in ``notes``.

    Args:
        path: Folder with one subfolder per class.
        image_size: Height and width that every image must have.
        channels: 1 (grey) or 3 (RGB); images are converted.

    Returns:
        Images (N, channels, image_size, image_size) float32 in [-1, 1], classes by name, 2 before 10, files within.

    Raises:
        FileFormatError: The folder is missing or empty, or an image is unreadable or of another size.
        ValueError: ``channels`` is neither 1 nor 3.
        ImportError: Pillow is not installed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    return read_folder(Path(path), shape=(channels, image_size, image_size)).load()


def read_folder(
    root: Path,
    *,
    shape: tuple[int, int, int] | None = None,
    base: Path | None = None,
    checksums: Mapping[str, str] | None = None,
) -> StoredImages:
    """Find every image below ``root``; they are decoded when they are read.

    Args:
        root: Folder with one subfolder per class.
        shape: (C, H, W) of every image; None takes the size of the first, and one channel if all are grey.
        base: What names of checksums are relative to; None takes ``root``.
        checksums: Name -> SHA-256; None takes those of ``SHA256SUMS`` if it is there.

    Raises:
        FileFormatError: The folder is missing or empty, an image is unreadable or of another size, or a checksum
            differs.
        ImportError: Pillow is not installed.
    """
    folders = _class_folders(root)
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        own = _image_files(folder)
        files += own
        labels += [label] * len(own)
    check_sums(base or root, files, checksums)
    shape = shape or pictures.common_shape(root, ((str(file), pictures.opener_of(file)) for file in files))

    def read(indices: Indices) -> Iterator[Pixels]:
        for start in range(0, len(indices), BLOCK):
            block = [files[index] for index in indices[start : start + BLOCK]]
            yield np.stack([pictures.decode(str(file), pictures.opener_of(file), shape) for file in block])

    names = tuple(folder.name for folder in folders)
    return StoredImages(root, shape, np.array(labels, dtype=np.int64), names, read, _left_out(folders))


def _class_folders(root: Path) -> list[Path]:
    """Subfolders by name, with 2 before 10, hidden ones left out.

    Raises:
        FileFormatError: There are none.
    """
    if not root.is_dir():
        raise FileFormatError(f"{root}: no such folder; expected one subfolder per class")
    folders = subfolders(root)
    if not folders:
        raise FileFormatError(f"{root}: holds no class folders; put each class into a subfolder of its own")
    return folders


def _image_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if pictures.is_picture(file))
    if not files:
        said = "".join(f"; {note}" for note in _left_out([folder]))
        raise FileFormatError(f"{folder}: holds no {', '.join(pictures.SUFFIXES)}{said}; add some or remove the folder")
    return files


def _left_out(folders: Sequence[Path]) -> tuple[str, ...]:
    """What class folders hold beside pictures, in one sentence if anything."""
    entries = [entry for folder in folders for entry in folder.iterdir() if not hidden(entry)]
    counts = Counter(
        "folders" if entry.is_dir() else entry.suffix.lower() or "without an ending"
        for entry in entries
        if not pictures.is_picture(entry)
    )
    if not counts:
        return ()
    total, kinds = counts.total(), sorted(counts)
    listed = kinds[0] if len(kinds) == 1 else ", ".join(f"{kind} ({counts[kind]})" for kind in kinds)
    return (f"left out {total} file{'s' * (total > 1)}: {listed}",)
