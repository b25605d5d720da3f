"""STL-10 as its authors publish it: binary files of 96x96 images, stored column by column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pecker_fast.data.files import check_sums, map_file
from pecker_fast.data.stored import StoredImages, blocks_of, checked_names
from pecker_fast.errors import FileFormatError

SHAPE = (3, 96, 96)
NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
"""For folders without ``class_names.txt``."""
_IMAGE = 3 * 96 * 96


def stl10_files(root: Path, split: str) -> list[Path]:
    """``train_X.bin`` and ``test_X.bin``, those of them that are there."""
    wanted = ("train", "test") if split == "all" else (split,)
    return [file for name in wanted if (file := root / f"{name}_X.bin").exists()]


def read_stl10(root: Path, files: list[Path], checksums: Mapping[str, str] | None = None) -> StoredImages:
    """Read images of 3x96x96 bytes, each channel column by column, and labels 1 to 10 from ``*_y.bin``.

    Args:
        root: The folder; names come from ``class_names.txt`` if it is there.
        files: Of `stl10_files`.
        checksums: Name -> SHA-256; None takes those of ``SHA256SUMS`` if it is there.

    Raises:
        FileFormatError: A file is missing or of another size, a label is not 1 to 10, or a checksum differs.
    """
    meta = root / "class_names.txt"
    targets = [file.with_name(file.name.replace("_X", "_y")) for file in files]
    check_sums(root, [*files, *targets, *([meta] if meta.exists() else [])], checksums)
    names = _names(meta) if meta.exists() else NAMES
    parts, labels = [], []
    for file, target in zip(files, targets, strict=True):
        content, own = map_file(file), map_file(target)
        if len(content) != len(own) * _IMAGE:
            raise FileFormatError(
                f"{file}: expected {_IMAGE} bytes for each of the {len(own)} labels of {target.name}, "
                f"got {len(content)} bytes; one of them is truncated or another file"
            )
        counted = own.astype(np.int64) - 1
        if (bad := ((counted < 0) | (counted > 9)).nonzero()[0]).size:
            raise FileFormatError(f"{target}: label {own[bad[0]]} of image {bad[0]} is out of range; expected 1 to 10")
        parts.append(content.reshape(-1, *SHAPE).swapaxes(2, 3))
        labels.append(counted)
    return StoredImages(root, SHAPE, np.concatenate(labels), names, blocks_of(parts))


def _names(file: Path) -> tuple[str, ...]:
    try:
        names = bytes(map_file(file)[:10_000]).decode("utf-8").split()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file}: expected names as text ({error.reason})") from error
    if len(names) != len(NAMES):
        raise FileFormatError(f"{file}: expected the names of {len(NAMES)} classes, got {len(names)}")
    return checked_names(file, np.empty(0, np.int64), names)
