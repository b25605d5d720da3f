"""Images in one npz, as ``pecker-fast sample`` writes them: sizes are checked before anything is decompressed."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pecker_fast.checkpoint import atomic_file
from pecker_fast.data.files import MAX_BYTES, check_sums
from pecker_fast.data.images import ImageData
from pecker_fast.data.stored import BLOCK, StoredImages, blocks_of, checked_names
from pecker_fast.errors import FileFormatError
from pecker_fast.git_lfs import refuse_pointer

_LAYOUT = "images (N, H, W, C) uint8, labels (N,) integers and, if wanted, class_names (classes,) strings"
_MAX_RATIO, _FREE = 100, 1 << 26
"""How far 64 MiB and more may be compressed: a photograph reaches 2, a drawing perhaps 30, a bomb 1000."""
_PIECE = 1 << 20
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def read_npz(file: Path, checksums: Mapping[str, str] | None = None) -> StoredImages:
    """Read ``images``, ``labels`` and perhaps ``class_names``; nothing is unpickled.

    Args:
        file: The npz.
        checksums: Name -> SHA-256; None takes those of a ``SHA256SUMS`` beside the file.

    Raises:
        FileFormatError: The file is missing, damaged, compressed beyond reason, or holds something else.
    """
    check_sums(file.parent, [file], checksums)
    arrays = read_arrays(file)
    images, labels, names = arrays["images"], arrays["labels"], arrays.get("class_names")
    if images.dtype != np.uint8 or images.ndim != 4:
        hint = "; floats in [-1, 1] become uint8 by round(127.5 * (x + 1))" if images.dtype.kind == "f" else ""
        raise FileFormatError(f"{file}: expected {_LAYOUT}, got images {images.shape} {images.dtype}{hint}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or int(labels.max(initial=0)) >= 2**62:
        hint = "; rows of a one-hot table become numbers by labels.argmax(1)" if labels.ndim == 2 else ""
        raise FileFormatError(
            f"{file}: expected {_LAYOUT}, got labels {labels.shape} {labels.dtype} for {len(images)} images{hint}"
        )
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise FileFormatError(f"{file}: expected {_LAYOUT}, got class_names {names.shape} {names.dtype}")
    own = labels.astype(np.int64)
    classes = checked_names(file, own, None if names is None else [str(name) for name in names])
    pixels = images.transpose(0, 3, 1, 2)
    return StoredImages(file, pixels.shape[1:], own, classes, blocks_of([pixels]))


def write_npz(data: ImageData, file: Path) -> None:
    """Write images as uint8, labels and class names, so that `read_npz` gives them back to 8 bits a channel.

    Raises:
        FileFormatError: The file cannot be written.
    """
    pixels = np.empty((len(data), *data.images.shape[2:], data.images.shape[1]), dtype=np.uint8)
    for start in range(0, len(data), BLOCK):
        block = data.images[start : start + BLOCK].cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
        pixels[start : start + BLOCK] = block.permute(0, 2, 3, 1).numpy()
    try:
        with atomic_file(file) as unfinished, unfinished.open("wb") as stream:
            names = np.array(data.class_names, dtype=np.str_)
            np.savez_compressed(stream, images=pixels, labels=data.labels.cpu().numpy(), class_names=names)
    except OSError as error:
        raise FileFormatError(f"{file}: cannot be written ({error.strerror})") from error


def read_arrays(file: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz of images, of whatever shape and dtype they are.

    Raises:
        FileFormatError: The file is no npz, or holds too much or anything else.
    """
    refuse_pointer(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            known = {"images", "labels"} <= set(members) <= {"images", "labels", "class_names"}
            if not known or len(members) != len(archive.infolist()):
                raise FileFormatError(f"{file}: expected {_LAYOUT}, got {', '.join(sorted(members)[:10]) or 'nothing'}")
            for member in members.values():
                _check_size(file, member)
            return {name: _read_member(file, archive, member) for name, member in members.items()}
    except FileFormatError:
        raise
    except _DAMAGED as error:
        raise FileFormatError(
            f"{file}: cannot be read as an npz with images and labels ({error}); write one with pecker-fast sample"
        ) from error


def _check_size(file: Path, member: zipfile.ZipInfo) -> None:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileFormatError(f"{file}: {member.filename} is neither stored nor deflated; write it with numpy.savez")
    if member.comment:  # where a damaged directory hides its later entries
        raise FileFormatError(f"{file}: {member.filename} has a comment, which numpy does not write; is it damaged?")
    size, packed = member.file_size, member.compress_size
    if size > MAX_BYTES or size > max(_FREE, _MAX_RATIO * packed):
        raise FileFormatError(
            f"{file}: {member.filename} claims {size} bytes in {packed} compressed ones, which looks like a zip bomb; "
            "if it is none, write it with numpy.savez, uncompressed"
        )


def _read_member(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array, decompressed into its place; read to the end, where zip compares the checksum."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        described = f"{member.filename} of {shape} {dtype}"
        if dtype.kind not in "uifU" or dtype.itemsize == 0:
            raise FileFormatError(f"{file}: expected {_LAYOUT}, got {described}")
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise FileFormatError(f"{file}: {described} does not fit into the {member.file_size} bytes that it has")
        flat = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        filled = 0
        while piece := stream.read(_PIECE):
            if filled + len(piece) > len(flat):
                raise FileFormatError(f"{file}: {described} is followed by something else")
            flat[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    if filled != len(flat):
        raise FileFormatError(f"{file}: {described} ends after {filled} of {len(flat)} bytes")
    array = flat.view(dtype)
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version}")
