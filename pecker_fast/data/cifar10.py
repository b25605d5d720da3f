"""CIFAR-10 as its authors publish it: binary records, or Python pickles (which are read without unpickling)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pecker_fast.data.files import check_sums, map_file, natural
from pecker_fast.data.plain_pickle import read_plain_pickle
from pecker_fast.data.stored import Indices, Pixels, StoredImages, blocks_of, checked_names
from pecker_fast.errors import FileFormatError

SHAPE = (3, 32, 32)
NAMES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""For folders without the file that lists them."""
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS


def binary_files(root: Path, split: str) -> list[Path]:
    """``data_batch_*.bin`` and ``test_batch.bin``, those of them that are there."""
    return _files(root, split, ".bin")


def python_files(root: Path, split: str) -> list[Path]:
    """``data_batch_*`` and ``test_batch`` without an ending, those of them that are there."""
    return _files(root, split, "")


def read_binary(root: Path, files: list[Path], checksums: Mapping[str, str] | None = None) -> StoredImages:
    """Read records of one label byte and 3072 pixel bytes, red, green, blue, each row by row.

    Args:
        root: The folder; names come from ``batches.meta.txt`` if it is there.
        files: Of `binary_files`.
        checksums: Name -> SHA-256; None takes those of ``SHA256SUMS`` if it is there.

    Raises:
        FileFormatError: A file is no whole number of records, a label is above 9, or a checksum differs.
    """
    meta = root / "batches.meta.txt"
    check_sums(root, [*files, *([meta] if meta.exists() else [])], checksums)
    names = _names(meta, _lines(meta)) if meta.exists() else NAMES
    parts, labels = [], []
    for file in files:
        content = map_file(file)
        if len(content) % _RECORD:
            raise FileFormatError(
                f"{file}: expected records of {_RECORD} bytes, got {len(content)} bytes; is it truncated?"
            )
        records = content.reshape(-1, _RECORD)
        own = records[:, 0].astype(np.int64)
        checked_names(file, own, names)
        parts.append(records[:, 1:].reshape(-1, *SHAPE))
        labels.append(own)
    return StoredImages(root, SHAPE, np.concatenate(labels), names, blocks_of(parts))


def read_python(root: Path, files: list[Path], checksums: Mapping[str, str] | None = None) -> StoredImages:
    """Read pickled dicts with ``data`` (N, 3072) uint8 and ``labels``; nothing in them can run.

    Args:
        root: The folder; names come from ``batches.meta`` if it is there.
        files: Of `python_files`.
        checksums: Name -> SHA-256; None takes those of ``SHA256SUMS`` if it is there.

    Raises:
        FileFormatError: A file is no such pickle, a label is above 9, or a checksum differs.
    """
    meta = root / "batches.meta"
    check_sums(root, [*files, *([meta] if meta.exists() else [])], checksums)
    names = NAMES
    if meta.exists():
        names = _names(meta, read_plain_pickle(meta, map_file(meta)).get("label_names"))
    parts, labels = [], []
    for file in files:
        pixels, own = _batch(file, read_plain_pickle(file, map_file(file)))
        checked_names(file, own, names)
        parts.append(pixels)
        labels.append(own)
    return StoredImages(root, SHAPE, np.concatenate(labels), names, blocks_of(parts))


def _batch(file: Path, values: dict[str, Any]) -> tuple[Pixels, Indices]:
    data, labels = values.get("data"), values.get("labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise FileFormatError(f"{file}: expected data of (N, {_PIXELS}) uint8, got {_described(data)}")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise FileFormatError(f"{file}: expected labels as a list of {len(data)} integers, got {_described(labels)}")
    return data.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)


def _described(value: Any) -> str:
    size = value.shape if isinstance(value, np.ndarray) else len(value) if hasattr(value, "__len__") else "unknown size"
    return f"{type(value).__name__} of {size}"


def _lines(file: Path) -> list[str]:
    """The lines of a short text that are not empty."""
    try:
        return [line.strip() for line in bytes(map_file(file)[:10_000]).decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file}: expected names as text ({error.reason})") from error


def _names(file: Path, names: Any) -> tuple[str, ...]:
    listed = names if isinstance(names, list) and len(names) == len(NAMES) else []
    texts = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in listed]
    if len(texts) != len(NAMES) or not all(isinstance(text, str) for text in texts):
        raise FileFormatError(f"{file}: expected the names of {len(NAMES)} classes, got {_described(names)}")
    return checked_names(file, np.empty(0, np.int64), texts)


def _files(root: Path, split: str, suffix: str) -> list[Path]:
    numbered = (file for file in root.glob(f"data_batch_*{suffix}") if file.suffix == suffix)
    train, test = natural(numbered), [file for file in (root / f"test_batch{suffix}",) if file.exists()]
    return {"train": train, "test": test, "all": train + test}.get(split, [])
