"""A folder's manifest, with size and SHA-256 of every file: what is read is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast.checkpoint import read_json, write_json
from pecker_fast.errors import FileFormatError

NAME = "manifest.json"


def write_manifest(folder: Path, kind: str, version: int) -> None:
    """Write ``manifest.json`` of the files that lie in ``folder`` now: the last one to be written.

    Raises:
        FileFormatError: It cannot be written.
    """
    files = {path.name: describe(path) for path in sorted(folder.iterdir()) if path.is_file()}
    whole = {"format": kind, "version": version, "files": files}
    write_json(folder / NAME, whole | {"sha256": _sha256_of_json(whole)})


def has_manifest(folder: Path, kind: str) -> bool:
    """Whether ``folder`` was finished, and is of this kind; its files are not looked at."""
    try:
        return read_json(folder / NAME).get("format") == kind
    except FileFormatError:
        return False


def sizes_of(folder: Path) -> dict[str, int]:
    """Name -> bytes of all files that were written, the manifest included; none where it is damaged.

    Raises:
        FileFormatError: There is no manifest.
    """
    files = read_json(folder / NAME).get("files")
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        return {}
    return {name: file.get("bytes", -1) for name, file in files.items()} | {NAME: (folder / NAME).stat().st_size}


def check_manifest(folder: Path, kind: str, version: int) -> None:
    """Refuse a folder that is missing, unfinished, damaged, of another kind or of another version.

    Raises:
        FileFormatError: It is; the file is named.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{folder}: no such folder")
    path = folder / NAME
    if not path.is_file():
        raise FileFormatError(f"{folder}: has no {NAME}: it is unfinished or was copied in part; use another one")
    manifest = read_json(path)
    if manifest.get("format") != kind or manifest.get("version") != version:
        got = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise FileFormatError(f"{path}: expected {kind!r} version {version}, got {got}")
    files = manifest.get("files")
    if manifest.pop("sha256", None) != _sha256_of_json(manifest) or not isinstance(files, dict):
        raise FileFormatError(f"{path}: damaged: its checksum does not match its content; use another folder")
    for name, expected in files.items():
        _check_file(folder / name, expected)


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file: "bytes" and "sha256"."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file, but {NAME} lists it; use another folder")
    if path.stat().st_size != expected["bytes"]:
        raise FileFormatError(f"{path}: damaged: {path.stat().st_size} bytes, expected {expected['bytes']}")
    if describe(path) != expected:
        raise FileFormatError(f"{path}: damaged: its SHA-256 is not the one in {NAME}; use another folder")


def _sha256_of_json(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
