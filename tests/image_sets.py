"""Tiny data sets in the formats of the real ones, made from random pixels that tests can compare with."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def random_pixels(count, size=32, channels=3, seed=0):
    """(N, C, H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def random_labels(count, classes=10, seed=1):
    return np.random.default_rng(seed).integers(0, classes, count)


def as_images(pixels):
    """What readers return for these pixels, in numpy."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def cifar10_binary(root: Path, pixels, labels, name="data_batch_1.bin"):
    root.mkdir(parents=True, exist_ok=True)
    rows = [bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True)]
    (root / name).write_bytes(b"".join(rows))
    (root / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")


def published_pickle(pixels, labels):
    """As Python 2 and numpy 1 wrote it: protocol 2, byte strings, ``numpy.core.multiarray``."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    def number(value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    raw = np.ascontiguousarray(pixels).tobytes()
    start = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01"
    shape = number(len(labels)) + number(3072) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = start + shape + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    files = b"](" + b"".join(short(b"image_%d.png" % i) for i in range(len(labels))) + b"e"
    items = short(b"batch_label") + short(b"training batch 1 of 5") + short(b"labels") + numbers
    return b"\x80\x02}q\x00(" + items + short(b"data") + array + short(b"filenames") + files + b"u."


def cifar10_python(root: Path, pixels, labels, name="data_batch_1", write=None):
    """``write`` (dict -> bytes) None writes what the authors published."""
    root.mkdir(parents=True, exist_ok=True)
    flat = pixels.reshape(len(pixels), -1)
    content = {"data": flat, "labels": [int(label) for label in labels], "batch_label": "training batch 1 of 5"}
    (root / name).write_bytes(published_pickle(flat, labels) if write is None else write(content))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES), "num_vis": 3072}, protocol=2))


def stl10(root: Path, pixels, labels, split="train"):
    """Labels from 0; the files count from 1, and store columns."""
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_X.bin").write_bytes(np.ascontiguousarray(pixels.transpose(0, 1, 3, 2)).tobytes())
    (root / f"{split}_y.bin").write_bytes(bytes(int(label) + 1 for label in labels))
    (root / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")


def npz(file: Path, pixels, labels, names=None, compressed=True):
    file.parent.mkdir(parents=True, exist_ok=True)
    more = {} if names is None else {"class_names": np.array(names)}
    write = np.savez_compressed if compressed else np.savez
    write(file, images=pixels.transpose(0, 2, 3, 1), labels=np.asarray(labels, dtype=np.int64), **more)


def png(pixels):
    from PIL import Image

    stream = io.BytesIO()
    image = pixels.transpose(1, 2, 0)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "png")
    return stream.getvalue()


def folder(root: Path, pixels, labels, names):
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        (root / names[label] / f"{index:04}.png").write_bytes(png(image))


def parquet(file: Path, pixels, labels, names=NAMES, columns=("img", "label")):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(image), "path": None} for image in pixels]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {columns[0]: pa.array(images, kind), columns[1]: pa.array([int(label) for label in labels], pa.int64())}
    )
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {columns[0]: {"_type": "Image"}, columns[1]: label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, file, write_page_checksum=True)


def sums(root: Path):
    """``SHA256SUMS`` of everything below ``root``."""
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(root).as_posix()}" for file in files]
    (root / "SHA256SUMS").write_text("\n".join(lines) + "\n")
