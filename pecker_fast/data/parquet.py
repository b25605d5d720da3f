"""Parquet as Hugging Face publishes image sets: encoded pictures in ``image`` or ``img``, and ``label``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pecker_fast.data import pictures
from pecker_fast.data.files import MAX_BYTES, check_sums
from pecker_fast.data.stored import BLOCK, Indices, Pixels, StoredImages, checked_names
from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer

_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}
_MAX_RATIO, _FREE = 100, 1 << 26
"""How far 64 MiB and more may be compressed; pictures are compressed already."""


def read_parquet(root: Path, files: list[Path], checksums: Mapping[str, str] | None = None) -> StoredImages:
    """Find images and labels; pictures are decoded when they are read, batch by batch. One in colour makes all so.

    Args:
        root: The folder.
        files: The files, in this order.
        checksums: Name -> SHA-256; None takes those of ``SHA256SUMS`` if it is there.

    Raises:
        FileFormatError: A file is damaged, lacks a column, or a label or picture is missing, out of range or of
            another size; or a checksum differs.
        ImportError: pyarrow or Pillow is not installed.
    """
    check_sums(root, files, checksums)
    heads = [_head(file) for file in files]
    names = heads[0][1]
    for file, (_, own) in zip(files, heads, strict=True):
        if own != names:
            raise FileFormatError(f"{file}: its class names are not those of {files[0].name}")
    labels = np.concatenate([labels for labels, _ in heads])
    encoded = (picture for file in files for picture in _pictures(file))
    shape = pictures.common_shape(root, ((name, opener) for _, name, opener in encoded))
    classes = checked_names(root if len(files) > 1 else files[0], labels, names)

    def read(indices: Indices) -> Iterator[Pixels]:
        start = 0
        for file, (own, _) in zip(files, heads, strict=True):
            wanted = indices[(indices >= start) & (indices < start + len(own))] - start
            yield from _decoded(file, wanted, shape)
            start += len(own)

    return StoredImages(root, shape, labels, classes, read)


def _head(file: Path) -> tuple[Indices, tuple[str, ...] | None]:
    """Labels, and the classes' names where they are listed."""
    with _opened(file) as table:
        schema = table.schema_arrow
        name = _column(file, schema.names, _LABELS)
        labels = table.read(columns=[name]).column(name)
        if labels.null_count or str(labels.type) not in _INTEGERS:
            raise FileFormatError(
                f"{file}: expected an integer {name} for every image, got {labels.type}, {labels.null_count} missing"
            )
        if len(labels) != table.metadata.num_rows:
            raise FileFormatError(f"{file}: expected {table.metadata.num_rows} labels, got {len(labels)}")
        own = labels.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
        names = _class_names(file, name, schema.metadata)
    if not len(own):
        raise FileFormatError(f"{file}: holds no images")
    checked_names(file, own, names)
    return own, names


def _class_names(file: Path, label: str, metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...] | None:
    if not metadata or b"huggingface" not in metadata:
        return None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label].get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{file}: its huggingface metadata do not describe {label} ({error!r})") from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"{file}: its huggingface metadata hold no list of class names")
    return tuple(names)


def _decoded(file: Path, wanted: Indices, shape: tuple[int, int, int]) -> Iterator[Pixels]:
    chosen = set(wanted.tolist())
    block: list[Pixels] = []
    seen = 0
    for index, name, opener in _pictures(file):
        if index not in chosen:
            continue
        block.append(pictures.decode(name, opener, shape))
        seen += 1
        if len(block) == BLOCK:
            yield np.stack(block)
            block = []
    if seen != len(chosen):
        raise FileFormatError(f"{file}: expected {len(chosen)} of its images, got {seen}; it is damaged")
    if block:
        yield np.stack(block)


def _pictures(file: Path) -> Iterator[tuple[int, str, pictures.Opener]]:
    """Number, name for messages, and opener of every picture."""
    index = 0
    with _opened(file) as table:
        column = _column(file, table.schema_arrow.names, _IMAGES)
        for batch in table.iter_batches(batch_size=BLOCK, columns=[column]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes):
                    raise FileFormatError(f"{file}: {column} {index} holds no bytes; images by path are not supported")
                yield index, f"{file}: {column} {index}", partial(io.BytesIO, content)
                index += 1


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "reading parquet needs pyarrow, which is not installed; run: pip install pecker_fast[data]"
        ) from error
    refuse_pointer(file)
    try:
        with pq.ParquetFile(file, memory_map=True, page_checksum_verification=True) as table:
            _check_size(file, table.metadata)
            yield table
    except FileFormatError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileFormatError(f"{file}: truncated, damaged or not parquet ({reason})") from error


def _check_size(file: Path, metadata: Any) -> None:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    packed = file.stat().st_size
    if size < 0 or size > MAX_BYTES or size > max(_FREE, _MAX_RATIO * packed):
        raise FileFormatError(f"{file}: claims {size} bytes in {packed} compressed ones, which is beyond reason")


def _column(file: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    found = [name for name in wanted if name in names]
    if len(found) != 1:
        shown = ", ".join(names)[:200]
        raise FileFormatError(f"{file}: expected one column {' or '.join(wanted)}, got columns {shown}")
    return found[0]
