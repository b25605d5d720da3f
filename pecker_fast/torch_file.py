"""Files of ``torch.save``: tensors and plain containers only, checked before they are trusted."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import unwrapped
from pecker_fast.git_lfs import refuse_pointer


def read_torch(path: str | os.PathLike[str], *, legacy: bool = False) -> Any:
    """Read a file of ``torch.save``, as ``torch.load(path, map_location="cpu", weights_only=True, mmap=True)`` does.

    The archive's checksums are compared first, and nothing in it may be compressed: a damaged file is refused instead
    of giving other numbers, and a small one cannot ask for a large memory. No code in the file is run.

    Args:
        path: The file.
        legacy: Also read what torch wrote before 1.6, which is no archive and has no checksums.

    Returns:
        Whatever was saved. Tensors are windows into the file: clone those that are kept.

    Raises:
        FileFormatError: The file is missing, truncated, damaged, older than torch 1.6, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected one that torch.save wrote")
    refuse_pointer(path)
    archive = not legacy or _is_archive(path)
    if archive:
        _check_archive(path)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # what torch raises for a file that it does not like is not written down anywhere
        raise FileFormatError(
            f"{path}: holds something else than tensors, numbers, lists and dicts, or is damaged "
            f"({_first_line(error)}); nothing in it was run"
        ) from error


def weights_of(where: str, values: object) -> dict[str, Tensor]:
    """A dict of ordinary tensors, by the names that the network has without wrappers (see `unwrapped`).

    Args:
        where: What to call it in messages.
        values: What a file holds there.

    Raises:
        FileFormatError: Something else.
    """
    if not isinstance(values, Mapping) or not values:
        raise FileFormatError(f"{where}: expected a dict from names to tensors, got {describe(values)}")
    for name, value in values.items():
        if not isinstance(name, str):
            raise FileFormatError(f"{where}: expected names of weights, got {name!r}")
        plain = type(value) in (Tensor, torch.nn.Parameter)
        if not plain or value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise FileFormatError(f"{where}: {name}: expected an ordinary tensor, got {describe(value)}")
    return {name: value.detach() for name, value in unwrapped(where, values).items()}


def describe(value: object) -> str:
    """What something is, for messages."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} ({value.layout}, {value.device})"
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)} entries"
    return "None" if value is None else type(value).__name__


def _is_archive(path: Path) -> bool:
    """By its first bytes, so that a truncated archive counts as one."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_archive(path: Path) -> None:
    """Refuse anything but an archive of uncompressed entries whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            size = sum(entry.file_size for entry in archive.infolist())
            if packed or size > path.stat().st_size:
                raise FileFormatError(f"{path}: has compressed entries, which torch.save does not write")
            damaged = archive.testzip()
    except FileFormatError:
        raise
    except Exception as error:  # as above: zipfile raises a dozen kinds on damaged headers
        raise FileFormatError(
            f"{path}: truncated, damaged, or not a file of torch.save since torch 1.6 ({_first_line(error)}); "
            "an older one is rewritten by loading and saving it again with torch"
        ) from error
    if damaged is not None:
        raise FileFormatError(f"{path}: damaged: the checksum of {damaged} does not match its content")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
